"""How commands end: at signals, in odd surroundings, and at faults of the program's own; one line, and no traceback."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.server import nano_directory

from telechat_mindie import staging
from telechat_mindie.nano import write_checkpoint
from telechat_mindie.service.launch.processes import Identity
from telechat_mindie.service.launch.rundir import LaunchPlan, RunDirectory

PYTHON = (sys.executable, "-c")
PROGRAM = (sys.executable, "-m", "telechat_mindie")


def run(*command, **options):
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run([str(word) for word in command], **options)


def command_of(body):
    """A process whose command is `body`; it prints `ready` where it may be interrupted."""
    code = "from telechat_mindie.commands.ending import run\ndef command():\n"
    return [*PYTHON, code + textwrap.indent(textwrap.dedent(body), "    ") + "\nrun(command)\n"]


def interrupted(body, number, **options):
    """(exit code, stdout, stderr) of a command that gets a signal once it says `ready`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    default = {signal.SIGINT: signal.default_int_handler}.get(number, signal.SIG_DFL)
    with subprocess.Popen(
        command_of(body), preexec_fn=lambda: signal.signal(number, default), **pipes, **options
    ) as it:
        assert it.stdout.readline() == "ready\n", it.stderr.read()
        it.send_signal(number)
        stdout, stderr = it.communicate(timeout=60)
    return it.returncode, stdout, stderr


SIGNALS = {signal.SIGINT: "interrupted\n", signal.SIGTERM: "terminated\n", signal.SIGHUP: "ended with its terminal\n"}


@pytest.mark.parametrize("number", SIGNALS)
class TestSignals:
    def test_one_line_and_the_code_of_the_signal(self, number):
        body = "import time; print('ready', flush=True); time.sleep(60)"
        assert interrupted(body, number) == (128 + number, "", SIGNALS[number])

    def test_what_was_begun_is_left_in_order(self, number):
        body = """
        import time
        try:
            print('ready', flush=True); time.sleep(60)
        finally:
            print('cleaned')
        """
        assert interrupted(body, number) == (128 + number, "cleaned\n", SIGNALS[number])

    def test_during_an_import(self, number, tmp_path):
        """An exception would leave the module half made: a library that catches it may not be left with that."""
        (tmp_path / "library.py").write_text(
            "import time\n"
            "try:\n    print('ready', flush=True); time.sleep(60)\n"
            "except BaseException as error:\n    raise ImportError('initialization failed') from None\n"
        )
        body = f"""
        from pathlib import Path
        from telechat_mindie.staging import StagedDirectory
        import sys; sys.path.insert(0, {str(tmp_path)!r})
        with StagedDirectory(Path({str(tmp_path / "target")!r}), replace=False):
            import library
        """
        assert interrupted(body, number) == (128 + number, "", SIGNALS[number])
        assert sorted(entry.name for entry in tmp_path.iterdir() if "pycache" not in entry.name) == ["library.py"]

    def test_where_python_passes_over_exceptions(self, number):
        body = """
        import time
        class Slow:
            def __del__(self):
                print('ready', flush=True); time.sleep(60)
        Slow()
        time.sleep(60)
        """
        begin = time.monotonic()
        assert interrupted(body, number) == (128 + number, "", SIGNALS[number])
        assert time.monotonic() - begin < 50

    def test_in_an_event_loop(self, number):
        body = """
        import asyncio
        async def one():
            try:
                await asyncio.sleep(60)
            finally:
                print('cleaned')
        async def main():
            tasks = asyncio.gather(one(), one())
            await asyncio.sleep(0)
            print('ready', flush=True)
            await tasks
        asyncio.run(main())
        """
        assert interrupted(body, number) == (128 + number, "cleaned\ncleaned\n", SIGNALS[number])

    def test_behind_another_exception(self, number):
        body = """
        import time
        try:
            print('ready', flush=True); time.sleep(60)
        except BaseException as error:
            raise ImportError('initialization failed') from error
        """
        assert interrupted(body, number) == (128 + number, "", SIGNALS[number])


def test_a_signal_that_the_caller_ignores_stays_ignored():
    body = "import os, signal; os.kill(os.getpid(), signal.SIGHUP); print('went on')"
    done = run(*command_of(body), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


class TestFaults:
    def test_a_fault_of_its_own_is_a_sentence_and_a_log(self, tmp_path):
        done = run(*command_of("1 / 0"), env=os.environ | {"TMPDIR": str(tmp_path)})
        (log,) = tmp_path.iterdir()
        assert done.returncode == 70 and done.stdout == ""
        assert done.stderr == (
            "error: a fault of telechat-mindie itself, ZeroDivisionError: division by zero. Its traceback is in "
            f"{log}; please report it with that file.\n"
        )
        text = log.read_text()
        assert text.startswith("telechat-mindie ") and "Traceback" in text and "division by zero" in text
        assert log.stat().st_mode & 0o777 == 0o600

    def test_no_log_can_be_written(self):
        body = "import tempfile; tempfile.tempdir = '/proc/nowhere'; raise RuntimeError('line one\\nline two')"
        done = run(*command_of(body))
        assert done.returncode == 70 and done.stderr.count("\n") == 1
        assert "RuntimeError: line one line two. No log of it could be written" in done.stderr

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ("open('/proc/nowhere')", "error: /proc/nowhere: No such file or directory\n"),
            ("raise MemoryError", "error: the memory of this machine does not suffice\n"),
            ("raise OSError(28, 'No space left on device')", "error: the output cannot be written: No space left on"),
            (
                "from telechat_mindie.errors import InputError; raise InputError('is bad', where='it')",
                "error: it: is bad",
            ),
            (  # a socket's, not that of the output
                "from telechat_mindie.errors import InputError; "
                "raise InputError('is gone', where='it') from BrokenPipeError(32, 'Broken pipe')",
                "error: it: is gone",
            ),
        ],
    )
    def test_what_the_machine_or_the_input_lacks(self, body, said):
        done = run(*command_of(body))
        assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1


SHORT = ("plan", "--variant", "3b")


class TestOutput:
    @pytest.mark.parametrize("arguments", [("--version",), ("--help",), SHORT, (*SHORT, "--json")])
    def test_a_full_disk(self, arguments):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*PROGRAM, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
        assert done.returncode == 2
        assert done.stderr == "error: the output cannot be written: No space left on device\n"

    @pytest.mark.parametrize("arguments", [SHORT, ("logs", "nano-1025")], ids=lambda words: words[0])
    def test_nobody_reads(self, tmp_path, arguments):
        urls = {"business": "http://127.0.0.1:1025", "management": "http://127.0.0.1:1026"}
        plan = LaunchPlan("nano-1025", "/m", "2.3", ("x",), {}, {}, urls, None, "nano", Identity(1, 1.0))
        recorded = RunDirectory(tmp_path / "telechat-mindie" / "nano-1025")
        recorded.create(plan, "{}")
        recorded.log.write_text("a line\n")
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as closed:
            done = subprocess.run(
                [*PROGRAM, *arguments],
                stdout=closed,
                stderr=subprocess.PIPE,
                text=True,
                timeout=300,
                env=os.environ | {"XDG_STATE_HOME": str(tmp_path)},
            )
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")

    def test_streams_that_are_closed(self, tmp_path):
        """A file must not be taken for one of them by whoever writes to 1 or 2."""
        body = f"import os; os.write(1, b'x'); file = open({str(tmp_path / 'file')!r}, 'w'); print(file.fileno() > 2)"
        for closed in ("0<&- 1>&- 2>&-", "1>&-", "0<&-"):
            assert run("sh", "-c", 'exec "$@" ' + closed, "sh", *command_of(body)).returncode == 0
            assert (tmp_path / "file").read_bytes() == b""

    @pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1"])
    def test_an_encoding_without_the_characters(self, encoding, tmp_path):
        write_checkpoint(tmp_path / "模型😀")
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(
            [*PROGRAM, "plan", "--checkpoint", tmp_path / "模型😀"], capture_output=True, env=environment, timeout=300
        )
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
        said = done.stdout.decode(encoding)
        assert ("模型" if encoding == "gbk" else "\\u6a21") in said

    def test_json_in_an_encoding_without_the_characters(self, tmp_path):
        write_checkpoint(tmp_path / "ckpt")
        arguments = ("build", tmp_path / "模型😀", "--checkpoint", tmp_path / "ckpt", "--json")
        done = run(*PROGRAM, *arguments, env=os.environ | {"PYTHONIOENCODING": "ascii"})
        assert json.loads(done.stdout)["model_path"] == str(tmp_path / "模型😀"), done.stderr


def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


class TestFiles:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("nano", "{tmp}/out"),
            ("build", "{tmp}/out", "--checkpoint", "{tmp}/ckpt"),
            ("convert", "{tmp}/ckpt", "{tmp}/out", "--to", "ckpt"),
            ("convert", "{tmp}/ckpt", "{tmp}/out", "--to", "hf"),
            (*SHORT, "--target", "{tmp}", "--probe"),
        ],
        ids=lambda arguments: " ".join(arguments[:1]),
    )
    def test_a_disk_that_takes_no_more(self, tmp_path, arguments):
        write_checkpoint(tmp_path / "ckpt")
        done = run(*PROGRAM, *(word.format(tmp=tmp_path) for word in arguments), preexec_fn=limited)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
        assert done.stderr.count("\n") == 1 and "cannot be written: File too large" in done.stderr
        assert [entry.name for entry in tmp_path.iterdir()] == ["ckpt"]

    @pytest.mark.parametrize("arguments", [("status",), ("logs",), ("stop", "--all")], ids=lambda words: words[0])
    def test_a_state_folder_that_cannot_be_read(self, tmp_path, arguments):
        (tmp_path / "state").write_text("a file where a folder should be")
        done = run(*PROGRAM, *arguments, env=os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")})
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
        assert done.returncode == 0 or done.stderr.startswith("error: "), done.stderr

    def test_an_interrupted_compilation_leaves_nothing(self, tmp_path):
        compiler = tmp_path / "c++"
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho $$ > "$0.pid"\nexec sleep 60\n')
        compiler.chmod(0o700)
        environment = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        process = subprocess.Popen(
            [*PROGRAM, "info", "-q", nano_directory()], stderr=subprocess.PIPE, text=True, env=environment
        )
        while not (started := Path(f"{compiler}.pid")).exists() and process.poll() is None:
            time.sleep(0.01)
        process.terminate()
        assert process.communicate(timeout=60)[1] == "terminated\n" and process.returncode == 143
        assert [entry.name for entry in (tmp_path / "cache/telechat-mindie").iterdir()] == ["build.lock"]
        assert not Path(f"/proc/{started.read_text().strip()}").exists()


class TestStaging:
    def stage(self, target, error=None, **options):
        with staging.StagedDirectory(target, replace=True, marker="mark", **options) as staged:
            (staged.path / "mark").write_text("new")
            staged.resumable = True
            if error is not None:
                raise error
            staged.commit()

    def test_an_interrupt_keeps_what_can_be_resumed_and_an_error_does_not(self, tmp_path, monkeypatch):
        monkeypatch.setattr(staging, "LEFT", [])
        for error, resume, kept in (
            (KeyboardInterrupt(), False, True),
            (SystemExit(143), False, True),
            (ValueError(), False, False),
            (ValueError(), True, True),
        ):
            with pytest.raises(type(error)):
                self.stage(tmp_path / "out", error, resume=resume)
            assert (tmp_path / ".out.partial").exists() is kept
            assert ([tmp_path / ".out.partial"] == staging.LEFT) is kept
            staging.LEFT.clear()
        self.stage(tmp_path / "out")
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"] and not staging.LEFT

    @pytest.mark.parametrize("renames", [1, 2])
    def test_an_interrupt_in_the_middle_of_a_replacement(self, tmp_path, monkeypatch, renames):
        """Behind the first rename the target is away, behind the second the old one is still there."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mark").write_text("old")
        calls, rename = [], Path.rename

        def interrupting(path, target):
            rename(path, target)
            calls.append(path)
            if len(calls) == renames:
                raise KeyboardInterrupt

        monkeypatch.setattr(Path, "rename", interrupting)
        with pytest.raises(KeyboardInterrupt):
            self.stage(tmp_path / "out")
        assert (tmp_path / "out/mark").read_text() == ("old" if renames == 1 else "new")
        assert {entry.name for entry in tmp_path.iterdir()} <= {"out", ".out.partial"}


@pytest.fixture(scope="module")
def tool():
    """tools/interrupt.py."""
    spec = importlib.util.spec_from_file_location("interrupt", ROOT / "tools" / "interrupt.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs(tool, tmp_path_factory):
    """A model directory and a checkpoint."""
    return tool.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate", "chat", "serve", "build", "bench"])
def test_interrupted_at_any_moment(tool, inputs, tmp_path, name):
    """Few moments here; tools/interrupt.py has as many as one likes."""
    with tool.server(inputs[0]) if name == "bench" else contextlib.nullcontext("") as url:
        scenario = next(entry for entry in tool.scenarios(*inputs, url) if entry.name == name)
        found = tool.endings(scenario, tmp_path, 6)
    faults = [f"{ending.moment:.2f} s: {ending.faults()}" for ending in found if ending.faults()]
    assert not faults
    assert any(ending.code for ending in found), "every run had ended before its moment"
