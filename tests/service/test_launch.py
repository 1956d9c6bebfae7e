"""launch, status and stop against a stand-in daemon: whatever happens, no process, port or shared memory is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from helpers import certificates, stand_in_daemon
from helpers.cli import main
from helpers.json_schemas import checked

from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.nano import write_checkpoint
from telechat_mindie.service import schema
from telechat_mindie.service.launch import client, processes, running, shared_memory
from telechat_mindie.service.launch.client import OWN_FILES, ClientFiles, ClientRefusedError, UnansweredError
from telechat_mindie.service.launch.client_tls import remembered_tls
from telechat_mindie.service.launch.errors import LaunchError
from telechat_mindie.service.launch.prepare import LaunchOptions, prepare
from telechat_mindie.service.launch.processes import Identity
from telechat_mindie.service.launch.rundir import LaunchPlan, RunDirectory, all_runs
from telechat_mindie.service.launch.running import Launch, stop_run
from telechat_mindie.service.options import ServiceOptions
from telechat_mindie.service.port_holder import port_holder

pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

DAEMON_SHM = re.compile(r"(sem\.)?\d+_\d+_execute|llm_tokenizer_shared_memory_\d+")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("nano")
    write_checkpoint(root / "ckpt")
    build(root / "model", root / "ckpt")
    return root / "model"


@pytest.fixture(scope="module")
def mindie(tmp_path_factory):
    return stand_in_daemon.install(tmp_path_factory.mktemp("mindie") / "mindie-service")


@pytest.fixture
def state(tmp_path, monkeypatch):
    """XDG_STATE_HOME; afterwards nothing of any run in it may be left."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    before = {name for name in shared_memory.names() if DAEMON_SHM.match(name)}
    home = tmp_path / "state" / "telechat-mindie"
    yield home
    runs = all_runs(home)
    left = {run.name: processes.members(str(run.path)) for run in runs}
    for pids in left.values():
        processes.send(pids, signal.SIGKILL)
    assert not any(left.values())
    held = {port: port_holder(port) for run in runs for port in run.plan().ports.values()}
    assert not [port for port, holder in held.items() if holder != "another process"]  # none listens
    assert {name for name in shared_memory.names() if DAEMON_SHM.match(name)} == before


@pytest.fixture
def begin(model, mindie, state, monkeypatch):
    """`begin("slow=1")`: a launch of the stand-in with these faults, and the lines of its log as they come."""
    launches = []

    def start(faults: str = "", *, detached: bool = False, model_path=model, client=OWN_FILES, **options):
        monkeypatch.setenv("STAND_IN", faults)
        options = ServiceOptions(**{"insecure_http": True, "mindie_home": mindie, **options})
        prepared = prepare(model_path, options, state, os.environ, LaunchOptions(client=client))
        prepared.run.create(prepared.plan, prepared.rendered.text)
        lines: list[str] = []
        launches.append(Launch(prepared.run, detached=detached, on_line=lines.append))
        return launches[-1], lines

    yield start
    for launch in launches:
        with contextlib.suppress(ProcessLookupError):
            launch.stop()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


# ---- the library ----


def test_success(begin, state):
    launch, lines = begin()
    launch.wait_until_up(20)
    answer = launch.first_request("你好", 8, 10)
    assert answer.text == "您好！" and 0 < answer.seconds < 10
    assert "Daemon start success!" in lines
    assert "[INFO] loading weights" in lines  # without the terminal escapes around the word
    config = launch.run.config
    assert config.stat().st_mode & 0o777 == 0o640 and launch.run.path.stat().st_mode & 0o027 == 0
    daemon = launch.run.state().daemon
    assert os.getpgid(daemon.pid) == daemon.pid
    assert len(launch.run.members()) == 3  # daemon, worker, and a scheduler in a session of its own
    ended = launch.stop()
    assert (ended.reason, ended.survivors, len(ended.removed)) == ("stopped", (), 2)
    assert all(str(daemon.pid) in name for name in ended.removed)


def test_a_slow_start_shows_its_log_meanwhile(begin):
    launch, _ = begin("slow=0.8")
    times = {}
    launch.on_line = lambda line: times.setdefault(line, time.monotonic())
    launch.wait_until_up(20)
    assert times["Daemon start success!"] - times["[INFO] loading weights"] > 0.5
    assert launch.first_request("x", 1, 10).text == "您好！"


def test_a_start_that_takes_too_long_is_ended(begin):
    launch, _ = begin("slow=60")
    with pytest.raises(LaunchError, match=r"was not up within 4 s .*last line.*--timeout"):
        launch.wait_until_up(4)
    assert not launch.run.members()


@pytest.mark.parametrize(
    ("faults", "cause", "advice"),
    [
        ("out-of-memory", "memory did not suffice", "npuMemSize"),
        ("config-refused", "refuses a value", "telechat-mindie check"),
        ("silent", "ended with status 3", "doctor"),
    ],
)
def test_a_failed_start_is_explained(begin, faults, cause, advice):
    launch, _ = begin(faults)
    with pytest.raises(LaunchError, match="did not start: ") as failure:
        launch.wait_until_up(20)
    assert cause in str(failure.value) and advice in str(failure.value)
    assert str(launch.run.log) in str(failure.value)
    assert launch.run.state().reason == "ended"


def test_a_config_open_to_others_is_explained(begin, monkeypatch):
    monkeypatch.setattr(RunDirectory, "create", _create_world_readable(RunDirectory.create))
    launch, _ = begin()
    with pytest.raises(LaunchError, match=r"open to more users than MindIE accepts.*--fix"):
        launch.wait_until_up(20)


def _create_world_readable(create):
    def wrapped(run, plan, text):
        create(run, plan, text)
        run.config.chmod(0o644)

    return wrapped


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ("refuses", r"HTTP 500.*Engine callback timeout.*log"),
        ("mute=5", r"gave no answer within 0\.5 s.*chat.*--timeout"),
        ("proxied", r"answered by a proxy in its place \(1\.1 squid\), with HTTP 503.*Let requests"),
    ],
)
def test_a_daemon_that_is_up_stays_up_whatever_becomes_of_the_first_request(begin, monkeypatch, faults, words):
    monkeypatch.setattr(running, "END_SECONDS", 0.2)
    launch, _ = begin(faults)
    launch.wait_until_up(20)
    with pytest.raises(UnansweredError, match=words):
        launch.first_request("x", 1, 0.5)
    assert len(launch.run.members()) == 3 and launch.run.state().ended is None


def test_a_daemon_that_its_first_request_ends_is_told_with_the_cause(begin):
    launch, _ = begin("request-kills")
    launch.wait_until_up(20)
    with pytest.raises(
        LaunchError, match=r"ended at the first request: a worker \(process \d+\) was ended by signal 11"
    ):
        launch.first_request("x", 1, 10)
    assert not launch.run.members()


# ---- HTTPS ----


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return certificates.Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def secure_home(tmp_path):
    return stand_in_daemon.install(tmp_path / "secure")


@pytest.fixture
def secure(begin, secure_home, authority):
    """`secure("server", client=...)`: a launch over HTTPS whose certificate is for these purposes."""

    def start(*purposes, client=OWN_FILES, **options):
        server = schema.default_config("3.0.0.beta")["ServerConfig"]
        certificates.install(secure_home, server, authority, *purposes)
        launch, _ = begin(insecure_http=False, mindie_home=secure_home, client=client, **options)
        launch.wait_until_up(20)
        return launch

    return start


@pytest.fixture
def own_files(authority, tmp_path):
    """A client's certificate of its own, which the daemon's authority has issued for clients alone."""
    files = ClientFiles(str(authority.certificate), str(tmp_path / "client.pem"), str(tmp_path / "client.key"))
    authority.issue(Path(files.cert), Path(files.key), "client")
    return files


def test_a_certificate_for_both_sides_serves_for_the_first_request_too(secure):
    assert secure("server", "client").first_request("x", 1, 10).text == "您好！"


def test_a_certificate_for_servers_alone_does_not_end_the_daemon(secure):
    launch = secure("server")
    with pytest.raises(ClientRefusedError, match=r"not meant for clients.*--client-cert.*--insecure-http"):
        launch.first_request("x", 1, 10)
    assert launch.run.state().ended is None


def test_a_client_certificate_of_its_own_is_asked_with(secure, own_files):
    assert secure("server", client=own_files).first_request("x", 1, 10).text == "您好！"


def test_what_launch_was_told_is_remembered(secure, own_files, run_command, state):
    launch = secure("server", client=own_files, detached=True)
    url = launch.plan.urls["business"]
    assert remembered_tls(state, f"{url}/v1") is not None and remembered_tls(state, "https://127.0.0.1:1") is None
    wait_for(lambda: "ready" in run_command("status").stdout)
    done = run_command("chat", url)
    assert "certificate" not in done.stderr and "HTTP 404" in done.stderr  # it came through: the stand-in has no chat
    done = run_command("bench", "serve", "--url", url, "--requests", 1)
    assert "certificate" not in done.stderr and "HTTP 404" in done.stderr
    done = run_command("chat", url, "--ca-cert", own_files.ca_cert)  # what is named wins, and has no client's part
    assert done.returncode == 2 and "--client-cert" in done.stderr


def test_over_https_the_command_warns_and_leaves_the_daemon_up(secure, run_command, model, secure_home, own_files):
    secure("server").stop()
    arguments = ("launch", model, "--mindie-home", secure_home, "--detach")
    done = run_command(*arguments)
    assert done.returncode == 1 and "is up: https://127.0.0.1:" in done.stdout
    assert "warning: it is up and stays up" in done.stderr and "--client-cert" in done.stderr
    assert json.loads(run_command("status", "--json").stdout)[-1]["state"] == "running"
    assert run_command("stop").returncode == 0
    files = ("--ca-cert", own_files.ca_cert, "--client-cert", own_files.cert, "--client-key", own_files.key)
    done = run_command(*arguments, *files)
    assert done.returncode == 0 and "您好！" in done.stdout and "warning: it is up" not in done.stderr, done.stderr
    assert json.loads(run_command("status", "--json").stdout)[-1]["state"] == "ready"
    assert run_command("stop").returncode == 0
    done = run_command(*arguments, "--client-key", own_files.key)
    assert done.returncode == 2 and "--client-cert" in done.stderr


def test_certificates_of_another_authority_are_told_apart(secure, tmp_path):
    other = certificates.Authority(tmp_path / "other", "another authority")
    cert, key = tmp_path / "foreign.pem", tmp_path / "foreign.key"
    other.issue(cert, key, "client")
    launch = secure("server", client=ClientFiles(None, str(cert), str(key)))
    with pytest.raises(ClientRefusedError, match=r"no CA of tlsCaFile has signed it"):
        launch.first_request("x", 1, 10)
    run = launch.run
    with pytest.raises(ClientRefusedError, match=r"not trusted here.*--ca-cert"):
        context = ssl.create_default_context(cafile=other.certificate)
        context.check_hostname = False
        client.ask(run.plan().urls["business"], "x", 1, 5, context)
    with pytest.raises(ClientRefusedError, match=r"shown none.*--client-cert"):
        context = ssl._create_unverified_context()
        client.ask(run.plan().urls["business"], "x", 1, 5, context)


def test_a_worker_that_dies_takes_everything_with_it(begin):
    launch, _ = begin("worker-dies=0.3")
    launch.wait_until_up(20)
    with pytest.raises(LaunchError, match=r"has ended: a worker \(process \d+\) was ended by signal 11"):
        launch.follow()
    state = launch.run.state()
    assert (state.reason, state.returncode, len(state.removed)) == ("ended", -signal.SIGABRT, 2)
    assert not launch.run.members()  # the scheduler neither, which had left the group


def test_the_last_line_is_named_whatever_its_level(begin, tmp_path, monkeypatch):
    daemon = tmp_path / "daemon"
    daemon.write_text("#!/bin/sh\necho '[INFO] reading the config'\necho '[INFO] the last word'\necho\nexit 3\n")
    daemon.chmod(0o755)
    monkeypatch.setattr(RunDirectory, "create", _create_with_command(RunDirectory.create, (str(daemon),)))
    launch, _ = begin()
    with pytest.raises(LaunchError, match=r"ended with status 3.*the log's last line: \[INFO\] the last word"):
        launch.wait_until_up(20)


def test_a_port_that_is_taken_meanwhile_is_named_with_its_holder(begin):
    launch, _ = begin("slow=0.5")
    with socket.socket() as other:
        other.bind(("127.0.0.1", launch.plan.ports["managementPort"]))
        other.listen()
        with pytest.raises(LaunchError, match="port was taken since") as failure:
            launch.wait_until_up(20)
        expected = rf"port {launch.plan.ports['managementPort']} is held by .*\(pid {os.getpid()}\)"
        assert re.search(expected, str(failure.value)) and "launch again" in str(failure.value)


def test_a_second_launch_gets_other_ports_while_the_first_still_loads(begin):
    first, _ = begin("slow=0.7")
    second, _ = begin("slow=0")
    assert not set(first.plan.ports.values()) & set(second.plan.ports.values())
    assert len(set(second.plan.ports.values())) == 5
    assert first.run.path != second.run.path
    for launch in (second, first):
        launch.wait_until_up(20)
        assert launch.first_request("x", 1, 10).text == "您好！"
    first.stop()
    assert second.first_request("x", 1, 10).text == "您好！"  # untouched by the end of the other
    assert len(second.run.members()) == 3


def test_a_rank_each_of_two_cards(model, begin):
    parts = model.with_name("model_tp2")
    build(parts, model.with_name("ckpt"), BuildOptions(tp=2))
    launch, _ = begin(model_path=parts, devices="4,6")
    launch.wait_until_up(20)
    assert launch.first_request("x", 1, 10).text == "您好！"
    assert len(launch.run.members()) == 4  # daemon, two workers, one scheduler
    assert json.loads(launch.run.config.read_text())["BackendConfig"]["npuDeviceIds"] == [[4, 6]]


def test_nothing_outlives_a_killed_launcher(model, mindie, state):
    code = (
        "import os, time; from pathlib import Path\n"
        "from telechat_mindie.service.launch.prepare import prepare\n"
        "from telechat_mindie.service.launch.running import Launch\n"
        "from telechat_mindie.service.options import ServiceOptions\n"
        f"options = ServiceOptions(insecure_http=True, mindie_home=Path({str(mindie)!r}))\n"
        f"prepared = prepare(Path({str(model)!r}), options, Path({str(state)!r}), os.environ)\n"
        "prepared.run.create(prepared.plan, prepared.rendered.text)\n"
        "Launch(prepared.run, detached=False).wait_until_up(20); print('up', flush=True); time.sleep(60)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "up\n"
    (run,) = all_runs(state)
    assert run.is_active()
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    wait_for(lambda: not run.is_active())
    assert run.state().reason == "stopped"


def test_stop_cleans_up_behind_a_killed_supervisor(begin):
    launch, _ = begin(detached=True)
    launch.wait_until_up(20)
    os.kill(launch.run.state().supervisor.pid, signal.SIGKILL)
    wait_for(lambda: not launch.run.state().supervisor.alive)
    assert launch.run.is_active() and len(launch.run.members()) == 3
    ended = stop_run(launch.run)
    assert (ended.reason, ended.survivors, len(ended.removed)) == ("stopped", (), 2)
    assert not launch.run.is_active()


def test_a_command_that_cannot_be_executed(begin, monkeypatch):
    monkeypatch.setattr(RunDirectory, "create", _create_with_command(RunDirectory.create, ("/nowhere/daemon",)))
    launch, _ = begin()
    with pytest.raises(LaunchError, match="/nowhere/daemon: could not be executed"):
        launch.wait_until_up(20)


def _create_with_command(create, command):
    return lambda run, plan, text: create(run, replace(plan, command=command), text)


# ---- the commands ----


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_command(capfd, monkeypatch):
    """`run_command("status")`: the command in this process, as the console script runs it."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["telechat-mindie", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
        return Done(code, *capfd.readouterr())

    return run


@contextlib.contextmanager
def running_command(*arguments):
    """A command with its lines of output; ended with what it started when the block is left."""
    command = [sys.executable, "-m", "telechat_mindie", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def read_line(process):
    """A line of stdout; where there is none, the reason from stderr."""
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return line


def read_log_until(process, text):
    log = []
    while text not in "".join(log):
        log.append(process.stderr.readline())
        assert log[-1], "".join(log)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, "stop"])
def test_a_launch_that_is_up_is_ended(run_command, model, mindie, state, how):
    with running_command("launch", model, "--mindie-home", mindie, "--insecure-http", "--prompt", "hi") as process:
        assert "is up: http://127.0.0.1:" in read_line(process)
        assert re.fullmatch(r"'hi' was answered in \d+\.\d\d s: 您好！\n", process.stdout.readline())
        (run,) = all_runs(state)
        members = run.members()
        if how == "stop":
            assert run_command("stop").stdout == f"{run.name}: stopped\n"
        else:
            process.send_signal(how)
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in log
    assert ("was stopped" if how == "stop" else "stopping") in log
    assert "loading weights" in log and "\x1b" not in log
    assert len(members) == 3 and run.state().reason == "stopped"


def test_a_second_interrupt_kills_what_does_not_end(model, mindie, state, monkeypatch):
    monkeypatch.setenv("STAND_IN", "deaf")
    with running_command("launch", model, "--mindie-home", mindie, "--insecure-http") as process:
        assert "is up" in read_line(process)
        process.send_signal(signal.SIGINT)
        read_log_until(process, "stopping")
        time.sleep(0.3)
        assert process.poll() is None  # it waits for the daemon to end by itself
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 0


def test_a_terminal_that_closes_while_the_model_loads(model, mindie, state, monkeypatch):
    monkeypatch.setenv("STAND_IN", "slow=60")
    with running_command("launch", model, "--mindie-home", mindie, "--insecure-http") as process:
        read_log_until(process, "loading weights")
        process.send_signal(signal.SIGHUP)
        out, log = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "") and "stopped before it was up" in log


def test_detach_status_and_stop(run_command, model, mindie, state):
    assert "nothing was launched" in run_command("status").stdout
    done = run_command("launch", model, "--mindie-home", mindie, "--insecure-http", "--detach", "--json")
    assert done.returncode == 0, done.stderr
    told = checked("launch", json.loads(done.stdout))
    assert (told["answer"], told["prompt"]) == ("您好！", "你好")
    shown = run_command("status")
    assert shown.returncode == 0 and told["name"] in shown.stdout and "ready" in shown.stdout
    (row,) = checked("status", json.loads(run_command("status", "--json").stdout))
    assert (row["run"], row["state"], row["ports"]) == (told["name"], "ready", told["ports"])
    assert Identity.of(row["pid"]).alive
    assert run_command("stop").stdout == f"{told['name']}: stopped\n"
    assert json.loads(run_command("status", told["name"], "--json").stdout)[0]["state"] == "stopped"
    again = run_command("stop", told["name"])
    assert (again.returncode, again.stdout) == (0, f"{told['name']}: did not run\n")
    none = run_command("stop")
    assert none.returncode == 2 and "telechat-mindie launch" in none.stderr


def test_status_tells_of_a_run_that_died(run_command, begin, state):
    launch, _ = begin("worker-dies=0", detached=True)
    wait_for(lambda: launch.run.state() and not launch.run.state().supervisor.alive)
    done = run_command("status", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)[0]["state"] == "ended"


def test_a_directory_that_check_refuses_is_not_launched(run_command, model, mindie, state, tmp_path):
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", model, broken], check=True)
    (broken / "second.yaml").write_text("{}")
    done = run_command("launch", broken, "--mindie-home", mindie, "--insecure-http")
    assert done.returncode == 2 and "exactly one yaml" in done.stderr and not all_runs(state)
    (broken / "second.yaml").unlink()
    (broken / "extra.safetensors").write_bytes(b"")
    done = run_command("launch", broken, "--mindie-home", mindie, "--insecure-http")
    assert done.returncode == 2 and "extra.safetensors" in done.stderr
    assert "1 error, listed above" in done.stderr and "Nothing was started" in done.stderr
    assert not all_runs(state)


def test_missing_certificates_refuse_the_launch(run_command, model, mindie, state):
    done = run_command("launch", model, "--mindie-home", mindie)
    assert done.returncode == 2 and "HTTPS: is on" in done.stderr and "security/certs/server.pem" in done.stderr
    for flag in ("--insecure-http", "--make-test-certificates", f"--mindie-home {mindie}"):
        assert flag in done.stderr
    assert "httpsEnabled" not in done.stderr  # a key of a file that the tool wrote itself


def test_a_card_is_not_taken_twice_in_silence(run_command, begin, model, mindie, state):
    first, _ = begin(devices="3")
    done = run_command("launch", model, "--mindie-home", mindie, "--insecure-http", "--devices", 3, "--dry-run")
    assert done.returncode == 0 and f"warning: device 3: is held by the launch {first.run.name}" in done.stderr
    done = run_command("launch", model, "--mindie-home", mindie, "--insecure-http", "--devices", 4, "--dry-run")
    assert done.returncode == 0 and "is held" not in done.stderr
    (row,) = json.loads(run_command("status", "--json").stdout)
    assert row["cards"] == [3]


def test_status_fits_a_terminal(run_command, make_named, state, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for number in range(3):
        make_named(f"telechat2-115b-chat-{number}0{number}5", cards=(0, 1, 2, 3, 6), port=65000 + number)
    shown = run_command("status").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "0-3,6" in shown and "telechat2-115b-chat-2025" in shown and "https://127.0.0.1:65002" in shown


@pytest.fixture
def make_named(state):
    def make(name, cards, port):
        plan = LaunchPlan(
            name, "/m", "3.0.0.beta", ("d",), {}, {"port": port}, {"business": f"https://127.0.0.1:{port}"}, None, "m",
            Identity(1, -1), cards=cards,
        )  # fmt: skip
        RunDirectory(state / name).create(plan, "{}")

    return make


def test_logs_of_a_run_while_it_runs_and_after(run_command, begin, model, mindie, state):
    assert run_command("logs").returncode == 2
    launch, _ = begin(detached=True)
    launch.wait_until_up(20)
    everything = launch.run.log.read_text().splitlines()
    shown = run_command("logs", "--lines", 3).stdout.splitlines()
    assert shown == everything[-3:]
    with running_command("logs", "--follow", "-n", 1) as process:
        assert read_line(process).rstrip("\n") == everything[-1]
        assert run_command("stop").returncode == 0
        rest, _ = process.communicate(timeout=20)
        assert "Daemon is killing" in rest and process.returncode == 0
    assert "All subprocesses exited" in run_command("logs").stdout  # the last run, where none is active
    assert run_command("logs", launch.run.name, "-n", 0).stdout == ""


def test_stop_all(run_command, begin, state):
    names = sorted(begin(detached=True)[0].run.name for _ in range(2))
    both = run_command("stop", "--all", names[0])
    assert both.returncode == 2 and "exclude each other" in both.stderr
    wait_for(lambda: all(run.state() for run in all_runs(state)))
    done = run_command("stop", "--all")
    assert sorted(done.stdout.splitlines()) == [f"{name}: stopped" for name in names]
    assert run_command("stop", "--all").stdout == "nothing runs\n"
    assert json.loads(run_command("stop", "--all", "--json").stdout) == []


def test_the_options_of_a_launch_reach_it(run_command, model, mindie, state):
    arguments = ("launch", model, "--mindie-home", mindie, "--insecure-http", "--dry-run", "--json")
    done = run_command(*arguments, "--host", "::", "--name", "mine", "--instances", 2, "--reserve", 30, "--new-config")
    plan = checked("launch-dry-run", json.loads(done.stdout))
    backend = plan["config"]["BackendConfig"]
    assert plan["config"]["ServerConfig"]["ipAddress"] == "::" and plan["config_path"] == f"{state}/mine/config.json"
    assert backend["npuDeviceIds"] == [[0], [1]] and backend["ModelDeployConfig"]["ModelConfig"][0]["npuMemSize"] < 40
    assert "note: config: rendered for this launch" in done.stderr
    done = run_command(*arguments, "--new-config", "--service-config", "x.json")
    assert done.returncode == 2 and "exclude each other" in done.stderr


def test_a_name_is_held_while_its_run_is_active(run_command, begin, model, mindie, state):
    launch, _ = begin()
    launch.wait_until_up(20)
    arguments = ("launch", model, "--mindie-home", mindie, "--insecure-http", "--dry-run", "--name", launch.run.name)
    done = run_command(*arguments)
    assert done.returncode == 2 and "is the name of a run that is active" in done.stderr
    launch.stop()
    assert run_command(*arguments).returncode == 0


def test_a_setting_of_the_log_that_mindie_would_not_read(run_command, model, mindie, state):
    arguments = ("launch", model, "--mindie-home", mindie, "--insecure-http", "--dry-run")
    done = run_command(*arguments, "--set", "dynamicLogLevel=debug")
    assert done.returncode == 0 and done.stderr.count("has no effect") == 1
    assert re.search(r"^warning: .*\$\.LogConfig: has no effect", done.stderr, re.MULTILINE)


def test_nor_would_a_mindie_that_is_not_found(run_command, model, state, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run_command("launch", model, "--insecure-http", "--dry-run", "--set", "dynamicLogLevel=debug")
    assert done.returncode == 0 and done.stderr.count("has no effect") == 1
    assert re.search(r"^warning: .*/config\.json: \$\.LogConfig", done.stderr, re.MULTILINE)


def test_dry_run_starts_nothing(run_command, model, mindie, state):
    done = run_command("launch", model, "--mindie-home", mindie, "--insecure-http", "--dry-run", "--port-base", 2100)
    assert done.returncode == 0, done.stderr
    config, rest = done.stdout.split("# environment\n")
    header, _, text = config.partition("\n")
    port = json.loads(text)["ServerConfig"]["port"]
    assert port >= 2100 and header == f"# {state}/model-{port}/config.json (mode 0640)"
    environment, _, last = rest.partition("# command\n")
    assert "export MINDIE_LLM_FRAMEWORK_BACKEND=MS\n" in environment
    assert f"export MIES_CONFIG_JSON_PATH={state}/model-{port}/config.json\n" in environment
    assert last == f"{mindie}/bin/mindieservice_daemon\n"
    assert not state.exists()


def test_without_mindie_a_launch_is_refused_and_a_dry_run_is_not(run_command, model, state, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run_command("launch", model, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["command"] == ["mindieservice_daemon"]
    assert plan["urls"]["business"].startswith("https://127.0.0.1:")
    done = run_command("launch", model)
    assert done.returncode == 2 and "neither mindieservice_daemon nor mindie_llm_server" in done.stderr
    assert done.stderr.count("\n") == 1 and not all_runs(state)
