"""Certificates to try HTTPS with: an authority of its own, a server, a client, and empty revocation lists.

They are marked as such wherever one looks: in each subject, in a README beside them, and in what `service-config` says.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telechat_mindie.errors import InputError, OutputError, name_some
from telechat_mindie.installing import install_extra
from telechat_mindie.mindie import GENERATIONS
from telechat_mindie.reading import read_text
from telechat_mindie.service.addresses import url_of
from telechat_mindie.service.certificates import Certificate, https_certificates, place
from telechat_mindie.staging import DIR_MODE, reporting_os_errors, write_file

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

OPTION = "--make-test-certificates"
MARK = "TEST ONLY, made by telechat-mindie"
"""The organization of every subject, and the first line of the README."""

README = "security/TEST_CERTIFICATES.txt"
CLIENT_FOLDER = "security/test_client"
KEY_BITS = (
    3072  # the least that MindIE's documents allow: MindIE-LLM v3.0.0.beta.2 service_parameter_configuration.md:34
)
DAYS = 30


@dataclass(frozen=True, slots=True)
class TrialCertificates:
    """What was made.

    Attributes:
        files: all of them, below MindIE's home.
        readme: says what they are and how to use them.
        until: when they expire.
        note: what is not known of their use by a closed release; empty where all is.
    """

    files: tuple[Path, ...]
    readme: Path
    until: datetime
    note: str


def make_trial_certificates(
    config: Mapping[str, Any], generation: str, home: Path, *, replace: bool = False
) -> TrialCertificates:
    """Make every file that a valid config with httpsEnabled names, in MindIE's home, with a client's beside them.

    Certificates last 30 days and stand for the config's addresses, this host's name and 127.0.0.1; that of the server
    is for serverAuth and clientAuth, since MindIE's planes are each other's clients. Files have mode 0640, keys 0600,
    new folders 0750.

    Args:
        replace: make those of an earlier run anew. Files that this function did not make are never replaced.

    Raises:
        InputError: the config has no HTTPS, the generation wants key stores of its own, the home is no folder, a file
            would be outside of it, or the package cryptography is missing.
        OutputError: a file is there already, or cannot be written.
    """
    certificates = https_certificates(config, generation, None)
    _check_wanted(certificates, generation, home)
    until = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=DAYS)
    roles = {item.file: item.role for item in certificates} | _client_names()
    names = sorted(roles)
    _check_targets(home, names, replace)
    listed = sorted({*names, *(name for name in _listed(home) if place(home, name).is_file())})
    made = _make(config["ServerConfig"], until)
    write_file(
        _prepared(home, README), _readme(config["ServerConfig"], listed, until).encode()
    )  # first: what it lists may be replaced
    for name in names:
        write_file(_prepared(home, name), made[roles[name]])
        if roles[name] in ("server key", "client key"):
            place(home, name).chmod(0o600)
    closed = (
        ""
        if GENERATIONS[generation].is_public
        else (f"whether MindIE {generation} takes keys without a password is not known; its own tool encrypts them")
    )
    return TrialCertificates(tuple(place(home, name) for name in names), place(home, README), until, closed)


def _check_wanted(certificates: Sequence[Certificate], generation: str, home: Path) -> None:
    if not certificates:
        raise InputError("has nothing to make", where=OPTION, expected="httpsEnabled true", advice="Leave it out.")
    if generation == "1.0":
        advice = "Make them with the certificate tool of MindIE 1.0, or try the config with --insecure-http."
        raise InputError("cannot make the key stores (kmcKsf...) of MindIE 1.0", where=OPTION, advice=advice)
    if not home.is_dir():
        raise InputError("is no folder", where=f"MindIE's home {home}", advice="Name it: --mindie-home DIR.")


def _client_names() -> dict[str, str]:
    parts = {"ca.pem": "authority", "client.pem": "client", "client.key.pem": "client key"}
    return {f"{CLIENT_FOLDER}/{name}": part for name, part in parts.items()}


def _check_targets(home: Path, names: list[str], replace: bool) -> None:
    root = home.resolve()
    if outside := [name for name in names if "\0" in name or not place(root, name).resolve().is_relative_to(root)]:
        raise InputError(f"would be outside {home}", where=name_some(outside), advice="MindIE refuses such files.")
    ours = _listed(home)
    there = [name for name in names if place(home, name).exists() or place(home, name).is_symlink()]
    if foreign := [name for name in there if name not in ours]:
        advice = "They are not of this program, so it leaves them alone: use them, or move them away first."
        raise OutputError("is there already", where=f"{home}: {name_some(foreign)}", advice=advice)
    if there and not replace:
        advice = f"They are test certificates (see {README}); --force makes new ones."
        raise OutputError("is there already", where=f"{home}: {name_some(there)}", advice=advice)


def _listed(home: Path) -> set[str]:
    """The files that an earlier run made."""
    readme = place(home, README)
    if not readme.is_file():
        return set()
    lines = read_text(readme).splitlines()
    return set(lines[lines.index("Files:") + 1 :]) if lines[:1] == [MARK] and "Files:" in lines else set()


def _prepared(home: Path, name: str) -> Path:
    path = place(home, name)
    with reporting_os_errors(path):
        for folder in reversed(path.parents):
            if not folder.exists():
                folder.mkdir(mode=DIR_MODE)
    return path


def _readme(server: Mapping[str, Any], names: list[str], until: datetime) -> str:
    url = url_of("https", server["ipAddress"], server["port"])
    ca, certificate, key = _client_names()
    return "\n".join(
        [
            MARK,
            "",
            "These certificates are for trying HTTPS on one machine. Their keys have no password, and whoever can read",
            "this folder can speak for the service. Replace them before the service is used, and remove this file.",
            f"They expire on {until:%Y-%m-%d %H:%M} UTC.",
            "",
            "A client needs a certificate too, since MindIE asks for one:",
            f"  curl --cacert {ca} --cert {certificate} --key {key} {url}/v1/models",
            f"  telechat-mindie chat {url} --ca-cert {ca} --cert {certificate} --key {key}",
            "",
            "Files:",
            *names,
            "",
        ]
    )


def _make(server: Mapping[str, Any], until: datetime) -> dict[str, bytes]:
    """PEM of each part. The authority's own key is forgotten: nothing else can be signed with it."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import rsa
        from cryptography.x509.oid import ExtendedKeyUsageOID
    except ImportError:
        raise InputError(
            "needs the package cryptography",
            where=OPTION,
            advice=install_extra("tls"),
        ) from None

    authority_key, server_key, client_key = (rsa.generate_private_key(65537, KEY_BITS) for _ in range(3))
    issuer = _subject("authority")
    begin = until - timedelta(days=DAYS + 1)  # a day early, for clocks that are late
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]

    def issue(name: str, key: RSAPrivateKey, *extensions: x509.ExtensionType, is_authority: bool = False) -> bytes:
        public = authority_key.public_key()
        usage = dict.fromkeys(
            ("content_commitment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False
        )
        builder = (
            x509.CertificateBuilder(issuer, _subject(name), key.public_key(), x509.random_serial_number(), begin, until)
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not is_authority,
                    key_encipherment=not is_authority,
                    key_cert_sign=is_authority,
                    crl_sign=is_authority,
                    **usage,
                ),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return _pem(builder.sign(authority_key, hashes.SHA256()))

    addresses = x509.SubjectAlternativeName(list(_alternative_names(server)))
    revoked = x509.CertificateRevocationListBuilder(issuer, begin, until).sign(authority_key, hashes.SHA256())
    return {
        "authority": issue("authority", authority_key, is_authority=True),
        "server": issue("server", server_key, addresses, x509.ExtendedKeyUsage(both)),
        "server key": _key_pem(server_key),
        "client": issue("client", client_key, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])),
        "client key": _key_pem(client_key),
        "revoked": _pem(revoked),
    }


def _subject(name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    attributes = ((NameOID.ORGANIZATION_NAME, MARK), (NameOID.COMMON_NAME, f"telechat-mindie test {name}"))
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in attributes])


def _alternative_names(server: Mapping[str, Any]) -> Iterator[x509.GeneralName]:
    """The addresses that the service listens on, and the names of this host."""
    from cryptography import x509

    named = [str(server[name]).strip("[]") for name in ("ipAddress", "managementIpAddress") if name in server]
    for address in dict.fromkeys((*named, "127.0.0.1", "::1")):
        yield x509.IPAddress(ipaddress.ip_address(address))
    for host in dict.fromkeys(("localhost", socket.gethostname())):
        if host.isascii():
            yield x509.DNSName(host)


def _pem(item: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return item.public_bytes(Encoding.PEM)


def _key_pem(key: RSAPrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
