"""What README.md, README_zh.md and docs/ tell a user to type: every line parses, and the first hour runs as written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from helpers import ROOT, stand_in_daemon

from telechat_mindie.cli import app
from telechat_mindie.nano import write_checkpoint

PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("**/*.md")])
PROGRAM = "telechat-mindie"
TO_MINDIE, WITHOUT_NPU = 1, 3
"""Sections of the README whose commands are run."""


def blocks(page: Path) -> list[list[str]]:
    """The commands of each bash block: joined where a backslash continues them, without comments and prompts."""
    found = []
    for block in re.findall(r"^ *```(?:bash|console|sh)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S):
        lines = block.replace("\\\n", " ").splitlines()
        bare = (re.sub(r"\s+#\s.*$", "", line.strip().removeprefix("$ ")) for line in lines)
        found.append([line for line in bare if line and not line.startswith("#")])
    return found


def own_commands() -> list[tuple[str, str]]:
    return [
        (page.relative_to(ROOT).as_posix(), line)
        for page in PAGES
        if page.name != "dev-log.md"  # what was typed at the time
        for block in blocks(page)
        for line in block
        if line.startswith(f"{PROGRAM} ")
    ]


@pytest.mark.parametrize(("page", "line"), own_commands())
def test_every_documented_command_exists_with_its_options(page, line):
    words = shlex.split(line.partition("|")[0].partition(">")[0].replace("...", ""))[1:]
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"{page}: {line}"
        command = command.commands[name]
        context = click.Context(command, parent=context)
    try:  # values are not judged: the files that they name are the reader's
        command.make_parser(context).parse_args(words)
    except click.UsageError as error:
        pytest.fail(f"{page}: {line}: {error.message}")


@pytest.mark.parametrize("page", ["troubleshooting.md", "troubleshooting_zh.md"])
def test_troubleshooting_quotes_messages_that_there_are(page):
    rows = re.findall(r"^\| (.*?) \|.*\|$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M)
    quoted = [text for row in rows for text in re.findall("`(.*?)`", row)]
    assert len(quoted) > 6
    sources = [*(ROOT / "telechat_mindie").rglob("*.py"), *(ROOT / "telechat_mindie").rglob("*.yaml")]
    said = "".join(path.read_text(encoding="utf-8") for path in [*sources, ROOT / "tools" / "venv.sh"])
    for text in quoted:
        for part in re.split(r"\.\.\.|: ", text):  # what differs from case to case, and where it is
            assert part.strip() in said, text


def section(page: str, number: int) -> list[str]:
    """The first bash block of the README's n-th section; both languages have the same sections."""
    parts = (ROOT / page).read_text(encoding="utf-8").split("\n## ")
    block = re.search(r"```bash\n(.*?)```", parts[number], re.S)
    assert block, parts[number][:40]
    lines = (re.sub(r"\s+#\s.*$", "", line) for line in block[1].splitlines())
    return [line for line in lines if line.startswith(f"{PROGRAM} ")]


@pytest.fixture
def first_hour(tmp_path, monkeypatch):
    """A folder with a checkpoint named as in the README, a stand-in for MindIE and nothing else."""
    write_checkpoint(tmp_path / "TeleChat2-7B")
    home = stand_in_daemon.install(tmp_path / "mindie-service")
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "MIES_INSTALL_PATH": str(home),
        "LANG": "C.UTF-8",
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),  # kernels compiled before
    }

    def run(line: str, timeout: float = 120) -> subprocess.CompletedProcess:
        command = ["bash", "-c", line]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout)

    yield run
    run(f"{PROGRAM} stop --all")
    shutil.rmtree(tmp_path / ".local", ignore_errors=True)


def test_both_languages_have_the_same_commands():
    """So that those of one page are run for both."""

    def commands(page: str) -> list[str]:
        text = "".join(re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S))
        return [re.sub(r"\s+#\s.*$", "", line) for line in text.splitlines() if line]

    assert commands("README.md") == commands("README_zh.md")
    assert len(commands("README.md")) > 20
    for number in (TO_MINDIE, WITHOUT_NPU):
        assert section("README.md", number) == section("README_zh.md", number) != []


def test_from_a_checkpoint_to_mindie(first_hour):
    commands = section("README.md", TO_MINDIE)
    names = [line.split()[1] for line in commands]
    assert names[:6] == ["plan", "build", "check", "service-config", "launch", "stop"]
    for line in commands[:5]:
        detached = " --detach" if "launch" in line else ""  # in a terminal it stays in front
        done = first_hour(line + detached)
        # check warns where a machine has no MindIE of a known release, as the stand-in has none
        assert done.returncode in ((0, 1) if " check " in line else (0,)), f"{line}: {done.stdout}{done.stderr}"
    assert "conf/config.json" in done.stdout + done.stderr  # launch says that it starts from what was just rendered
    done = first_hour(commands[5])
    assert done.returncode == 0, done.stderr


def test_without_an_npu(first_hour):
    commands = [line for line in section("README.md", WITHOUT_NPU) if line.split()[1] in ("nano", "build", "generate")]
    assert len(commands) == 3
    for line in commands:
        done = first_hour(line)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    assert "酱油" in done.stdout
