"""The one reader of npu-smi, and what is said of the cards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.checkpoints import make_checkpoint
from typer.testing import CliRunner

from telechat_mindie.cli import app
from telechat_mindie.findings import Report
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.service import schema
from telechat_mindie.service.card_rules import card_memory, check_card, check_devices, check_mask, check_toolkit
from telechat_mindie.service.cards import Card, Cards, Process, device_files, parse_npu_smi, read_cards, trouble_in
from telechat_mindie.service.check import CheckOptions, check, check_config
from telechat_mindie.service.facts import model_facts
from telechat_mindie.service.launch.prepare import LaunchOptions, prepare
from telechat_mindie.service.options import ServiceOptions

HBM = """\
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip{phy:<22}| Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
"""


def table(*rows: tuple[int, int, int | str, str, int, int], health: str = "OK", processes: str = "") -> str:
    """`npu-smi info` for (NPU, chip, Phy-ID or "", name, MB in use, MB)."""
    text = HBM.format(phy="  Phy-ID" if rows[0][2] != "" else "")
    for npu, chip, phy, name, used, total in rows:
        text += f"| {npu:<6}{name:<20}| {health:<14}| 178.8       36                0    / 0             |\n"
        text += f"| {chip:<6}{phy:<20}| 0000:9D:00.0  | 0           0    / 0          {used:<5}/ {total:<13}|\n"
        text += "+===========================+===============+====================================================+\n"
    return text + processes


PROCESSES = """\
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
| 1       0                 | 518867        | mindieservice_b          | 27474                   |
"""

TWO_CHIPS = table(
    (0, 0, 0, "Ascend910", 3397, 65536),
    (0, 1, 1, "Ascend910", 3186, 65536),
    (1, 0, 2, "Ascend910", 3425, 65536),
    (1, 1, 3, "Ascend910", 43186, 65536),
)
CONTAINER = table((4, 0, "", "910B4", 2832, 32768), (5, 0, "", "910B4", 2840, 32768))


def cards_of(text: str, mask: tuple[int, ...] | None = None) -> Cards:
    return Cards(tuple(parse_npu_smi(text)), mask=mask)


def ids(findings) -> list[str]:
    return [finding.id for finding in findings]


# ---- the real tables ----


def test_a_910c_has_two_chips_a_module(shared):
    cards = cards_of((shared("field/npu-smi/910C_24.1.rc3.7.txt")).read_text())
    assert [(card.device, card.npu, card.chip, card.phy_id) for card in cards.cards] == [
        (0, 0, 0, 0),
        (1, 0, 1, 1),
        (2, 1, 0, 2),
        (3, 1, 1, 3),
    ]
    assert [(card.used, card.total) for card in cards.cards][::3] == [(3397, 65536), (43186, 65536)]
    (busy,) = check_devices(cards, range(4), "bfloat16")
    assert (busy.id, busy.where) == ("npu-memory", "device 3 (NPU 1 chip 1)") and cards.memory_gb([0]) == 64


def test_the_boards_of_a_300i_duo_are_numbered_apart(shared):
    cards = cards_of((shared("field/npu-smi/310P3_duo_25.2.1.txt")).read_text())
    assert [(card.device, card.npu, card.phy_id, card.name) for card in cards.cards] == [
        (0, 0, 0, "310P3"),
        (1, 32, 1, "310P3"),
        (2, 32768, 2, "310P3"),
    ]
    assert [card.is_busy for card in cards.cards] == [True, False, True]
    assert cards.memory_gb() == 21
    assert ids(check_devices(cards, [1], "bfloat16")) == ["npu-chip", "npu-dtype"]


def test_processes_of_a_910b4_are_named(shared):
    cards = cards_of((shared("field/npu-smi/910B4_procs_24.1.rc2.txt")).read_text())
    assert [card.processes for card in cards.cards] == [
        (Process(518867, "mindieservice_b", 27474),),
        (Process(518874, "mindieservice_b", 27474),),
    ]
    assert [str(card) for card in cards.cards] == ["device 0 (NPU 0 chip 0)", "device 1 (NPU 7 chip 0, davinci7)"]
    assert cards.memory_gb() == 32 and "518874" in next(check_devices(cards, [1], "float16")).message


def test_a_container_whose_card_another_one_holds(shared):
    said = (shared("field/npu-smi/container_8020.txt")).read_text()
    assert parse_npu_smi(said) == []
    trouble = trouble_in(said)
    assert "ret is -8020" in trouble.message and "another container" in trouble.message
    assert "reinstall" not in trouble.advice


# ---- tables of the same kinds, made here ----


def test_a_device_counts_chips_and_not_boards():
    cards = cards_of(TWO_CHIPS)
    assert [str(card) for card in cards.cards][2:] == ["device 2 (NPU 1 chip 0)", "device 3 (NPU 1 chip 1)"]
    assert ids(check_devices(cards, [0, 1, 2], "bfloat16")) == []
    assert [finding.where for finding in check_devices(cards, [2, 3], "bfloat16")] == ["device 3 (NPU 1 chip 1)"]


def test_a_container_counts_its_own_cards():
    cards = cards_of(CONTAINER)
    assert [str(card) for card in cards.cards] == [
        "device 0 (NPU 4 chip 0, davinci4)",
        "device 1 (NPU 5 chip 0, davinci5)",
    ]
    assert ids(check_devices(cards, [0, 1], "bfloat16")) == []
    (absent,) = check_devices(cards, [4], "bfloat16")
    assert (absent.id, absent.severity) == ("npu-absent", "error") and "device 0 (NPU 4" in absent.message


def test_the_mask_renumbers_the_cards():
    cards = cards_of(TWO_CHIPS, mask=(1, 3))
    assert [cards.unmasked(device) for device in (0, 1, 2)] == [1, 3, 2]
    assert cards.card(1) == cards.cards[3] and cards.card(2) is None
    assert [finding.where for finding in check_devices(cards, [0, 1], "bfloat16")] == ["device 3 (NPU 1 chip 1)"]
    (absent,) = check_devices(cards, [2], "bfloat16")
    assert "ASCEND_RT_VISIBLE_DEVICES shows 1,3" in absent.message


@pytest.mark.parametrize(
    ("mask", "advice"), [((1, 0), "=0,1"), ((0, 0), "=0"), ((6,), "from 0"), ((2, 1, 9), "=1,2,9")]
)
def test_a_mask_that_cann_refuses(mask, advice):
    found = list(check_mask(cards_of(TWO_CHIPS, mask=mask)))
    assert {(finding.id, finding.severity) for finding in found} == {("visible-devices", "error")}
    assert advice in found[0].advice


def test_a_mask_is_not_judged_by_cards_that_are_not_known():
    assert list(check_mask(Cards(mask=(6,)))) == [] == list(check_mask(cards_of(TWO_CHIPS)))


@pytest.mark.parametrize("text", ["", "0,", "all", "-1", "9" * 5000])
def test_a_mask_that_lists_no_numbers(text, tmp_path):
    environment = {"PATH": "", "ASCEND_RT_VISIBLE_DEVICES": text}
    assert read_cards(environment, root=tmp_path).mask is None


def test_another_launch_on_the_card_is_named():
    cards = cards_of(TWO_CHIPS, mask=(1, 3))
    held = {3: "telechat-1025"}
    (found,) = check_devices(cards, [0, 1], "float16", held)
    assert found.id == "npu-held" and "telechat-1025" in found.message and found.where == "device 3 (NPU 1 chip 1)"
    (unknown,) = check_devices(Cards(), [2, 3], "float16", held)  # no npu-smi is needed for that
    assert unknown.where == "device 3"


def test_a_process_makes_a_card_busy_whatever_its_memory():
    cards = cards_of(table((0, 0, "", "910B4", 100, 32768), (1, 0, "", "910B4", 100, 32768), processes=PROCESSES))
    assert [card.is_busy for card in cards.cards] == [False, True]
    assert cards.cards[1].processes == (Process(518867, "mindieservice_b", 27474),)


@pytest.mark.parametrize(
    ("name", "refused"),
    [("310P3", True), ("910ProB", True), ("910A", True), ("910B4", False), ("910B4-1", False), ("Ascend910", False)],
)
def test_chips_that_are_refused(name, refused):
    cards = cards_of(table((0, 0, "", name, 100, 32768)))
    found = {finding.id: finding for finding in check_devices(cards, [0], "bfloat16")}
    assert set(found) == ({"npu-chip", "npu-dtype"} if refused else set())
    assert all(finding.severity == "error" and "A2" in finding.advice for finding in found.values())
    assert ids(check_devices(cards, [0], "float16")) == (["npu-chip"] if refused else [])
    assert ids(check_card(cards.cards[0])) == (["npu-chip"] if refused else ["npu"])


@pytest.mark.parametrize(
    ("health", "severity"), [("OK", "ok"), ("Warning", "warning"), ("Alarm", "warning"), ("Critical", "error")]
)
def test_health(health, severity):
    (card,) = parse_npu_smi(table((0, 0, 0, "910B4", 100, 32768), health=health))
    (found,) = check_card(card)
    assert found.severity == severity and (severity == "ok" or health in found.message)


# ---- memory ----


def test_the_memory_is_of_the_smallest_card_that_is_used():
    cards = cards_of(table((0, 0, "", "910B4", 100, 32768), (1, 0, "", "910B3", 100, 65536)))
    assert (cards.memory_gb(), cards.memory_gb([1]), cards.memory_gb([1, 9]), cards.memory_gb([9])) == (32, 64, 64, 32)
    assert card_memory(cards, [1]) == (64, None)


def test_64_gb_only_where_nothing_is_known_and_it_is_said():
    trouble = trouble_in("ret is -8020")
    for cards in (Cards(), Cards(trouble=trouble), cards_of(table((0, 0, "", "910B4", 0, 0)))):
        gb, said = card_memory(cards)
        assert gb == 64 and "64 GB are assumed" in said and "--device-mem" in said
    assert "ret is -8020" in card_memory(Cards(trouble=trouble))[1]


# ---- running it ----


def npu_smi(folder: Path, script: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "npu-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npu-smi").chmod(0o755)


@pytest.mark.parametrize("folder", ["usr/local/sbin", "usr/local/bin", "somewhere"])
def test_it_is_found_beside_path_too(tmp_path, folder):
    (tmp_path / "table").write_text(TWO_CHIPS)
    npu_smi(tmp_path / folder, f'[ "$*" = info ] && /bin/cat {tmp_path}/table; exit 255')  # a table is a table
    cards = read_cards({"PATH": str(tmp_path / "somewhere")}, root=tmp_path)
    assert len(cards.cards) == 4 and cards.trouble is None


def test_missing_broken_and_silent_are_said_apart(tmp_path):
    missing = read_cards({"PATH": ""}, root=tmp_path).trouble
    assert missing.id == "npu-smi-missing" and "neither on PATH nor in /usr/local/sbin" in missing.message
    folder = tmp_path / "usr/local/bin"
    npu_smi(folder, "echo 'npu-smi: error while loading shared libraries: libc_sec.so: cannot open shared object' >&2")
    broken = read_cards({}, root=tmp_path).trouble
    assert broken.id == "npu-smi" and "libc_sec.so" in broken.message and "LD_LIBRARY_PATH" in broken.advice
    npu_smi(folder, "")
    assert "says nothing" in read_cards({}, root=tmp_path).trouble.message
    (folder / "npu-smi").write_bytes(b"\x7fELF of another machine")
    assert read_cards({}, root=tmp_path).trouble.id == "npu-smi"
    (folder / "npu-smi").chmod(0o644)
    assert "may not run it" in read_cards({}, root=tmp_path).trouble.message


def test_a_driver_that_hangs_costs_the_timeout(tmp_path):
    npu_smi(tmp_path / "usr/local/bin", "/bin/sleep 30 & echo begun; /bin/sleep 30")  # a child keeps its output open
    begin = time.monotonic()
    trouble = read_cards({}, root=tmp_path, timeout=0.3).trouble
    assert "0.3 s" in trouble.message and time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (-8005, "--privileged"),
        (-8020, "docker ps"),
        (-8002, "HwHiAiUser"),
        (-8012, "Wait"),
        (-80050, "dmesg"),
        (-1, "reinstall"),
    ],
)
def test_npu_smis_own_codes(code, advice):
    trouble = trouble_in(f"DrvMngGetConsoleLogLevel failed.\ndcmi module initialize failed. ret is {code}\n")
    assert f"ret is {code}" in trouble.message and advice in trouble.advice


def test_its_words_cannot_drive_the_terminal_or_fill_it():
    message = trouble_in("\x1b[31m" + "x" * 100_000 + "\n" + "y\n" * 100).message
    assert "\x1b" not in message and len(message) < 500


# ---- service-config and check ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A bfloat16 directory of one rank."""
    root = tmp_path_factory.mktemp("cards")
    make_checkpoint(root / "ckpt", "bfloat16")
    build(root / "telechat2", root / "ckpt", BuildOptions(block_size=16))
    return root / "telechat2"


@pytest.fixture
def command(model, tmp_path):
    """Runs one with the model directory where npu-smi prints the given table."""

    def run(name: str, text: str, *options: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "table").write_text(text)
        npu_smi(tmp_path / "bin", f"echo asked >> {tmp_path}/asked; /bin/cat {tmp_path}/table")
        return subprocess.run(
            [sys.executable, "-m", "telechat_mindie", name, str(model), *options],
            capture_output=True,
            text=True,
            timeout=120,
            env={"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)},
        )

    return run


def npu_mem_size(done: subprocess.CompletedProcess[str]) -> int:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["npuMemSize"]


HTTP = ("--insecure-http", "--port-base", "23035")


def test_service_config_takes_the_memory_of_the_cards(command, tmp_path):
    mixed = table((0, 0, "", "910B4", 100, 32768), (1, 0, "", "910B3", 100, 65536))
    done = command("service-config", mixed, *HTTP)
    assert (npu_mem_size(done), done.stderr) == (25, "")  # 32 - a fifth
    assert (tmp_path / "asked").read_text() == "asked\n"
    assert npu_mem_size(command("service-config", mixed, *HTTP, "--devices", "1")) == 51
    assert npu_mem_size(command("service-config", mixed, *HTTP, "--device-mem", "16")) == 12
    unknown = command("service-config", "dcmi module initialize failed. ret is -8005", *HTTP)
    assert npu_mem_size(unknown) == 51 and "64 GB are assumed" in unknown.stderr and "-8005" in unknown.stderr


def test_service_config_warns_of_the_cards_that_it_names(command):
    assert command("service-config", TWO_CHIPS, *HTTP).stderr == ""
    busy = command("service-config", TWO_CHIPS, *HTTP, "--devices", "3")
    assert busy.returncode == 0 and "warning: device 3 (NPU 1 chip 1): Ascend910, 65536 MB, 43186 in use" in busy.stderr
    refused = command("service-config", table((0, 0, 0, "310P3", 100, 44280)), *HTTP)
    assert refused.returncode == 0 and "knows no bfloat16" in refused.stderr and "Atlas 800I A2" in refused.stderr


def test_service_config_and_check_measure_the_same_cards(command, model, tmp_path):
    """On a machine with cards of 32 and of 64 GB, and npu-smi is asked only where its answer counts."""
    mixed = table((0, 0, "", "910B4", 100, 32768), (1, 0, "", "910B3", 100, 65536))
    file, asked = tmp_path / "conf.json", tmp_path / "asked"
    done = command("service-config", mixed, *HTTP, "--devices", "1", "-o", str(file))
    assert done.returncode == 0, done.stderr
    asked.unlink()
    config, facts = schema.load(file), model_facts(ModelDir.open(model))
    options = CheckOptions(environment={"PATH": str(tmp_path / "bin")})

    def found(options: CheckOptions) -> list[str]:
        return [found.message for found in check_config(config, file, facts, options) if found.id == "memory"]

    assert found(options) == []
    config["BackendConfig"]["npuDeviceIds"] = [[0]]
    (message,) = found(options)
    assert "do not fit a card of 32 GB" in message and asked.read_text() == "asked\n" * 2
    asked.unlink()
    assert found(replace(options, device_mem_gb=64)) == []
    check(tmp_path / "none", options)
    assert not asked.exists()


def test_check_leaves_the_cards_to_the_config(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "telechat_mindie.service.check.check", lambda path, options, start: asked.append(options) or Report(())
    )
    runner = CliRunner()
    for options in ([], ["--device-mem", "16"]):
        assert runner.invoke(app, ["check", "somewhere", *options]).exit_code == 0
    assert [options.device_mem_gb for options in asked] == [None, 16]


# ---- launch ----


def launched(model, tmp_path, **environment: str):
    how = LaunchOptions(need_mindie=False, reuse=False)
    return prepare(model, ServiceOptions(insecure_http=True), tmp_path / "runs", {"PATH": "", **environment}, how).cards


def test_launch_demands_the_toolkit_where_there_are_cards(model, tmp_path, monkeypatch):
    assert launched(model, tmp_path) == ()
    monkeypatch.setattr("telechat_mindie.service.card_rules.device_files", lambda root: [0])
    (found,) = launched(model, tmp_path)
    assert (found.id, found.severity) == ("cann-home", "error") and "set_env.sh" in found.advice
    assert ids(launched(model, tmp_path, ASCEND_HOME_PATH=str(tmp_path / "gone"))) == ["cann-home"]
    assert launched(model, tmp_path, ASCEND_HOME_PATH=str(tmp_path)) == ()


def test_launch_refuses_a_chip_and_a_dtype(model, tmp_path, monkeypatch):
    seen = cards_of(table((0, 0, 0, "310P3", 100, 44280)))
    monkeypatch.setattr("telechat_mindie.service.launch.prepare.read_cards", lambda _environment: seen)
    assert ids(launched(model, tmp_path)) == ["npu-chip", "npu-dtype"]


# ---- odd tables ----


def test_other_output_is_no_table():
    assert parse_npu_smi("") == [] == parse_npu_smi("| a | b | c |\n| 1 | 2 |\n|||||\n" * 3)
    digits = "9" * 5000
    assert parse_npu_smi(f"| {digits} x | OK | 1 |\n| 1 1 | 2 | x | {digits} |\n") == []
    half = TWO_CHIPS.partition("0000:9D")[0]
    assert parse_npu_smi(half) == []


def test_device_files(tmp_path):
    assert device_files(tmp_path) == []
    for name in ("davinci1", "davinci0", "davinci_manager", "davinci10"):
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / name).touch()
    assert device_files(tmp_path) == [0, 1, 10]
    assert ids(check_toolkit({}, tmp_path)) == ["cann-home"] and list(check_toolkit({}, tmp_path / "dev")) == []


def test_a_card_is_named_by_all_its_numbers():
    assert str(Card(2, 1, 0, 6, "910B4", "OK", 1, 2)) == "device 2 (NPU 1 chip 0, davinci6)"
