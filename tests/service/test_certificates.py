"""TLS files: judged as MindIE judges them, and made for a trial that `serve` and a client then hold over HTTPS."""

from __future__ import annotations

import copy
import os
import shutil
import ssl
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from helpers.server import Server, nano_directory

from telechat_mindie.errors import InputError, OutputError
from telechat_mindie.findings import Finding
from telechat_mindie.service import ports, schema, trial_certificates
from telechat_mindie.service.certificates import fault, https_certificates, place, tls_paths
from telechat_mindie.service.check import CheckOptions, check_config
from telechat_mindie.service.trial_certificates import CLIENT_FOLDER, MARK, README, make_trial_certificates

BETA = "3.0.0.beta"
KEY = "security/keys/server.key.pem"
CA = "security/ca/ca.pem"
CRL = "security/certs/server_crl.pem"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the test certificates of the shipped file; RSA keys take a while."""
    home = tmp_path_factory.mktemp("made") / "mindie-service"
    home.mkdir()
    make_trial_certificates(schema.default_config(BETA), BETA, home)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy, free to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "home"))


def certificate_findings(home: Path, generation: str = BETA, uid: int | None = None, **server: Any) -> list[Finding]:
    """What `check` says of the TLS files of a generation's own file, with some of ServerConfig changed."""
    config = copy.deepcopy(schema.default_config(generation))
    config["ServerConfig"] |= server
    options = CheckOptions(
        generation=generation,
        mindie_home=home,
        uid=os.getuid() if uid is None else uid,
        environment={"MINDIE_CHECK_INPUTFILES_PERMISSION": "0"},  # which does not help here
    )
    return [finding for finding in check_config(config, Path("c.json"), None, options) if finding.id == "certificate"]


def test_a_whole_set_is_clean(home: Path) -> None:
    assert certificate_findings(home) == []


def damage(home: Path, how: str) -> None:
    file = home / KEY
    if how == "absent":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "mode":
        file.chmod(0o644)
    elif how == "execute":
        file.chmod(0o700)
    elif how == "large":
        os.truncate(file, 10 * 1024 * 1024 + 1)
    elif how == "link":
        file.rename(home / "key.pem")
        file.symlink_to(home / "key.pem")
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "revoked":
        (home / CRL).unlink()
    elif how == "linked folder":
        (home / "security/ca").rename(home / "ca")
        (home / "security/ca").symlink_to(home / "ca")
    elif how == "outside":
        (home / "security").rename(home.parent / "elsewhere")
        (home / "security").symlink_to(home.parent / "elsewhere")


@pytest.mark.parametrize(
    ("how", "words", "count"),
    [
        ("absent", "is not in", 1),
        ("folder", "is not in", 1),
        ("empty", "has 0 bytes", 1),
        ("large", "has 10485761 bytes", 1),
        ("mode", "0644, over 0640; root is not exempt", 1),
        ("execute", "0700, over 0640", 1),
        ("link", "is a symbolic link", 1),
        ("revoked", "is not in", 1),
        ("linked folder", "is a symbolic link", 3),  # tlsCaPath of each plane
        ("outside", "is outside", 18),  # with the folders
    ],
)
def test_what_mindie_refuses(home: Path, how: str, words: str, count: int) -> None:
    damage(home, how)
    found = certificate_findings(home)
    assert len(found) == count and {finding.severity for finding in found} == {"error"}, found
    assert all(words in finding.message and finding.advice.endswith((".", "pem", "ca")) for finding in found), found
    # Of a closed generation it is known that a key must be there, and no more.
    severities = {finding.severity for finding in certificate_findings(home, "2.3")}
    assert severities == ({"error"} if how in ("absent", "folder") else {"warning"})


def test_another_owner(home: Path) -> None:
    found = certificate_findings(home, uid=os.getuid() + 1)
    files = https_certificates(schema.default_config(BETA), BETA, home)
    assert len(found) == len(files) == 12
    assert all("MindIE runs as" in finding.message and "chown" in finding.advice for finding in found)


def test_an_absolute_path_is_one_of_the_home(home: Path) -> None:
    """MindIE joins the two as text."""
    (finding,) = certificate_findings(home, tlsCert=str(home / "security/certs/server.pem"))
    assert finding.severity == "error" and "relative to" in finding.advice
    assert certificate_findings(home, tlsCert="/security/certs/server.pem") == []


def test_folder_and_name_are_joined_as_text(home: Path) -> None:
    (first, *_) = certificate_findings(home, tlsCaPath="security/ca")
    assert "security/caca.pem" in first.message


def test_an_empty_revocation_setting_reads_none(home: Path) -> None:
    (home / CRL).unlink()
    assert len(certificate_findings(home)) == 1
    for setting in ({"tlsCrlPath": ""}, {"tlsCrlFiles": []}):
        assert certificate_findings(home, **setting) == []


def test_one_listener_needs_one_certificate(home: Path) -> None:
    shutil.rmtree(home / "security/keys/management")
    shutil.rmtree(home / "security/keys/metrics")
    assert len(certificate_findings(home)) == 2
    one = {"managementIpAddress": "127.0.0.1", "managementPort": 1025, "metricsPort": 1025}
    assert certificate_findings(home, **one) == []


def test_several_machines_read_a_folder_by_the_rule_of_a_file(home: Path) -> None:
    config = schema.default_config(BETA)
    config["ServerConfig"]["httpsEnabled"] = False
    assert not list(tls_paths(config, BETA, home))
    config["BackendConfig"]["multiNodesInferEnabled"] = True
    folder = home / "security/grpc/certs"
    folder.mkdir(parents=True, mode=0o750)
    names = {item.file: fault(item, home, os.getuid()) for item in tls_paths(config, BETA, home)}
    assert "security/grpc/keys/server.key.pem" in names
    reason = names["security/grpc/certs/"]
    assert reason is not None and "0750, over 0640" in reason[0]
    assert 'interNodeTlsCrlPath to ""' in reason[1]
    folder.chmod(0o640)
    (item,) = [item for item in tls_paths(config, BETA, home) if item.file == "security/grpc/certs/"]
    assert fault(item, home, os.getuid()) is None


class TestTrialSet:
    def test_modes_and_marks(self, made: Path) -> None:
        for item in https_certificates(schema.default_config(BETA), BETA, made):
            assert item.present
            assert stat.S_IMODE(place(made, item.file).stat().st_mode) == (0o600 if "key" in item.file else 0o640)
        assert stat.S_IMODE((made / "security/certs/metrics").stat().st_mode) == 0o750
        readme = (made / README).read_text()
        assert readme.startswith(MARK) and KEY in readme and "--cert" in readme
        assert "https://127.0.0.1:1025/v1/models" in readme
        for file in made.rglob("*.pem"):
            if b"BEGIN CERTIFICATE" in (data := file.read_bytes()):
                (organization,) = x509.load_pem_x509_certificate(data).subject.get_attributes_for_oid(
                    NameOID.ORGANIZATION_NAME
                )
                assert "TEST ONLY" in organization.value

    def test_certificates_fit_their_purpose(self, made: Path) -> None:
        server = x509.load_pem_x509_certificate((made / "security/certs/server.pem").read_bytes())
        client = x509.load_pem_x509_certificate((made / CLIENT_FOLDER / "client.pem").read_bytes())
        assert server.public_key().key_size == client.public_key().key_size == 3072  # type: ignore[union-attr]
        uses = [set(one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) for one in (server, client)]
        assert uses == [
            {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH},
            {ExtendedKeyUsageOID.CLIENT_AUTH},
        ]
        names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert {str(address) for address in names.get_values_for_type(x509.IPAddress)} == {
            *("127.0.0.1", "127.0.0.2", "::1")
        }
        revoked = x509.load_pem_x509_crl((made / CRL).read_bytes())
        authority = x509.load_pem_x509_certificate((made / CA).read_bytes())
        assert len(revoked) == 0 and revoked.issuer == authority.subject
        assert revoked.is_signature_valid(authority.public_key())  # type: ignore[arg-type]

    def test_only_its_own_files_are_replaced(self, home: Path) -> None:
        config, before = schema.default_config(BETA), (home / KEY).read_bytes()
        with pytest.raises(OutputError, match="--force"):
            make_trial_certificates(config, BETA, home)
        (home / README).unlink()  # as if they were somebody's own
        with pytest.raises(OutputError, match="leaves them alone"):
            make_trial_certificates(config, BETA, home, replace=True)
        assert (home / KEY).read_bytes() == before
        (home / README).write_text(f"{MARK}\nFiles:\n{KEY}\n")
        with pytest.raises(OutputError, match="leaves them alone"):
            make_trial_certificates(config, BETA, home, replace=True)
        assert (home / KEY).read_bytes() == before

    def test_files_of_earlier_runs_stay_its_own(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Planes merged and taken apart again; a file that is gone is forgotten."""
        monkeypatch.setattr(trial_certificates, "KEY_BITS", 2048)
        apart, merged = schema.default_config(BETA), schema.default_config(BETA)
        merged["ServerConfig"] |= {"managementIpAddress": "127.0.0.1", "managementPort": 1025, "metricsPort": 1025}
        metrics, management = ("security/keys/metrics/server.key.pem", "security/keys/management/server.key.pem")
        (home / metrics).unlink()
        make_trial_certificates(merged, BETA, home, replace=True)
        listed = (home / README).read_text().splitlines()
        assert management in listed and metrics not in listed
        make_trial_certificates(apart, BETA, home, replace=True)
        assert (home / metrics).is_file() and certificate_findings(home) == []

    def test_a_client_of_this_host_reaches_a_wildcard(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trial_certificates, "KEY_BITS", 2048)
        config = schema.default_config(BETA)
        config["ServerConfig"] |= {"ipAddress": "0.0.0.0", "allowAllZeroIpListening": True}
        readme = make_trial_certificates(config, BETA, tmp_path).readme.read_text()
        assert "https://127.0.0.1:1025/v1/models" in readme and "0.0.0.0" not in readme

    def test_refusals(self, tmp_path: Path) -> None:
        plain = schema.default_config(BETA)
        plain["ServerConfig"]["httpsEnabled"] = False
        outside = schema.default_config(BETA)
        outside["ServerConfig"]["tlsPk"] = "../key.pem"
        old = schema.default_config("1.0")
        for config, generation, home, words in (
            (plain, BETA, tmp_path, "httpsEnabled true"),
            (outside, BETA, tmp_path, "outside"),
            (old, "1.0", tmp_path, "key stores"),
            (schema.default_config(BETA), BETA, tmp_path / "none", "is no folder"),
        ):
            with pytest.raises(InputError, match=words):
                make_trial_certificates(config, generation, home)
        assert not list(tmp_path.iterdir())

    def test_without_cryptography(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cryptography", None)
        with pytest.raises(InputError, match=r"pip install 'cryptography>="):
            make_trial_certificates(schema.default_config(BETA), BETA, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_closed_generation_may_want_its_own_tool(self, tmp_path: Path) -> None:
        trial = make_trial_certificates(schema.default_config("2.3"), "2.3", tmp_path)
        assert "is not known" in trial.note and (tmp_path / "security/certs/metrics/server.pem") in trial.files


def test_https_end_to_end(tmp_path: Path) -> None:
    """`service-config` makes config and certificates, `check` finds nothing, `serve` asks for the client's."""
    home, model = tmp_path / "mindie-service", nano_directory()
    config = home / "conf/config.json"
    config.parent.mkdir(parents=True)
    base = ports.free_run(24025, 3)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MI")}

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "telechat_mindie", name, str(model), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    chosen = ("--mindie-home", home, "--port-base", base, "--make-test-certificates")
    done = run("service-config", "-o", config, *chosen)
    assert done.returncode == 0, done.stderr
    assert "test certificates, not for production" in done.stderr and "missing" not in done.stderr
    assert run("service-config", "-o", config, *chosen).returncode == 2
    done = run("check", "--service-config", config, "--mindie-home", home)
    assert done.returncode == 0, done.stdout
    command = [sys.executable, "-m", "telechat_mindie", "serve", str(model), "--service-config", str(config)]
    with Server([*command, "--mindie-home", str(home)]) as server:
        context = ssl.create_default_context(cafile=str(home / CLIENT_FOLDER / "ca.pem"))
        with pytest.raises(httpx.TransportError), httpx.Client(verify=context, trust_env=False) as client:
            client.get(f"{server.url}/v1/models")
        context.load_cert_chain(home / CLIENT_FOLDER / "client.pem", home / CLIENT_FOLDER / "client.key.pem")
        with httpx.Client(verify=context, trust_env=False) as client:
            assert client.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "nano"
            assert client.get(f"https://127.0.0.2:{base + 1}/v1/config").status_code == 200
            assert client.get(f"https://127.0.0.2:{base + 2}/metrics").status_code == 200
        assert server.stop() == 0
