"""Help, completion, and how much is said: what a user meets before any command has done something."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from helpers import ROOT
from helpers.server import nano_directory
from typer.testing import CliRunner

from telechat_mindie.cli import app
from telechat_mindie.commands import messages
from telechat_mindie.commands.group import PROGRAM
from telechat_mindie.service import schema
from telechat_mindie.service.launch import rundir
from telechat_mindie.service.launch.processes import Identity

SECTIONS = typer.main.get_command(app).sections
NAMES = [name for names in SECTIONS.values() for name in names]
PATHS = [(name,) for name in NAMES] + [("bench", "serve")]


def run(*arguments, **environment):
    command = [sys.executable, "-m", "telechat_mindie", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def context(path):
    """The context of a command, as if it had been asked for help."""
    group = typer.main.get_command(app)
    found = group.make_context(PROGRAM, [*path, "--help"], resilient_parsing=True)
    for name in path:
        command = found.command.get_command(found, name)
        found = command.make_context(name, ["--help"], parent=found, resilient_parsing=True)
    return found


def test_every_module_of_a_command_is_in_the_table():
    modules = {path.stem for path in (ROOT / "telechat_mindie" / "commands").glob("*.py")}
    helpers = {"__init__", "completion", "ending", "findings", "group", "messages", "options", "output"}
    helpers |= {"finetune_options", "finetune_render", "finetune_run", "plan_facts", "service_tls"}
    assert modules - helpers == {name.replace("-", "_") for name in NAMES}


def test_commands_stand_in_the_order_of_the_work():
    said = run("-h").stdout
    places = [said.index(f"\n  {name} ") for name in NAMES]
    assert places == sorted(places) and said.index("nano") < said.index("build") < said.index("launch")
    assert all(f"\n{title}:\n" in said for title in SECTIONS)
    assert "..." not in said.replace("[ARGS]...", ""), "a command's sentence is cut off"


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_of_a_command(path):
    here = context(path)
    said = here.command.get_help(here)
    assert "-h, --help" in said and "-v, --verbose" in said and "-q, --quiet" in said and "--log-level" in said
    if path == ("bench",):
        return
    assert here.command.examples, "a command without an example"
    for example in here.command.examples:
        assert f"\n  {example}" in said  # neither wrapped nor cut
        program, *arguments = shlex.split(example)
        assert program == PROGRAM and arguments[: len(path)] == list(path)
        assert here.command.make_context(path[-1], arguments[len(path) :]).args == []


def test_options_stand_in_sections():
    said = context(("chat",)).command.get_help(context(("chat",)))
    assert said.index("\nSampling:") < said.index("--temperature") < said.index("\nHTTPS:") < said.index("--ca-cert")
    assert said.index("\nOptions:") < said.index("--timeout") < said.index("\nSampling:")


def test_help_of_the_program_is_quick_and_imports_little():
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from telechat_mindie.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'mindspore', 'numpy', 'sentencepiece', 'jinja2', 'rich', 'pydantic', 'yaml', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]" and "Run MindIE" in done.stdout
    # The processor's time, so that a busy machine does not decide; the best of three, at a third of a second.
    seconds = []
    for _ in range(3):
        before = os.times()
        run("--help")
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.33


def test_a_name_that_is_nearly_right():
    done = run("biuld")
    assert done.returncode == 2 and "Did you mean 'build'?" in done.stderr


def complete(words, shell="bash"):
    position = str(len(words.split(" ")) - 1)
    variables = {"COMP_WORDS": words, "COMP_CWORD": position, "_TYPER_COMPLETE_ARGS": words}
    done = run(_TELECHAT_MINDIE_COMPLETE=f"complete_{shell}", _TYPER_COMPLETE_FISH_ACTION="get-args", **variables)
    return done.stdout


def test_the_tab_key(tmp_path):
    assert complete("telechat-mindie ser").split() == ["service-config", "serve"]
    assert complete("telechat-mindie build --dtype b").split() == ["bfloat16"]
    assert complete("telechat-mindie convert a b --to ").split() == ["hf", "llama", "safetensors", "ckpt"]
    assert complete("telechat-mindie plan --variant 3").split() == ["3b", "35b", "39b-a12b"]
    assert complete("telechat-mindie bench serve --ap").split() == ["--api"]
    assert '"bfloat16"' in complete("telechat-mindie build --dtype ", "zsh")
    assert "serve\tServe a model" in complete("telechat-mindie serv", "fish")


def test_the_tab_key_knows_runs(tmp_path):
    urls = {"business": "http://127.0.0.1:1025", "management": "http://127.0.0.1:1026"}
    identity = Identity(1, 1.0)
    plan = rundir.LaunchPlan("nano-1025", "/m", "2.3", ("x",), {}, {}, urls, None, "nano", identity)
    rundir.RunDirectory(tmp_path / "telechat-mindie" / "nano-1025").create(plan, "{}")
    variables = {"COMP_WORDS": "telechat-mindie logs na", "COMP_CWORD": "2", "XDG_STATE_HOME": str(tmp_path)}
    assert run(_TELECHAT_MINDIE_COMPLETE="complete_bash", **variables).stdout.split() == ["nano-1025"]


def test_the_completion_script_works_in_bash(tmp_path):
    program = tmp_path / PROGRAM
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m telechat_mindie "$@"\n')
    program.chmod(0o755)
    script = run("--show-completion", "bash").stdout
    assert "complete -o default -F _telechat_mindie_completion telechat-mindie" in script
    press = "COMP_WORDS=(telechat-mindie exp); COMP_CWORD=1; _telechat_mindie_completion telechat-mindie"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f'{script}\n{press}; echo "${{COMPREPLY[@]}}"'],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "export", done.stderr


def test_completion_is_installed_for_the_shell(tmp_path):
    done = run("--install-completion", "bash", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    script = tmp_path / ".bash_completions" / "telechat-mindie.sh"
    assert "_TELECHAT_MINDIE_COMPLETE" in script.read_text() and str(script) in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ((0, 0, None), "info"),
        ((1, 0, None), "debug"),
        ((3, 0, None), "debug"),
        ((0, 1, None), "warning"),
        ((0, 2, None), "error"),
        ((0, 5, None), "error"),
        ((1, 1, None), "info"),
        ((0, 2, messages.Level.debug), "debug"),
    ],
)
def test_how_much_is_said(options, level, monkeypatch):
    monkeypatch.setattr(messages.logger, "level", messages.LEVELS[messages.Level.info])
    messages.options(*options)
    assert messages.logger.level == messages.LEVELS[messages.Level(level)]


def test_how_much_is_said_by_a_command(monkeypatch, tmp_path):
    """Before the command and behind it; the command's own word wins, and nothing stays set."""
    found = []
    monkeypatch.setattr(rundir, "all_runs", lambda _: found.append(messages.logger.level) or [])
    before = (messages.logger.level, list(messages.logger.handlers))
    for arguments in ("status", "-q status", "status -q", "status --log-level warning", "-q status -v"):
        typer.main.get_command(app).main(arguments.split(), standalone_mode=False)
    assert found == [logging.INFO, logging.WARNING, logging.WARNING, logging.WARNING, logging.DEBUG]
    assert (messages.logger.level, messages.logger.handlers) == before


@pytest.mark.parametrize(("options", "said"), [((), True), (("-q",), True), (("-qq",), False)])
def test_a_command_s_warnings_are_of_the_log(tmp_path, options, said):
    config = schema.default_config("2.0") | {"mine": 1}
    (tmp_path / "c.json").write_text(json.dumps(config))
    arguments = (str(nano_directory()), "--template", str(tmp_path / "c.json"), "--mindie", "2.0", "--insecure-http")
    done = CliRunner().invoke(app, ["service-config", *arguments, *options])
    assert done.exit_code == 0 and ("warning: $.mine: unknown-key" in done.stderr) is said


def test_a_line_of_the_log(capsys):
    line = messages._Line()
    record = logging.LogRecord("telechat_mindie.x", logging.WARNING, "", 0, "slow: %s", ("disk",), None)
    assert line.format(record) == "warning: slow: disk"
    timed = messages._Line("%(asctime)s %(message)s").format(record)
    assert re.fullmatch(r"[-\d]+ [:,\d]+ warning: slow: disk", timed)  # a server's: the time is first in every line
    record.levelno = logging.INFO
    assert line.format(record) == "slow: disk"
    stream = messages._Stderr()
    stream.setFormatter(line)
    stream.emit(record)
    assert capsys.readouterr().err == "slow: disk\n"


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-"])
def test_a_log_that_cannot_be_written_ends_nothing(redirect):
    code = (
        "from telechat_mindie.commands import messages\n"
        "with messages.on_stderr(): messages.logger.warning('lost')\n"
        "print('done')"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n")
