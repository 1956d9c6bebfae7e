"""The service around MindIE's atb: conf/config.json, check, launch and doctor for a directory without MindSpore."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import stand_in_daemon
from helpers.atb import make_atb_directory, make_w8a8_directory, make_w8a8sc_directory

from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.findings import Finding
from telechat_mindie.mindie import ATB, ATB_VARIABLES, BACKEND_VARIABLE, GENERATIONS
from telechat_mindie.model_dir.atb.layout import AtbDir
from telechat_mindie.service import ports, schema
from telechat_mindie.service.check import CheckOptions, check
from telechat_mindie.service.doctor import diagnose
from telechat_mindie.service.doctor.machine import Machine
from telechat_mindie.service.doctor.software import check_mindie
from telechat_mindie.service.facts import atb_facts, generation_for, model_facts
from telechat_mindie.service.launch.environment import daemon_environment
from telechat_mindie.service.launch.errors import LaunchError
from telechat_mindie.service.launch.installation import find_installation
from telechat_mindie.service.launch.prepare import LaunchOptions, Prepared, prepare
from telechat_mindie.service.launch.rundir import RunDirectory
from telechat_mindie.service.options import ModelFacts, ServiceOptions
from telechat_mindie.service.render import RenderedConfig, render_service_config
from telechat_mindie.variants import VARIANTS

SETTINGS = {name: f"/opt/{name.lower()}" for name in ATB_VARIABLES}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made for 512 tokens, and right up to 256."""
    path = tmp_path_factory.mktemp("atb") / "model"
    make_atb_directory(path, base_seqlen=256, training_seqlen=256)
    return path


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("w8a8") / "model"
    make_w8a8_directory(path)
    return path


def render(path: Path, generation: str = "3.0", **options: Any) -> RenderedConfig:
    facts = model_facts(AtbDir.open(path), options.get("devices"), options.get("instances", 1))
    chosen = ServiceOptions(generation=generation, insecure_http=True, **options)
    return render_service_config(facts, chosen, ports.assume_free)


def entry(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
    return found


@pytest.mark.parametrize("generation", ["3.0.0.beta", "3.0"])
def test_a_config_that_the_generation_takes(plain: Path, generation: str) -> None:
    rendered = render(plain, generation)
    assert schema.validate(rendered.config, generation) == []
    model = entry(rendered.config)
    assert model["backendType"] == "atb" and model["npuMemSize"] == -1 and model["trustRemoteCode"] is False
    assert model["modelWeightPath"] == str(plain) and model["worldSize"] == 1
    assert rendered.config["BackendConfig"]["ModelDeployConfig"]["maxSeqLen"] == 256
    assert rendered.config["BackendConfig"]["ScheduleConfig"]["cacheBlockSize"] == 128
    assert rendered.warnings == ()


NEW_IN_3_0 = (
    "ScheduleConfig.maxN=8",
    "maxJsonDepth=20",
    "ScheduleConfig.maxBatchSize=8192",
    "truncation=-1",
)


def test_the_keys_of_3_0(plain: Path) -> None:
    """Taken by 3.0; the same file is refused by the generation before it, or warned of."""
    rendered = render(plain, overrides=NEW_IN_3_0)
    assert schema.validate(rendered.config, "3.0") == []
    config = rendered.config
    config["BackendConfig"]["kvPoolConfig"]["asyncWrite"] = True
    assert schema.validate(config, "3.0") == []
    assert config["EnableDynamicAdjustTimeoutConfig"] is False
    before = {violation.path.rpartition(".")[2] for violation in schema.validate(config, "3.0.0.beta")}
    assert {"maxN", "maxJsonDepth", "asyncWrite", "maxBatchSize", "truncation"} <= before


def test_cards_are_chosen_when_it_is_served(plain: Path) -> None:
    assert entry(render(plain, devices="0-1").config)["worldSize"] == 2
    two = render(plain, devices="0-3", instances=2).config
    assert entry(two)["worldSize"] == 2 and two["BackendConfig"]["npuDeviceIds"] == [[0, 1], [2, 3]]
    for devices in ("0-2", "0-3"):  # 2 heads for keys and values
        with pytest.raises(InputError, match="expected 1, 2 an instance"):
            render(plain, devices=devices)


def test_a_length_that_is_computed_wrong_is_said(plain: Path) -> None:
    (warned,) = render(plain, max_seq_len=512).warnings
    assert warned.rule == "plain-length" and "256" in str(warned) and "NTK" in str(warned)
    assert render(plain, max_seq_len=256).warnings == ()
    with pytest.raises(InputError, match="expected 2 to 512"):
        render(plain, max_seq_len=513)


@pytest.mark.parametrize("generation", [name for name, row in GENERATIONS.items() if not row.is_public])
def test_generations_whose_atb_nobody_can_read(plain: Path, generation: str) -> None:
    with pytest.raises(InputError, match=r"not known to load TeleChat2.*3\.0\.0\.beta or 3\.0"):
        render(plain, generation)


def test_ms_is_refused_with_the_way(plain: Path) -> None:
    facts = ModelFacts("m", "/m", 1, 512, 128, 1 << 30, 1 << 10, 512)
    with pytest.raises(ConfigError, match=r"no MindSpore backend.*build MODEL_PATH --checkpoint DIR --backend atb"):
        render_service_config(facts, ServiceOptions(generation="3.0", insecure_http=True), ports.assume_free)


@pytest.mark.parametrize("label", ["7b", "35b", "115b"])
def test_every_legal_number_of_cards(label: str, tmp_path: Path) -> None:
    """The shapes without their weights: what a card holds falls with every card, and the cache grows."""
    config = VARIANTS[label]
    from telechat_mindie.checkpoint.formats.tensors import StoredTensor
    from telechat_mindie.checkpoint.mapping import weights

    tensors = {name: StoredTensor(name, "float16", weight.shape, ()) for name, weight in weights(config).items()}
    directory = AtbDir(tmp_path, config, {}, {}, tensors)
    assert directory.allowed_tp == {"7b": (1, 2, 4, 8, 16, 32), "35b": (1, 2, 4, 8, 16), "115b": (1, 2, 4, 8)}[label]
    held, sequences = [], []
    for tp in directory.allowed_tp:
        facts = atb_facts(directory, tp)
        held.append(facts.weight_bytes_per_rank)
        assert facts.kv_bytes_per_token_per_rank == config.kv_bytes_per_token("float16", tp)
        options = ServiceOptions(generation="3.0", insecure_http=True, device_mem_gb=1024, devices=f"0-{tp - 1}")
        rendered = render_service_config(facts, options, ports.assume_free).config
        assert schema.validate(rendered, "3.0") == [] and entry(rendered)["worldSize"] == tp
        sequences.append(rendered["BackendConfig"]["ScheduleConfig"]["maxBatchSize"])
    assert held == sorted(held, reverse=True) and len(set(held)) == len(held)
    assert sequences == sorted(sequences)
    with pytest.raises(InputError, match="cannot be shared"):
        model_facts(directory, f"0-{2 * config.num_kv_heads - 1}")


# check


@pytest.fixture
def served(plain: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy with a config."""
    path = Path(shutil.copytree(plain, tmp_path / "model"))
    file = tmp_path / "conf.json"
    file.write_text(render(path, devices="0-1", port_base=31025, device_mem_gb=64).text)
    file.chmod(0o640)
    return path, file


def checked(path: Path, file: Path | None, environment: dict[str, str] | None = None, **options: Any) -> list[Finding]:
    chosen = CheckOptions(
        service_config=file,
        generation=options.pop("generation", "3.0"),
        device_mem_gb=64,
        environment={"PATH": ""} | (environment or {}),
        **options,
    )
    return [item for item in check(path, chosen).findings if item.severity != "ok"]


def test_check_finds_nothing(served: tuple[Path, Path]) -> None:
    assert checked(*served) == []
    assert checked(served[0], None) == []
    assert checked(*served, environment={"MS_ROLE": "MS_WORKER"}) == []  # nothing of atb's reads it


@pytest.mark.parametrize(
    ("change", "id", "severity", "says"),
    [
        (lambda c: entry(c).update(backendType="torch"), "backend-type", "error", 'Set it to "atb".'),
        (lambda c: entry(c).update(worldSize=4), "tp", "error", "shared by 1, 2 cards"),
        (lambda c: c["BackendConfig"]["ModelDeployConfig"].update(maxSeqLen=512), "plain-length", "warning", "256"),
        (lambda c: c["BackendConfig"]["ModelDeployConfig"].update(maxSeqLen=513), "model-length", "error", "512"),
        (lambda c: entry(c).update(npuMemSize=65), "memory", "error", "do not fit a card of 64 GB"),
    ],
)
def test_check_of_a_config(
    served: tuple[Path, Path], change: Callable[[dict[str, Any]], None], id: str, severity: str, says: str
) -> None:
    path, file = served
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    item = next(item for item in checked(path, file) if item.id == id)
    assert item.severity == severity and says in f"{item.message} {item.advice}"


def test_check_of_ms_on_3_0(served: tuple[Path, Path]) -> None:
    path, file = served
    config = json.loads(file.read_text())
    entry(config)["backendType"] = "ms"
    file.write_text(json.dumps(config))
    ms = next(item for item in checked(path, file) if item.id == "ms-backend")
    assert "build MODEL_PATH --checkpoint DIR --backend atb" in ms.advice


def test_the_variable_of_ms_is_refused(served: tuple[Path, Path]) -> None:
    (only,) = checked(*served, environment={BACKEND_VARIABLE: "MS"}, generation="3.0")
    assert only.id == "framework-backend" and only.advice == f"unset {BACKEND_VARIABLE}"
    assert checked(*served, environment={BACKEND_VARIABLE: "ATB"}) == []


def test_check_for_a_generation_whose_atb_nobody_can_read(quantised: Path) -> None:
    (only,) = checked(quantised, None, generation="2.3")
    assert (only.id, only.severity) == ("atb-generation", "warning") and "MindIE 2.3 is not known" in only.message


def test_the_generation_where_none_is_named(plain: Path, quantised: Path) -> None:
    assert generation_for(plain) == "3.0.0.beta" and generation_for(quantised) == "3.0"


def test_w8a8sc_is_served_with_its_own_number_of_cards(tmp_path: Path) -> None:
    make_w8a8sc_directory(tmp_path / "model", tp=2)
    assert entry(render(tmp_path / "model").config)["worldSize"] == 2
    with pytest.raises(InputError, match="expected 2 an instance"):
        render(tmp_path / "model", devices="0")


# launch


@pytest.fixture
def mindie(tmp_path: Path) -> Path:
    """A MindIE 3.0.0 with what its atb needs."""
    home = stand_in_daemon.install(tmp_path / "mindie", ms_wrapper=False)
    (home / "version.info").write_text("MindIE-LLM Version : 3.0.0\n")
    (home / "mindie_llm" / "modeling" / "model_wrapper" / "atb").mkdir()
    for name in ("atb_llm", "torch", "torch_npu"):
        (home / name).mkdir()
        (home / name / "__init__.py").write_text("raise SystemExit('it was imported')")
    return home


def test_an_installation_for_atb(mindie: Path) -> None:
    found = find_installation(mindie, SETTINGS, ATB)
    assert found.generation == "3.0" and found.version == "3.0.0"
    with pytest.raises(LaunchError, match=r"no MindSpore backend.*--backend atb"):
        find_installation(mindie, SETTINGS)


def test_what_atb_lacks_is_named(mindie: Path) -> None:
    with pytest.raises(LaunchError, match=r"no ATB_SPEED_HOME_PATH.*atb-models/set_env\.sh"):
        find_installation(mindie, {"ATB_HOME_PATH": "/opt"}, ATB)
    shutil.rmtree(mindie / "torch_npu")
    with pytest.raises(LaunchError, match=r"finds no torch_npu.*pip install torch-npu"):
        find_installation(mindie, SETTINGS, ATB)
    shutil.rmtree(mindie / "atb_llm")
    with pytest.raises(LaunchError, match="no atb_llm"):
        find_installation(mindie, SETTINGS, ATB)
    (mindie / "mindie_llm" / "modeling" / "model_wrapper" / "atb").rmdir()
    with pytest.raises(LaunchError, match="has no atb backend"):
        find_installation(mindie, SETTINGS, ATB)


def test_the_daemons_environment(mindie: Path) -> None:
    variables = daemon_environment(
        {"MINDIE_ASYNC_SCHEDULING_ENABLE": "1"},
        RunDirectory(Path("/run")),
        {},
        generation="3.0",
        home=mindie,
        shadow=True,
        backend=ATB,
    )
    assert not {BACKEND_VARIABLE, "MS_SCHED_HOST", "MS_SCHED_PORT", "LCAL_IF_PORT"} & set(variables)
    assert "MINDIE_ASYNC_SCHEDULING_ENABLE" not in variables and "shadow" not in variables["PYTHONPATH"]
    assert variables["MINDIE_LLM_HOME_PATH"] == str(mindie) and "MIES_INSTALL_PATH" not in variables


def prepared(path: Path, tmp_path: Path, mindie: Path, **options: Any) -> Prepared:
    asked = ServiceOptions(mindie_home=mindie, insecure_http=True, **options)
    how = LaunchOptions(named=frozenset(options))
    return prepare(path, asked, tmp_path / "runs", {"PATH": "", **SETTINGS}, how)


def test_a_launch_that_could_start(quantised: Path, mindie: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    made = prepared(quantised, tmp_path, mindie, devices="2,3")
    assert entry(made.rendered.config)["backendType"] == "atb" and entry(made.rendered.config)["worldSize"] == 2
    assert made.plan.generation == "3.0" and made.plan.cards == (2, 3)
    assert set(made.plan.ports) == {"port", "managementPort", "metricsPort"}
    written = tmp_path / "conf" / "config.json"
    written.parent.mkdir()
    written.write_text(made.rendered.text)
    again = prepared(quantised, tmp_path, mindie)
    assert again.notes[0].startswith("config: started from conf/config.json")
    assert entry(again.rendered.config)["worldSize"] == 2 and again.plan.cards == (2, 3)


# doctor


def machine(root: Path, environment: dict[str, str]) -> Machine:
    return Machine(root=root, environment={"PATH": "", **environment}, search_path=(str(root),), timeout=1)


def test_doctor_for_atb(mindie: Path) -> None:
    report = diagnose(machine(mindie, SETTINGS), ATB)
    assert not {finding.id for finding in report.findings} & {"mindspore", "mindformers", "ms-wrapper"}
    named = {finding.id: finding.severity for finding in report.findings}
    assert named["mindie"] == named["atb"] == named["atb-environment"] == "ok"
    shutil.rmtree(mindie / "atb_llm")
    (mindie / "version.info").write_text("MindIE-LLM Version : 2.3.0\n")
    found = [
        item for item in diagnose(machine(mindie, {}), ATB).findings if item.id in ("mindie", "atb", "atb-environment")
    ]
    wrong = {item.where for item in found if item.severity == "error"}
    assert wrong == {"atb_llm", *ATB_VARIABLES}
    shutil.rmtree(mindie / "mindie_llm" / "modeling" / "model_wrapper" / "atb")
    found = list(diagnose(machine(mindie, {}), ATB).findings)
    assert any(item.id == "mindie" and "has no modeling/model_wrapper/atb" in item.message for item in found)


def test_doctor_of_ms_names_the_way(mindie: Path) -> None:
    wrapper = next(item for item in check_mindie(machine(mindie, {})) if item.id == "ms-wrapper")
    assert "--backend atb" in wrapper.advice and "doctor --mindie 3.0" in wrapper.advice
