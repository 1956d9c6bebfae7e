"""The stand-in daemon says what the real one says, in the same order, and `launch` takes each of its ends rightly."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import certificates, stand_in_daemon

from telechat_mindie.service import ports, schema
from telechat_mindie.service.launch import log_advice, running

pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(sys.platform != "linux", reason="needs process groups")]

CONVERSATION = json.loads(stand_in_daemon.CONVERSATION.read_text(encoding="utf-8"))


def ids(situation):
    return [line.get("id") or line["ref"] for line in CONVERSATION[situation]]


BEFORE_LOADING = ids("start")[: ids("start").index("loading")]
LOADED = ids("start")[: ids("start").index("health") + 1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return stand_in_daemon.install(tmp_path_factory.mktemp("mindie"))


@pytest.fixture
def speak(home, tmp_path):
    """`speak("slow=1")`: the stand-in with these faults, in a session of the test's own; its log by `said`."""
    config = schema.default_config("3.0.0.beta")
    base = ports.free_run(5000, 4)
    server = config["ServerConfig"]
    server |= {"port": base, "managementPort": base + 1, "metricsPort": base + 2, "httpsEnabled": False}
    config["BackendConfig"]["npuDeviceIds"] = [[3]]
    config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["backendType"] = "ms"
    path, log = tmp_path / "config.json", tmp_path / "log"
    started = []

    def start(faults="", *, mode=0o640, leader=False, **server_fields):
        server.update(server_fields)
        path.write_text(json.dumps(config))
        path.chmod(mode)
        environment = {
            "PATH": os.environ["PATH"],
            "STAND_IN": faults,
            "MIES_CONFIG_JSON_PATH": str(path),
            "MINDIE_LLM_FRAMEWORK_BACKEND": "MS",
            "MS_SCHED_HOST": "127.0.0.1",
            "MS_SCHED_PORT": str(base + 3),
        }
        with log.open("wb") as file:
            command = [str(home / "bin" / "mindieservice_daemon")]
            daemon = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=leader)
        started.append(daemon)
        return daemon

    start.log, start.server = log, server
    yield start
    for daemon in started:
        if daemon.poll() is None:
            os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()
        for name in stand_in_daemon.SHM.glob(f"*{daemon.pid}_0_*"):
            name.unlink()
    for process in Path("/proc").glob("[0-9]*"):  # the scheduler, which left the group
        try:
            if f"MIES_CONFIG_JSON_PATH={path}".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            pass


def said(log):
    """The lines of a log by their ids, one that repeats but once."""
    found = []
    for text in log.read_text(encoding="utf-8").splitlines():
        bare = re.sub(
            r"^\[2026-[^]]*\] \[\d+\] \[\d+\] \[\w+\] \[\w+\] \[[^]]*\] (\[MIE\w+\] )?(\[[a-z]+\] )?", "", text
        )
        logged = bare != text
        (id,) = [
            id
            for id, line in stand_in_daemon.LINES.items()
            if ("level" in line) == logged and re.fullmatch(re.sub(r"\\\{\w+\\\}", ".*", re.escape(line["text"])), bare)
        ]
        if not (found[-1:] == [id] and stand_in_daemon.LINES[id].get("repeats")):
            found.append(id)
    return found


def wait_for(log, id, seconds=20):
    deadline = time.monotonic() + seconds
    while not log.is_file() or id not in said(log):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_every_line_has_a_source_in_mindie():
    for id, line in stand_in_daemon.LINES.items():
        place = re.match(r"src/[\w/]+\.cpp:\d+", line["source"])
        assert place or line["source"].startswith(("a worker's own", "the stand-in's own")), id
    everywhere = [id for situation in CONVERSATION if situation != "about" for id in ids(situation)]
    assert set(everywhere) == set(stand_in_daemon.LINES)


def test_what_launch_looks_for_is_what_the_daemon_says():
    assert stand_in_daemon.LINES["success"]["text"] == log_advice.success_line()
    assert stand_in_daemon.LINES["killing"]["text"].startswith(running.DYING)


def test_a_start_and_its_end_by_a_signal(speak):
    daemon = speak()
    wait_for(speak.log, "success-logged")
    for name in ("port", "managementPort", "metricsPort"):
        address = speak.server["ipAddress" if name == "port" else "managementIpAddress"]
        socket.create_connection((address, speak.server[name]), timeout=5).close()
    assert os.getpgid(daemon.pid) == daemon.pid
    daemon.terminate()
    assert daemon.wait(timeout=20) == -signal.SIGABRT
    assert said(speak.log) in ([*ids("start"), *ids("SIGTERM")], [*ids("start"), *_without_waiting("SIGTERM")])


def _without_waiting(situation):
    return [id for id in ids(situation) if id != "waiting"]


def test_no_port_is_taken_before_the_model_is_loaded(speak):
    daemon = speak("slow=60")
    wait_for(speak.log, "loading")
    assert ports.is_free(speak.server["port"])
    daemon.terminate()
    assert daemon.wait(timeout=20) == -signal.SIGABRT


@pytest.mark.parametrize(
    ("faults", "before", "situation"),
    [("worker-dies=0.3", ids("start"), "a worker is killed"), ("out-of-memory", BEFORE_LOADING, "a worker exits")],
)
def test_it_ends_with_its_workers(speak, faults, before, situation):
    assert speak(faults).wait(timeout=20) == -signal.SIGABRT
    heard = [id for id in said(speak.log) if id != "waiting"]
    assert heard == [*before, *_without_waiting(situation)]


def test_a_refusal_of_the_config_comes_late(speak):
    begin = time.monotonic()
    assert speak("config-refused").wait(timeout=20) == -signal.SIGKILL
    assert time.monotonic() - begin > 10 * stand_in_daemon.SECOND
    assert said(speak.log) == [*ids("start")[: ids("start").index("config-read") + 1], *ids("a refused config")]


def test_root_is_not_exempt_from_the_mode_of_the_config(speak):
    assert speak(mode=0o644).wait(timeout=20) == -signal.SIGKILL
    assert said(speak.log) == ["pid", "format", *ids("a config open to others")]


def test_a_taken_port_ends_the_start_when_the_model_is_loaded(speak):
    with socket.socket() as other:
        other.bind(("127.0.0.1", speak.server["managementPort"]))
        other.listen()
        assert speak().wait(timeout=20) == -signal.SIGKILL
    assert said(speak.log) == [*LOADED, *ids("a taken port")]


def test_so_does_a_missing_certificate(speak):
    assert speak(httpsEnabled=True).wait(timeout=20) == -signal.SIGKILL
    assert said(speak.log) == [*LOADED, *ids("an unusable certificate")]


def test_a_missing_revocation_list_is_a_missing_certificate(speak, home, tmp_path):
    certificates.install(home, speak.server, certificates.Authority(tmp_path / "ca"), "server")
    (home / speak.server["tlsCrlPath"] / speak.server["tlsCrlFiles"][0]).unlink()
    assert speak(httpsEnabled=True).wait(timeout=20) == -signal.SIGKILL
    assert said(speak.log)[len(LOADED) :] == ids("an unusable certificate")


def test_a_session_leader_cannot_make_its_group(speak):
    assert speak(leader=True).wait(timeout=20) == 255
    assert said(speak.log) == ["pid", "format", *ids("a session leader")]
