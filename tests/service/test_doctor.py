"""`doctor`: machines staged in a folder, probe by probe."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT

from telechat_mindie.findings import Report
from telechat_mindie.mindie import GENERATIONS
from telechat_mindie.service.doctor import diagnose, host, npu, software, support
from telechat_mindie.service.doctor.machine import Machine
from telechat_mindie.service.launch.processes import Identity
from telechat_mindie.service.launch.rundir import LaunchPlan, RunDirectory
from telechat_mindie.service.port_holder import port_holder

NPU_SMI = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc3                 Version: 24.1.rc3                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B4               | OK            | 85.8        44                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          2832 / 32768         |
+===========================+===============+====================================================+
| 1     910B4               | {health:<13} | 86.0        45                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          {used:<5}/ 32768         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
{process}
+===========================+===============+====================================================+
"""


class Stage:
    """A machine in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.site = root / "site"
        self.bin = root / "bin"
        for folder in (self.site, self.bin, root / "dev" / "shm"):
            folder.mkdir(parents=True)
        self.environment: dict[str, str] = {"PATH": str(self.bin)}

    def machine(self, **changes) -> Machine:
        options = {"root": self.root, "environment": self.environment, "search_path": (str(self.site),), "timeout": 5.0}
        return Machine(**(options | changes))

    def package(self, name: str, version: str, *folders: str) -> Path:
        (self.site / name).mkdir(exist_ok=True)
        (self.site / name / "__init__.py").write_text("raise SystemExit('doctor imported it')")
        for folder in folders:
            (self.site / name / folder).mkdir(parents=True, exist_ok=True)
        for old in self.site.glob(f"{name}-*.dist-info"):
            (old / "METADATA").unlink()
            old.rmdir()
        info = self.site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        return self.site / name

    def command(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def file(self, path: str, text: str = "") -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def cards(self, count: int = 2, health: str = "OK", used: int = 2832) -> None:
        for name in (*npu.DEVICE_FILES, *(f"davinci{number}" for number in range(count))):
            self.file(f"dev/{name}")
        process = "| 1       0                 | 4711          | python3                  | 29000                   |"
        none = "| No running processes found in NPU 1                                                            |"
        self.file("table", NPU_SMI.format(health=health, used=used, process=process if used > 9999 else none))
        self.command(
            "npu-smi", f'[ "$*" = info ] && while IFS= read -r line; do echo "$line"; done < {self.root}/table'
        )


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "machine")


def severities(findings) -> dict[str, str]:
    return {finding.id: finding.severity for finding in findings}


def text(findings) -> str:
    return "\n".join(f"{finding.where} {finding.message} {finding.advice}" for finding in findings)


class TestMindie:
    """Pitfalls 14 and 16: the daemon of a MindIE without the MindSpore wrapper takes backendType ms all the same."""

    @pytest.mark.parametrize("version", ["3.0.0", "3.0.0.beta.3", "3.0.0b3", "3.1.2", "4.0.0"])
    def test_without_the_wrapper(self, stage, version):
        stage.package("mindie_llm", version, "modeling/model_wrapper/atb")
        stage.command("mindieservice_daemon", "")
        found = list(software.check_mindie(stage.machine()))
        assert severities(found)["ms-wrapper"] == "error"
        assert version in text(found) and "3.0.0.beta.2" in text(found) and "falls back" not in text(found)
        stage.package("mindie_llm", "3.0.0.beta.2", "modeling/model_wrapper/ms")
        assert set(severities(software.check_mindie(stage.machine())).values()) == {"ok"}

    @pytest.mark.parametrize("version", ["1.0.0", "1.0.RC3", "2.0.RC1", "2.3.0", "3.0.0.beta.1", "3.0.0b2"])
    def test_with_the_wrapper(self, stage, version):
        stage.package("mindie_llm", version, "modeling/model_wrapper/ms")
        stage.command("mindieservice_daemon", "")
        assert severities(software.check_mindie(stage.machine())) == {"mindie": "ok", "daemon": "ok"}

    def test_a_wrapper_with_an_unknown_version(self, stage):
        stage.package("mindie_llm", "0.7", "modeling/model_wrapper/ms")
        assert severities(software.check_mindie(stage.machine())) == {"mindie": "warning", "daemon": "error"}

    def test_the_daemon_in_its_home(self, stage):
        stage.package("mindie_llm", "2.0.RC1", "modeling/model_wrapper/ms")
        stage.environment["MIES_INSTALL_PATH"] = "/opt/mindie"
        stage.file("opt/mindie/bin/mindieservice_daemon")
        assert software.find_daemon(stage.machine()) is None  # launch could not execute it
        (stage.root / "opt/mindie/bin/mindieservice_daemon").chmod(0o755)
        assert severities(software.check_mindie(stage.machine()))["daemon"] == "ok"
        assert software.find_daemon(stage.machine()) == str(stage.root / "opt/mindie/bin/mindieservice_daemon")

    def test_the_version_of_a_home_without_the_package(self, stage):
        stage.file("usr/local/Ascend/mindie/latest/mindie-service/version.info", "Version=2.1.RC1\n")
        assert software.mindie_version(stage.machine()) == "2.1.RC1"
        stage.environment["MINDIE_LLM_HOME_PATH"] = "/opt/mindie-llm"
        stage.file("opt/mindie-llm/version.info", "MindIE-LLM Version : 2.0.RC1\n")
        assert software.mindie_version(stage.machine()) == "2.0.RC1"

    def test_none(self, stage):
        assert severities(software.check_mindie(stage.machine())) == {"mindie": "warning"}


class TestFrameworks:
    @pytest.mark.parametrize(
        ("version", "severity"),
        [
            ("2.5.0", "error"),
            ("2.6.0rc1", "warning"),
            ("2.7.0", "ok"),
            ("2.10.0", "ok"),
            ("2.11.0", "error"),
            ("3.0", "error"),
            ("", "warning"),
        ],
    )
    def test_mindspore(self, stage, version, severity):
        stage.package("mindspore", version)
        assert severities(software.check_mindspore(stage.machine())) == {"mindspore": severity}

    def test_no_mindspore(self, stage):
        found = list(software.check_mindspore(stage.machine()))
        assert severities(found) == {"mindspore": "error"} and "pip install 'mindspore>=2.6,<2.11'" in text(found)

    @pytest.mark.parametrize(
        ("mindformers", "mindspore", "severity"),
        [
            ("1.6.0", "2.7.0", "ok"),
            ("1.6.0", "2.10.0", "warning"),
            ("1.3.0", "2.7.0", "error"),
            ("1.5.0", "2.7.0", "warning"),
            ("0.1", "2.7.0", "warning"),
            ("2.0.0", "2.10.0", "ok"),
        ],
    )
    def test_mindformers(self, stage, mindformers, mindspore, severity):
        stage.package("mindformers", mindformers)
        stage.package("mindspore", mindspore)
        assert severities(software.check_mindformers(stage.machine())) == {"mindformers": severity}

    def test_no_mindformers_is_fine(self, stage):
        assert severities(software.check_mindformers(stage.machine())) == {"mindformers": "ok"}

    def test_python(self, stage):
        assert severities(software.check_python(stage.machine())) == {"python": "error"}
        assert severities(software.check_python(Machine())) == {"python": "ok"}


class TestCards:
    def test_none(self, stage):
        found = list(npu.check_cards(stage.machine()))
        assert severities(found) == {"npu": "warning"} and "on the CPU" in text(found)
        assert list(npu.check_cann(stage.machine())) == []

    def test_two(self, stage):
        stage.cards()
        found = list(npu.check_cards(stage.machine()))
        assert [finding.severity for finding in found] == ["ok", "ok"]
        assert "910B4, 32768 MB, 2832 in use" in text(found)

    def test_a_busy_and_a_sick_one(self, stage):
        stage.cards(used=29000)
        found = list(npu.check_cards(stage.machine()))
        assert [(finding.id, finding.severity) for finding in found] == [("npu", "ok"), ("npu-memory", "warning")]
        assert "python3 (pid 4711, 29000 MB) runs on it" in text(found)
        stage.cards(health="Alarm")
        found = list(npu.check_cards(stage.machine()))
        assert [finding.where for finding in found if finding.id == "npu-health"] == ["device 1 (NPU 1 chip 0)"]

    def test_a_container_without_the_managers(self, stage):
        stage.cards()
        (stage.root / "dev" / "hisi_hdc").unlink()
        assert "--device=/dev/hisi_hdc" in text(npu.check_cards(stage.machine()))

    @pytest.mark.parametrize("script", ["/bin/sleep 60", "exit 1", "echo", "kill -9 $$"])
    def test_a_driver_that_hangs_or_fails(self, stage, script):
        stage.cards()
        stage.command("npu-smi", script)
        begin = time.monotonic()
        found = list(npu.check_cards(stage.machine(timeout=0.5)))
        assert severities(found) == {"npu-smi": "warning"} and time.monotonic() - begin < 10

    def test_what_npu_smi_says_instead(self, stage):
        stage.cards()
        stage.command("npu-smi", "echo 'dcmi model init failed, because the device is used. ret is -8020'; exit 1")
        (found,) = npu.check_cards(stage.machine())
        assert "ret is -8020" in found.message and "docker ps" in found.advice and "driver" not in found.advice
        (stage.bin / "npu-smi").unlink()
        (found,) = npu.check_cards(stage.machine())
        assert found.id == "npu-smi-missing" and "/usr/local/sbin" in found.message

    def test_a_chip_that_is_refused_and_a_mask(self, stage):
        stage.cards()
        stage.file("table", (stage.root / "table").read_text().replace("910B4", "310P3"))
        stage.environment["ASCEND_RT_VISIBLE_DEVICES"] = "1,0"
        found = list(npu.check_cards(stage.machine()))
        assert severities(found) == {"npu-chip": "error", "visible-devices": "error"}
        assert "Atlas 800I A2" in text(found) and "export ASCEND_RT_VISIBLE_DEVICES=0,1" in text(found)

    def test_a_launch_that_holds_a_card(self, stage, tmp_path):
        stage.cards(used=29000)
        stage.environment["XDG_STATE_HOME"] = str(tmp_path)
        launcher = Identity.of(os.getpid())
        plan = LaunchPlan("m-1025", "/m", "2.0", ("x",), {}, {}, {}, None, "m", launcher, cards=(1,))
        RunDirectory(tmp_path / "telechat-mindie" / "m-1025").create(plan, "{}")
        found = list(npu.check_cards(stage.machine()))
        assert [finding.id for finding in found] == ["npu", "npu-held"]
        assert "the launch m-1025" in found[1].message and "stop m-1025" in found[1].advice
        assert found[1].where == "device 1 (NPU 1 chip 0)"

    def test_npu_smi_is_asked_once(self, stage):
        stage.cards()
        stage.command("npu-smi", f"echo asked >> {stage.root}/count")
        diagnose(stage.machine())
        assert (stage.root / "count").read_text() == "asked\n"

    def test_a_toolkit_that_is_not_there(self, stage):
        stage.cards()
        stage.environment["ASCEND_HOME_PATH"] = "/usr/local/Ascend/gone"
        assert severities(npu.check_cann(stage.machine()))["cann-home"] == "error"
        stage.file("usr/local/Ascend/gone/version.cfg", "version=8.2.RC1\n")
        assert "cann-home" not in severities(npu.check_cann(stage.machine()))

    def test_cann_and_driver(self, stage):
        stage.cards()
        found = list(npu.check_cann(stage.machine()))
        assert severities(found) == {"cann-home": "error", "driver": "warning", "cann": "error"}
        stage.file("usr/local/Ascend/driver/version.info", "Version=25.2.0\n")
        stage.file("usr/local/Ascend/ascend-toolkit/latest/version.cfg", "version=8.2.RC1\n")
        stage.environment["ASCEND_HOME_PATH"] = "/usr/local/Ascend/ascend-toolkit/latest"
        stage.package("mindspore", "2.7.0")
        assert severities(npu.check_cann(stage.machine())) == {"driver": "ok", "cann": "ok"}
        stage.package("mindspore", "2.7.2")
        found = list(npu.check_cann(stage.machine()))
        assert severities(found)["cann"] == "warning" and "Install CANN 8.5.0, or MindSpore 2.7.0." in text(found)


class TestHost:
    def test_shared_memory(self, stage):
        assert severities(host.check_shared_memory(stage.machine()))["shm"] in ("ok", "warning")
        stage.file("dev/shm/abc_llm_backend_0_request")
        found = list(host.check_shared_memory(stage.machine()))
        assert severities(found)["shm-leftovers"] == "warning"
        command = next(finding.advice for finding in found if finding.id == "shm-leftovers").partition(": ")[2]
        subprocess.run(["bash", "-c", command], check=True)
        assert "shm-leftovers" not in severities(host.check_shared_memory(stage.machine()))
        (stage.root / "dev" / "shm").rmdir()
        assert severities(host.check_shared_memory(stage.machine())) == {"shm": "warning"}

    def test_small_shared_memory(self, stage, monkeypatch):
        monkeypatch.setattr(host, "SHM_BYTES", 1 << 60)
        assert "--shm-size=1g" in text(host.check_shared_memory(stage.machine()))

    def test_ports(self, stage, monkeypatch):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            monkeypatch.setattr(host, "DEFAULT_PORTS", (listener.getsockname()[1],))
            found = list(host.check_ports(stage.machine()))
            assert f"(pid {os.getpid()})" in text(found) and found[0].severity == "warning"
        assert severities(host.check_ports(stage.machine())) == {"port": "ok"}

    def test_a_holder_that_this_user_may_not_know(self, monkeypatch):
        def refuse(*_):
            raise psutil.AccessDenied

        monkeypatch.setattr(psutil, "net_connections", refuse)
        assert port_holder(1025) == "another process"

    def test_limits(self, stage, monkeypatch):
        monkeypatch.setattr(host, "OPEN_FILES", 1 << 62)
        assert "ulimit -n" in text(finding for finding in host.check_limits(stage.machine()) if finding.advice)

    @pytest.mark.parametrize("uid", [0, 1000])
    def test_user(self, stage, uid):
        assert severities(host.check_user(stage.machine(uid=uid))) == {"user": "ok"}


def test_support_matrix():
    assert [release.config for release in support.mindie_releases()] == list(GENERATIONS)
    assert support.stack_with(mindspore="2.7.1+cpu").cann == "8.3.RC1"
    assert support.stack_with(mindspore="9") is None
    assert support.release_of("nonsense") is None


def test_the_range_of_mindspore_is_the_packages_own():
    setup = (ROOT / "setup.cfg").read_text()
    oldest, newest = (".".join(map(str, end)) for end in (software.OLDEST_MINDSPORE, software.NEWEST_MINDSPORE))
    assert f"mindspore>={oldest}.0rc1,<{newest}\n" in setup


def test_the_whole_diagnosis_of_an_empty_machine(stage):
    report = diagnose(stage.machine())
    assert isinstance(report, Report) and report.exit_code == 2
    assert {"mindspore", "mindie", "npu", "user", "ulimit"} <= {finding.id for finding in report.findings}


def test_the_command():
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "telechat_mindie", "doctor", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    done = run("--json")
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_code"] and report["findings"]
    assert "Traceback" not in run().stderr
    shown = json.loads(run("--matrix", "--json").stdout)
    assert "3.0.0.beta.3, 3.0.0 and later" == shown["mindie"][-1]["versions"] == shown["matrix"][-1]["mindie"]
    printed = run("--matrix").stdout
    assert "backendType ms" in printed and "mindformers" in printed
