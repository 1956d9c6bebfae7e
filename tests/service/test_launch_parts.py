"""The parts of launch that start nothing: finding MindIE, the environment, the log's meaning, the run directory."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest
from helpers import stand_in_daemon

from telechat_mindie.errors import ConfigError, InputError, OutputError
from telechat_mindie.mindie import RANK_PORTS
from telechat_mindie.model_dir.build import build
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.nano import write_checkpoint
from telechat_mindie.server.settings import read_settings
from telechat_mindie.service import ports, schema
from telechat_mindie.service.cards import Card, Cards
from telechat_mindie.service.check.options import CheckOptions
from telechat_mindie.service.doctor.machine import Machine
from telechat_mindie.service.doctor.software import find_daemon, mindie_version
from telechat_mindie.service.facts import model_facts
from telechat_mindie.service.launch import client, log_tail, shared_memory
from telechat_mindie.service.launch.environment import SHADOW, daemon_environment
from telechat_mindie.service.launch.errors import LaunchError
from telechat_mindie.service.launch.installation import NotInstalledError, find_installation
from telechat_mindie.service.launch.log_tail import LogTail, clean
from telechat_mindie.service.launch.prepare import LaunchOptions, prepare
from telechat_mindie.service.launch.processes import Identity
from telechat_mindie.service.launch.rundir import (
    LaunchPlan,
    RunDirectory,
    State,
    active_runs,
    all_runs,
    cards_held,
    find_run,
    locked,
    state_home,
)
from telechat_mindie.service.launch.running import stop_run
from telechat_mindie.service.options import ServiceOptions
from telechat_mindie.service.render import render_service_config

# ---- installation ----


@pytest.fixture
def mindie(tmp_path):
    return stand_in_daemon.install(tmp_path / "mindie" / "latest" / "mindie-service")


def test_an_installation_by_its_home_or_a_folder_above(mindie):
    for folder in (mindie, mindie.parent, mindie.parent.parent):
        found = find_installation(folder, {"PATH": "/usr/bin"})
        assert found.home == mindie
        assert found.command == (f"{mindie}/bin/mindieservice_daemon",)
        assert found.python == Path(sys.executable)  # from the first line of mindie_llm_backend
        assert (found.version, found.generation, found.has_mindformers) == ("3.0.0.beta.2", "3.0.0.beta", False)


def test_the_named_home_wins_over_variables_and_these_over_path(mindie, tmp_path):
    other = stand_in_daemon.install(tmp_path / "other")
    environment = {"MIES_INSTALL_PATH": str(other), "PATH": f"{mindie}/bin"}
    assert find_installation(mindie, environment).home == mindie
    assert find_installation(None, environment).home == other
    assert find_installation(None, {"PATH": f"{mindie}/bin"}).home == mindie
    assert find_installation(None, {"MINDIE_LLM_HOME_PATH": str(other), "PATH": ""}).home == other


@pytest.mark.parametrize(
    "variables",
    [
        # With both set_env.sh of 2.x sourced: mindie-llm lies beside mindie-service and has no daemon.
        {"MINDIE_LLM_HOME_PATH": "{above}/mindie-llm", "MIES_INSTALL_PATH": "{above}/mindie-service"},
        {"MINDIE_LLM_HOME_PATH": "{above}/mindie-llm"},  # none of the exported ones: the usual place
        {"MIES_INSTALL_PATH": "{above}/.."},  # a folder above
        {},
    ],
)
def test_everybody_finds_the_same_home(mindie, tmp_path, monkeypatch, variables):
    monkeypatch.setattr("telechat_mindie.mindie.DEFAULT_HOME", str(mindie))
    (mindie.parent / "mindie-llm").mkdir()
    (mindie / "version.info").write_text("Version=2.0.RC1\n")
    environment = {"PATH": "", **{name: value.format(above=mindie.parent) for name, value in variables.items()}}
    home = find_installation(None, environment).home
    assert home.samefile(mindie)
    assert CheckOptions(environment=environment).home == home
    machine = Machine(environment=environment, search_path=())
    assert find_daemon(machine) == f"{home}/bin/mindieservice_daemon"
    assert mindie_version(machine) == "2.0.RC1"
    config = schema.default_config("2.0")
    config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0] |= {"backendType": "ms", "npuMemSize": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = read_settings(tmp_path / "config.json", "2.0", None, environment)
    assert settings.business.tls.certificate.is_relative_to(home)


def test_a_folder_above_may_be_named_to_check_as_well(mindie):
    assert CheckOptions(environment={}, mindie_home=mindie.parent.parent).home == mindie
    assert CheckOptions(environment={}, mindie_home=Path("/nowhere")).home == Path("/nowhere")
    assert CheckOptions(environment={"MINDIE_LLM_HOME_PATH": "/wheel"}).home == Path("/wheel")


def test_the_wheels_own_server_is_started_where_it_is_installed(mindie, tmp_path):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name in ("mindie_llm_server", "mindie_llm_backend"):
        (scripts / name).write_text(f"#!{sys.executable}\n")
        (scripts / name).chmod(0o755)
    found = find_installation(None, {"PATH": str(scripts), "PYTHONPATH": str(mindie)})
    assert found.command == (f"{scripts}/mindie_llm_server",)
    assert found.home == mindie / "mindie_llm"


def test_the_version_decides_the_generation(mindie):
    for text, generation in (("Ascend-mindie : MindIE 1.0.0\n", "1.0"), ("Platform : x\nVersion=2.0.RC1\n", "2.0")):
        (mindie / "version.info").write_text(text)
        assert find_installation(mindie, {}).generation == generation
    (mindie / "version.info").unlink()
    found = find_installation(mindie, {})
    assert (found.version, found.generation) == (None, "3.0.0.beta")


def test_an_installed_mindformers_is_found(mindie):
    (mindie / "mindformers").mkdir()
    (mindie / "mindformers" / "__init__.py").touch()
    assert find_installation(mindie, {}).has_mindformers


def test_a_mindie_without_the_ms_wrapper_is_refused_with_the_supported_range(tmp_path):
    home = stand_in_daemon.install(tmp_path / "mindie", ms_wrapper=False)
    with pytest.raises(LaunchError, match=r"no MindSpore backend.*expected MindIE 2\.0.*3\.0\.0\.beta\.2"):
        find_installation(home, {})


def test_a_release_without_ms_is_refused_though_the_folder_is_there(mindie):
    (mindie / "version.info").write_text("MindIE-LLM Version : 3.0.0\n")
    with pytest.raises(LaunchError, match=r"no MindSpore backend.*MindIE 3\.0\.0\b"):
        find_installation(mindie, {})


def test_what_is_missing_is_named(mindie, tmp_path):
    with pytest.raises(NotInstalledError, match="--mindie-home"):
        find_installation(None, {"PATH": str(tmp_path)})
    with pytest.raises(LaunchError, match="holds no bin/mindieservice_daemon"):
        find_installation(tmp_path / "conf", {})
    (mindie / "mindie_llm" / "__init__.py").unlink()
    (mindie / "mindie_llm").rename(mindie / "elsewhere")
    with pytest.raises(LaunchError, match=r"finds no mindie_llm.*set_env\.sh"):
        find_installation(mindie, {})


def test_workers_whose_python_lacks_this_package_are_refused(mindie, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    backend = mindie / "bin" / "mindie_llm_backend"
    backend.chmod(0o750)
    backend.write_text(f"#!{python}\n")
    with pytest.raises(LaunchError, match=r"finds no telechat_mindie.*-m pip install /"):
        find_installation(mindie, {})
    backend.write_text("#!/bin/false\n")
    with pytest.raises(LaunchError, match="cannot tell what MindIE's workers would import"):
        find_installation(mindie, {})


# ---- environment ----


def environment_for(base, generation="3.0.0.beta", home=None, shadow=False):
    return daemon_environment(
        base, RunDirectory(Path("/run")), RANK_PORTS, generation=generation, home=home, shadow=shadow
    )


def test_the_environment_of_the_daemon():
    assert environment_for({}) == {
        "MIES_CONFIG_JSON_PATH": "/run/config.json",
        "MINDIE_LLM_FRAMEWORK_BACKEND": "MS",
        "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": "8090",
        "LCAL_IF_PORT": "8129",
        "MINDIE_LOG_TO_STDOUT": "1",
        "MINDIE_LOG_LEVEL": "INFO",
        "PYTHONUNBUFFERED": "1",
        "TELECHAT_MINDIE_LAUNCH": "/run",
    }


def test_only_what_differs_is_set_and_the_users_log_level_stays():
    base = {"MINDIE_LLM_FRAMEWORK_BACKEND": "ATB", "MINDIE_LOG_LEVEL": "DEBUG", "MS_SCHED_HOST": "127.0.0.1"}
    variables = environment_for(base | {"MINDIE_ASYNC_SCHEDULING_ENABLE": "1"})
    assert variables["MINDIE_LLM_FRAMEWORK_BACKEND"] == "MS"
    assert variables["MINDIE_ASYNC_SCHEDULING_ENABLE"] == "0"
    assert not {"MINDIE_LOG_LEVEL", "MS_SCHED_HOST"} & set(variables)


def test_the_shadow_comes_first_on_pythonpath(mindie):
    base = {"PYTHONPATH": f"/a:{SHADOW}:/b"}
    assert environment_for(base, shadow=True)["PYTHONPATH"] == f"{SHADOW}:/a:/b"
    assert environment_for({}, shadow=True)["PYTHONPATH"] == str(SHADOW)
    assert "PYTHONPATH" not in environment_for(base)
    paths = environment_for(base, shadow=True, home=mindie)["PYTHONPATH"].split(":")
    assert paths == [str(SHADOW), f"{mindie}/bin", "/a", "/b"]


def test_search_paths_of_mindie_are_set_where_its_set_env_was_not_sourced(mindie):
    (mindie / "lib" / "grpc").mkdir(parents=True)
    variables = environment_for({"LD_LIBRARY_PATH": "/cann"}, home=mindie)
    assert variables["LD_LIBRARY_PATH"] == f"{mindie}/lib:{mindie}/lib/grpc:/cann"
    assert variables["MINDIE_LLM_HOME_PATH"] == str(mindie)
    sourced = {"LD_LIBRARY_PATH": "/cann", "MINDIE_LLM_HOME_PATH": str(mindie)}
    assert not {"LD_LIBRARY_PATH", "PYTHONPATH", "MINDIE_LLM_HOME_PATH"} & set(environment_for(sourced, home=mindie))


@pytest.mark.parametrize("generation", ["1.0", "2.0"])
def test_the_older_generations(mindie, generation):
    (mindie.parent / "mindie-llm").mkdir()
    variables = environment_for({}, generation, home=mindie)
    assert variables["MIES_INSTALL_PATH"] == str(mindie)
    assert variables["MINDIE_LLM_HOME_PATH"] == str(mindie.parent / "mindie-llm")
    assert ("MINDIE_LLM_PYTHON_LOG_TO_STDOUT" in variables) == (generation == "1.0")


# ---- preparation ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("nano")
    write_checkpoint(root / "ckpt")
    build(root / "model", root / "ckpt")
    return root / "model"


def prepared(model, tmp_path, environment=None, **options):
    launch = LaunchOptions(named=frozenset(options), need_mindie=False, reuse=False)
    options = ServiceOptions(**{"insecure_http": True, **options})
    return prepare(model, options, tmp_path / "runs", environment or {"PATH": ""}, launch)


def test_ports_of_the_ranks_follow_the_environment_and_never_meet(model, tmp_path):
    plan = prepared(model, tmp_path, {"MS_SCHED_PORT": "2500", "LCAL_IF_PORT": "2500"}, port_base=2500).plan
    assert len(set(plan.ports.values())) == 5 and all(2500 <= port < 2600 for port in plan.ports.values())
    assert prepared(model, tmp_path, {"MS_SCHED_PORT": "a lot"}).plan.ports["MS_SCHED_PORT"] >= 8090


@pytest.mark.parametrize("server", ["3", "[]", "null", '{"port": "1025"}'])
def test_a_hollow_template_gives_a_sentence(model, tmp_path, server):
    (tmp_path / "config.json").write_text(f'{{"ServerConfig": {server}}}')
    with pytest.raises(ConfigError, match="lacks an object"):
        prepared(model, tmp_path, template=tmp_path / "config.json")


def test_a_template_keeps_its_ports_while_they_are_free(model, tmp_path):
    template = tmp_path / "config.json"
    config = schema.default_config("3.0.0.beta")
    base = ports.free_run(3000, 6)
    config["ServerConfig"] |= {"port": base + 2, "managementPort": base, "metricsPort": base + 1}
    template.write_text(json.dumps(config))
    plan = prepared(model, tmp_path, template=template).plan
    assert [plan.ports[name] for name in ("port", "managementPort", "metricsPort")] == [base + 2, base, base + 1]
    run = RunDirectory(tmp_path / "runs" / plan.name)
    run.create(plan, "{}")  # as a launch that is starting, it holds them
    again = prepared(model, tmp_path, template=template)
    second = again.plan
    assert "whose model is another" in again.notes[0] and second.cards == (0,)
    assert not set(second.ports.values()) & set(plan.ports.values())
    assert json.loads(template.read_text()) == config


def test_addresses_a_client_on_this_host_uses(model, tmp_path):
    everywhere = ("ServerConfig.allowAllZeroIpListening=true", "ServerConfig.ipAddress=0.0.0.0")
    urls = prepared(model, tmp_path, overrides=everywhere, port_base=2600).plan.urls
    assert urls["business"].startswith("http://127.0.0.1:26") and urls["management"].startswith("http://127.0.0.2:26")
    environment = {"MIES_CONTAINER_IP": "::1"}
    plan = prepared(model, tmp_path, environment, insecure_http=False).plan
    assert plan.urls["business"] == f"https://[::1]:{plan.ports['port']}"


def test_an_address_to_listen_on(model, tmp_path):
    def launch(host, environment=None):
        how = LaunchOptions(host=host, need_mindie=False, reuse=False)
        environment = {"PATH": "", **(environment or {})}
        return prepare(model, ServiceOptions(insecure_http=True), tmp_path / "runs", environment, how)

    everywhere = launch("0.0.0.0")
    server = everywhere.rendered.config["ServerConfig"]
    assert (server["ipAddress"], server["allowAllZeroIpListening"]) == ("0.0.0.0", True)
    assert server["managementIpAddress"] == "127.0.0.2"  # not opened along with it
    assert everywhere.plan.urls["business"] == f"http://127.0.0.1:{server['port']}"
    assert "MIES_CONTAINER_IP" not in everywhere.plan.environment
    named = launch("127.0.0.9", {"MIES_CONTAINER_IP": "10.0.0.1"})
    assert not named.rendered.config["ServerConfig"]["allowAllZeroIpListening"]
    assert named.plan.environment["MIES_CONTAINER_IP"] == "127.0.0.9"  # which would win over the config
    assert named.plan.urls["business"].startswith("http://127.0.0.9:")
    with pytest.raises(InputError, match=r"--host example\.org: is no IP address"):
        launch("example.org")


@pytest.mark.parametrize("name", ["../x", "", "a b", "x" * 300])
def test_a_name_that_is_no_folders(model, tmp_path, name):
    how = LaunchOptions(name=name or "-", need_mindie=False, reuse=False)
    with pytest.raises(InputError, match="is no name for a run"):
        prepare(model, ServiceOptions(insecure_http=True), tmp_path / "runs", {"PATH": ""}, how)


def test_the_names_of_runs_have_one_limit(model, tmp_path, monkeypatch):
    def launch(name=None, overrides=()):
        how = LaunchOptions(name=name, need_mindie=False, reuse=False)
        options = ServiceOptions(insecure_http=True, overrides=overrides)
        return prepare(model, options, tmp_path / "runs", {"PATH": ""}, how).plan.name

    assert launch("x" * 200) == "x" * 200
    with pytest.raises(InputError, match=r"is no name for a run.*at most 200"):
        launch("x" * 201)
    made = launch(overrides=(f"modelName={'m' * 256}",))
    assert len(made) <= 200 and re.fullmatch(r"m{194}-\d+", made)


def test_a_config_is_read_once_before_it_is_rendered_over(model, tmp_path, monkeypatch):
    options = ServiceOptions(insecure_http=True, port_base=2700)
    template = tmp_path / "config.json"
    template.write_text(render_service_config(model_facts(ModelDir.open(model)), options, ports.assume_free).text)
    loaded, load = [], schema.load
    monkeypatch.setattr(schema, "load", lambda path: loaded.append(path) or load(path))
    assert "named by --service-config" in prepared(model, tmp_path, template=template).notes[0]
    assert loaded == [template]


def test_the_config_that_was_rendered_before_is_started_from(model, tmp_path, monkeypatch, mindie):
    """As it stands, but for what the launch names; where it is named itself, or lies at a usual place."""
    monkeypatch.chdir(tmp_path)
    written = tmp_path / "conf" / "config.json"
    written.parent.mkdir()
    options = ServiceOptions(
        device_mem_gb=16, max_seq_len=512, devices="5", insecure_http=True, overrides=("maxLinkNum=77",), port_base=2700
    )
    before = render_service_config(model_facts(ModelDir.open(model)), options, ports.assume_free)
    written.write_text(before.text)

    def launch(template=None, reuse=True, **named):
        asked = ServiceOptions(template=template, mindie_home=mindie, **{"insecure_http": True, **named})
        how = LaunchOptions(named=frozenset(named), reuse=reuse)
        made = prepare(model, asked, tmp_path / "runs", {"PATH": ""}, how)
        return made.rendered.config, made.notes, made.plan.cards

    config, notes, cards = launch()
    for name in ("port", "managementPort", "metricsPort"):  # this machine may have them taken
        config["ServerConfig"][name] = before.config["ServerConfig"][name]
    assert config == before.config and cards == (5,)
    assert notes[0].startswith("config: started from conf/config.json, which was rendered for this directory")
    config, notes, cards = launch(max_input_len=100, devices="6")
    deploy = config["BackendConfig"]["ModelDeployConfig"]
    assert (deploy["maxSeqLen"], deploy["maxInputTokenLen"], cards) == (512, 100, (6,))
    assert "maxInputTokenLen = 100" in notes[1] and "npuDeviceIds = [[6]]" in notes[1]
    config, _, _ = launch(max_seq_len=256)
    assert config["BackendConfig"]["ModelDeployConfig"]["maxInputTokenLen"] == 192
    assert config["BackendConfig"]["ScheduleConfig"]["maxIterTimes"] == 255
    kept = before.config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["npuMemSize"]
    config, _, _ = launch(device_mem_gb=32.0)
    assert config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["npuMemSize"] > kept
    config, notes, _ = launch(reuse=False)
    assert notes[0] == "config: rendered for this launch" and config["ServerConfig"]["maxLinkNum"] == 1000
    assert written.read_text() == before.text
    elsewhere = tmp_path / "other.json"
    written.rename(elsewhere)
    assert launch()[1][0] == "config: rendered for this launch"
    config, notes, _ = launch(template=elsewhere)
    assert notes[0] == f"config: started from {elsewhere}, named by --service-config"
    assert config["ServerConfig"]["maxLinkNum"] == 77
    elsewhere.write_text(before.text.replace(str(model), "/mnt/models/model"))  # as rendered on another machine
    config, notes, _ = launch(template=elsewhere)
    assert config["ServerConfig"]["maxLinkNum"] == 77 and "modelWeightPath = " in notes[1]
    elsewhere.write_text(before.text)
    elsewhere.rename(mindie / "conf" / "config.json")
    assert launch()[1][0].startswith(f"config: started from {mindie}/conf/config.json")
    foreign = before.text.replace(str(model), str(tmp_path))  # of another model directory
    (mindie / "conf" / "config.json").write_text(foreign)
    assert launch()[1][0] == "config: rendered for this launch"


def test_a_cards_memory_is_as_npu_smi_says_unless_named(model, tmp_path, monkeypatch):
    cards = Cards((Card(0, 0, 0, 0, "910B4", "OK", 3000, 32768),))
    monkeypatch.setattr("telechat_mindie.service.launch.prepare.read_cards", lambda _environment: cards)
    small = prepared(model, tmp_path)
    assert small.rendered.options.device_mem_gb == 32 and len(small.notes) == 1
    assert prepared(model, tmp_path, device_mem_gb=64.0).rendered.options.device_mem_gb == 64
    monkeypatch.setattr("telechat_mindie.service.launch.prepare.read_cards", lambda _environment: Cards())
    assert "--device-mem" in prepared(model, tmp_path).notes[1]
    busy = Cards((Card(0, 0, 0, 0, "910B4", "OK", 30000, 32768),))
    monkeypatch.setattr("telechat_mindie.service.launch.prepare.read_cards", lambda _environment: busy)
    assert [finding.id for finding in prepared(model, tmp_path).cards] == ["npu-memory"]


# ---- the log ----


def test_the_log_is_read_by_whole_lines_and_survives_truncation(tmp_path):
    path = tmp_path / "daemon.log"
    tail = LogTail(path)
    assert tail.read() == []
    path.write_bytes("one\ntwo 你".encode()[:-1])
    assert tail.read() == ["one"]
    with path.open("ab") as file:
        file.write("你".encode()[-1:] + b" more\nthree")
    assert tail.read() == ["two 你 more"]
    assert tail.read(final=True) == ["three"]
    path.write_bytes(b"new\n")
    assert tail.read() == ["new"]


def test_the_last_lines_of_a_log_of_many_blocks(tmp_path, monkeypatch):
    """Whatever they are to a block; and of the file no more is read than a few times what they take."""
    path = tmp_path / "daemon.log"
    written = [f"{number} {'x' * (number % 50)}" for number in range(4000)]
    path.write_text("\n".join([*written, "unfinished"]))
    read = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(log_tail, "BLOCK", 100)
    monkeypatch.setattr(log_tail, "open", lambda path, mode: Counting(path, mode), raising=False)
    for count in (0, 1, 3, 100, 3999, 4000, 9000):
        tail = LogTail(path)
        tail.skip_to_last(count)
        kept = written[len(written) - min(count, len(written)) :]
        assert sum(read) <= 4 * len("\n".join([*kept, "unfinished"])) + 400
        assert tail.read(final=True) == [*kept, "unfinished"]
        read.clear()


def test_a_line_cannot_drive_the_terminal():
    assert clean("\x1b[31mred\x1b[0m\a \x1b]0;title\x07\tend\r") == "red 0;title    end"
    assert len(clean("x" * 100_000)) == 4096


# ---- run directories ----


@pytest.fixture
def make_run(tmp_path):
    def make(name, launcher=None, state=None):
        plan = LaunchPlan(
            name, "/m", "3.0.0.beta", ("daemon",), {}, {"port": 2000}, {}, None, "m", launcher or Identity(1, -1)
        )
        run = RunDirectory(tmp_path / name)
        run.create(plan, "{}")
        if state is not None:
            run.write_state(state)
        return run

    return make


def test_a_run_is_written_and_read_back(make_run):
    me = Identity.of(os.getpid())
    state = State(me, Identity(2, -1), 1.5, ("a", "b"), reason="stopped", returncode=-9, removed=("c",))
    run = make_run("m-2000", me, state)
    assert run.state() == state and run.plan().launcher == me and run.is_active()
    assert run.config.stat().st_mode & 0o777 == 0o640


def test_a_run_that_0_2_0_wrote_is_read(make_run):
    run = make_run("m-2000")
    plan = json.loads((run.path / "plan.json").read_text())
    del plan["client"], plan["cards"]
    (run.path / "plan.json").write_text(json.dumps(plan))
    assert run.plan().client == client.OWN_FILES and run.plan().cards == ()


def test_a_run_is_found_by_name_or_as_the_only_one(make_run, tmp_path):
    with pytest.raises(InputError, match="running: none"):
        find_run(tmp_path, None)
    dead = make_run("dead-1", state=State(Identity(1, -1), Identity(1, -1), 0.0, (), reason="ended"))
    live = make_run("live-1", Identity.of(os.getpid()))
    assert [run.is_active() for run in (dead, live)] == [False, True]
    assert find_run(tmp_path, None) == live and find_run(tmp_path, "dead-1") == dead
    make_run("live-2", Identity.of(os.getpid()))
    with pytest.raises(InputError, match=r"live-1, live-2.*Name one"):
        find_run(tmp_path, None)
    with pytest.raises(InputError, match="not the name of a run"):
        find_run(tmp_path, "../dead-1")


def test_damaged_runs_are_passed_over(make_run, tmp_path):
    run = make_run("whole")
    (tmp_path / "stray").mkdir()
    (make_run("no-json").path / "plan.json").write_text("{")
    (make_run("old").path / "plan.json").write_text("{}")
    (make_run("state").path / "state.json").write_text('{"supervisor": 1}')
    assert all_runs(tmp_path) == [run]
    with pytest.raises(ConfigError, match="not what `launch` writes"):
        RunDirectory(tmp_path / "old").plan()


def test_a_run_that_vanishes_meanwhile_is_passed_over(make_run, tmp_path, monkeypatch):
    """Between the moment it is listed and the moment it is asked, and between that and the look at its cards."""
    me = Identity.of(os.getpid())
    first, second, third = (make_run(name, me) for name in ("first", "second", "third"))
    plan = json.loads((third.path / "plan.json").read_text())
    (third.path / "plan.json").write_text(json.dumps(plan | {"cards": [2, 3]}))
    is_active = RunDirectory.is_active

    def vanishing(run):
        if run == first:
            first.remove()
        found = is_active(run)
        if run == second:
            second.remove()
        return found

    monkeypatch.setattr(RunDirectory, "is_active", vanishing)
    assert cards_held(tmp_path) == {2: "third", 3: "third"}
    assert active_runs(tmp_path) == [third]


def test_a_run_that_is_still_being_checked_cannot_be_stopped(make_run):
    run = make_run("m-2000", Identity.of(os.getpid()))
    with pytest.raises(LaunchError, match=rf"not started the daemon yet.*End process {os.getpid()}"):
        stop_run(run)


def test_only_an_earlier_run_is_replaced(make_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(OutputError):
        make_run("mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (make_run("again").path / "daemon.log").touch()
    assert not make_run("again").log.exists()


def test_the_folder_of_all_runs():
    assert state_home({"XDG_STATE_HOME": "/s", "HOME": "/h"}) == Path("/s/telechat-mindie")
    assert state_home({"XDG_STATE_HOME": "relative", "HOME": "/h"}) == Path("/h/.local/state/telechat-mindie")


def test_one_launch_at_a_time_chooses_its_ports(tmp_path):
    with (
        locked(tmp_path / "a" / "b"),
        pytest.raises(InputError, match="another launch"),
        locked(tmp_path / "a" / "b", timeout=0.1),
    ):
        pass


# ---- shared memory ----


def test_only_new_names_with_the_runs_pids_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    for name in ("77_0_execute_request", "sem.77_0_x", "llm_tokenizer_shared_memory_77_3", "770_0", "other", "old_77"):
        (tmp_path / name).touch()
    removed = shared_memory.remove_left({"old_77"}, {77})
    assert removed == ["77_0_execute_request", "llm_tokenizer_shared_memory_77_3", "sem.77_0_x"]
    assert shared_memory.names() == {"770_0", "other", "old_77"}
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    (tmp_path / "78_0").touch()
    assert shared_memory.remove_left((), {78}) == []


# ---- requests ----


@pytest.fixture
def http_server():
    class Handler(http.server.BaseHTTPRequestHandler):
        replies: dict[str, tuple[int, bytes]] = {}  # noqa: RUF012

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            status, body = self.replies[self.path]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler.replies
    server.shutdown()
    server.server_close()


def test_the_completion_comes_without_the_prompt(http_server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which would refuse
    url, replies = http_server
    replies["/generate"] = 200, '{"text": ["你 好  a"]}'.encode()
    assert client.ask(url, "你 好", 5, 5).text == " a"
    replies["/v2/health/ready"] = 200, b""
    assert client.is_healthy(url)
    replies["/v2/health/ready"] = 503, b""
    assert not client.is_healthy(url)


@pytest.mark.parametrize("body", [b"not json", b"[]", b'{"text": []}', b'{"text": [1]}'])
def test_an_answer_of_another_form(http_server, body):
    url, replies = http_server
    replies["/generate"] = 200, body
    with pytest.raises(LaunchError, match="something else than a text"):
        client.ask(url, "x", 5, 5)


def test_nobody_there():
    port = ports.free_run(4000, 1)
    with pytest.raises(LaunchError, match="did not answer"):
        client.ask(f"http://127.0.0.1:{port}", "x", 5, 5)
    assert not client.is_healthy(f"https://127.0.0.1:{port}")


def test_https_without_a_certificate_that_may_be_used(tmp_path):
    with pytest.raises(client.ClientRefusedError, match=r"security/ca/ca\.pem: cannot be used.*--ca-cert"):
        client.tls_context(schema.default_config("3.0.0.beta"), tmp_path, client.OWN_FILES)
    with pytest.raises(client.ClientRefusedError, match=r"security/ca/management_ca\.pem"):
        client.tls_context(schema.default_config("3.0.0.beta"), tmp_path, client.OWN_FILES, "management")
