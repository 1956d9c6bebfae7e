"""Certificates as an authority issues them, for one purpose or several. All share one key: it takes long to make."""

from __future__ import annotations

import datetime
import ipaddress
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PURPOSES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}


@cache
def _key() -> rsa.RSAPrivateKey:
    """Of the least length that MindIE takes (http_ssl.cpp, CertVerify)."""
    return rsa.generate_private_key(public_exponent=65537, key_size=3072)


class Authority:
    """A certificate authority of its own; `ca.pem` and `crl.pem`, which revokes nothing, lie in `folder`."""

    def __init__(self, folder: Path, name: str = "a test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._now = datetime.datetime.now(datetime.timezone.utc)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        basic = x509.BasicConstraints(ca=True, path_length=None)
        made = self._builder(self._name).add_extension(basic, True).add_extension(usage, True)
        self.certificate, self.crl = folder / "ca.pem", folder / "crl.pem"
        self.certificate.write_bytes(made.sign(_key(), hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        revoked = x509.CertificateRevocationListBuilder().issuer_name(self._name).last_update(self._now)
        revoked = revoked.next_update(self._now + datetime.timedelta(days=1))
        self.crl.write_bytes(revoked.sign(_key(), hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(self, cert: Path, key: Path, *purposes: str) -> None:
        """A certificate for 127.0.0.1 with its key, mode 0640; without purposes it is for any."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cert.stem)])
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = self._builder(name).add_extension(address, False)
        if purposes:
            made = made.add_extension(x509.ExtendedKeyUsage([PURPOSES[purpose] for purpose in purposes]), False)
        for path, data in (
            (cert, made.sign(_key(), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)),
            (
                key,
                _key().private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                ),
            ),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o640)

    def _builder(self, subject: x509.Name) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(_key().public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - datetime.timedelta(minutes=5))
            .not_valid_after(self._now + datetime.timedelta(days=1))
        )


def install(home: Path, server: dict, authority: Authority, *purposes: str) -> None:
    """Put a certificate for these purposes, its key, CA and CRLs where a ServerConfig wants them in MindIE's home."""
    for prefix in ("tls", "managementTls", "metricsTls"):
        authority.issue(home / server[f"{prefix}Cert"], home / server[f"{prefix}Pk"], *purposes)
        for name in server[f"{prefix}CaFile"]:
            _copy(authority.certificate, home / (server["tlsCaPath"] + name))
        for name in server[f"{prefix}CrlFiles"]:
            _copy(authority.crl, home / (server[f"{prefix}CrlPath"] + name))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    target.chmod(0o640)
