"""HTTPS as MindIE speaks it: TLS 1.3 at least, and a certificate is asked of the client as well."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one port.

    Args:
        certificate: of the server, with what leads to its authority.
        key: the private key, without a password.
        authorities: that sign the clients' certificates; none: clients need no certificate.
        revoked: revocation lists of those authorities; MindIE refuses every client where one of them is missing.
    """

    certificate: Path
    key: Path
    authorities: tuple[Path, ...] = ()
    revoked: tuple[Path, ...] = ()

    def context(self) -> ssl.SSLContext:
        """The server's side, as http_wrapper/http_ssl.cpp:204-290 sets it up.

        Raises:
            ConfigError: a file that is missing, not PEM, or a key that does not belong to the certificate.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            # Without a callback OpenSSL would ask the terminal for a password.
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (OSError, ValueError) as failure:
            raise ConfigError(
                f"cannot be used: {failure}",
                where=f"{self.certificate} and {self.key}",
                expected="a PEM certificate and its private key without a password",
            ) from None
        for file in (*self.authorities, *self.revoked):
            try:
                context.load_verify_locations(file)
            except (OSError, ValueError) as failure:
                advice = "Put it there, or empty the config's tls...CrlPath." if file in self.revoked else None
                raise ConfigError(f"cannot be used: {failure}", where=file, expected="PEM", advice=advice) from None
        if self.authorities:
            context.verify_mode = ssl.CERT_REQUIRED
        if self.revoked:
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
        return context
