#!/usr/bin/env python3
"""Interrupt commands at many moments, and print how each of them ended.

The moments are spread over the time that a command takes by itself, from when it answers signals: Python's own start
before that is not ours. Ctrl-C and SIGTERM take turns. A command must then say one line, exit with 130 or 143, and
leave nothing behind but what `build --resume` goes on with, which is tried. Exit code 0 is right as well where it is
the command's own: it was done, the server was up and ended in order, or the load test reports what it has.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROGRAM = [sys.executable, "-m", "telechat_mindie"]
SMALL_SHARDS = """
from telechat_mindie.commands.ending import run
def build():
    import telechat_mindie.checkpoint.plan as plan
    from telechat_mindie.cli import app
    plan.SHARD_BYTES = 4_000_000
    app()
run(build)
"""
"""A build with files small enough that some are complete when it is interrupted."""

LAYERS = 48
"""Of the checkpoint that is built: 80 MB."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)
READY = "Daemon start success!"
COMMANDS = ("generate", "chat", "serve", "build", "bench")


@dataclass(frozen=True)
class Scenario:
    """A command to interrupt.

    Attributes:
        command: with `{out}` for a path of the run's own.
        stdin: what it reads; stdin stays open behind it.
        ready: the line of its output after which it goes on until it is told to end.
    """

    name: str
    command: Sequence[str]
    stdin: str = ""
    ready: str | None = None


@dataclass
class Ending:
    """How one run ended."""

    number: signal.Signals
    moment: float
    code: int
    stdout: str
    stderr: str
    seconds: float
    left: list[str] = field(default_factory=list)
    resumed: bool | None = None

    def faults(self) -> list[str]:
        """What is not as it should be."""
        lines = self.stderr.strip().splitlines()
        found = []
        if self.code == 0 and not self.left:
            return ["a traceback"] if "Traceback" in self.stderr else []
        if self.code != 128 + self.number:
            found.append(f"exit code {self.code}")
        if len(lines) != 1:
            found.append(f"{len(lines)} lines: {' / '.join(lines)[:300]}")
        if self.left and not self.resumed:
            found.append(f"left behind: {', '.join(self.left)}")
        return found


def scenarios(model: Path, checkpoint: Path, url: str) -> list[Scenario]:
    """One for each of COMMANDS, which are quiet (-q), so that all they say is how they end."""
    questions = "What is MindIE?\n/reset\n" * 40
    build = [sys.executable, "-c", SMALL_SHARDS, "build", "-q", "{out}", "--checkpoint", str(checkpoint)]
    bench = ["bench", "serve", "-q", "--url", url, "--requests", "40", "--output-tokens", "32", "--prompt-tokens", "16"]
    return [
        Scenario("generate", [*PROGRAM, "generate", "-q", str(model), "你好", "--temperature", "1.5"]),
        Scenario("chat", [*PROGRAM, "chat", "-q", str(model)], stdin=f"{questions}/exit\n"),
        Scenario("serve", [*PROGRAM, "serve", "-q", str(model), "--port", "0"], ready=READY),
        Scenario("build", build),
        Scenario("bench", [*PROGRAM, *bench]),
    ]


def interrupted(scenario: Scenario, folder: Path, moment: float, number: signal.Signals) -> Ending:
    """Run a command and send it a signal after so many seconds."""
    out = folder / "out"
    command = [word.format(out=out) if "{out}" in word else word for word in scenario.command]
    with _started(command, scenario.stdin) as process:
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        begin = time.monotonic()
        stdout, stderr = process.communicate(timeout=120)
        seconds = time.monotonic() - begin
    ending = Ending(number, moment, process.returncode, stdout, stderr, seconds)
    ending.left = sorted(entry.name for entry in folder.iterdir() if entry != out or process.returncode)
    if ending.left and "--resume" in stderr:
        again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
        ending.resumed = again.returncode == 0 and [entry.name for entry in folder.iterdir()] == ["out"]
    return ending


def duration(scenario: Scenario, folder: Path) -> float:
    """Seconds that a command takes by itself; one that waits then is given a second, and ended."""
    command = [word.format(out=folder / "out") if "{out}" in word else word for word in scenario.command]
    with _started(command, scenario.stdin) as process:
        begin = time.monotonic()
        if scenario.ready is not None:
            assert process.stdout is not None
            next(line for line in process.stdout if scenario.ready in line)
            time.sleep(1)
            process.terminate()
        process.communicate(timeout=300)
        return time.monotonic() - begin


def endings(scenario: Scenario, folder: Path, moments: int, workers: int = 2) -> list[Ending]:
    """A run for each of so many moments, at most `workers` at a time."""
    whole = duration(scenario, _fresh(folder / "whole"))

    def run(index: int) -> Ending:
        moment = whole * (index + 0.5) / moments
        return interrupted(scenario, _fresh(folder / str(index)), moment, SIGNALS[index % len(SIGNALS)])

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, range(moments)))


@contextmanager
def server(model: Path) -> Iterator[str]:
    """The address of a server, which ends with the context."""
    with subprocess.Popen(
        [*PROGRAM, "serve", str(model), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if READY in line)
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            yield line.partition(" at ")[2].split(",")[0].strip()
        finally:
            process.terminate()


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """telechat2-nano as a model directory, and a checkpoint of its kind with LAYERS layers."""
    import numpy as np
    from safetensors.numpy import save_file

    from telechat_mindie.checkpoint.mapping import weights
    from telechat_mindie.config import TelechatConfig
    from telechat_mindie.model_dir.build import build
    from telechat_mindie.nano import write_checkpoint

    write_checkpoint(folder / "nano")
    build(folder / "model", folder / "nano")
    write_checkpoint(folder / "large")
    for file in folder.glob("large/model*"):
        file.unlink()
    config = json.loads((folder / "large/config.json").read_text()) | {"n_layer": LAYERS}
    (folder / "large/config.json").write_text(json.dumps(config))
    shapes = {weight.name: weight.shape for weight in weights(TelechatConfig.from_dict(config)).values()}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, folder / "large/model.safetensors")
    return folder / "model", folder / "large"


def _fresh(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


@contextmanager
def _started(command: Sequence[str], stdin: str) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdin is not None
            process.stdin.write(stdin)
            process.stdin.flush()
            while process.poll() is None and not _catches(process.pid, signal.SIGTERM):
                time.sleep(0.002)
            yield process
        finally:
            process.kill()


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, as Linux says."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def print_row(name: str, found: Sequence[Ending], say: Callable[[str], object] = print) -> None:
    """One line of the table."""
    counts: dict[int, int] = {}
    for ending in found:
        counts[ending.code] = counts.get(ending.code, 0) + 1
    codes = ", ".join(f"{count} x {code}" for code, count in sorted(counts.items()))
    bad = [f"at {ending.moment:.2f} s: {'; '.join(faults)}" for ending in found if (faults := ending.faults())]
    resumed = sum(ending.resumed is True for ending in found)
    slowest = max(ending.seconds for ending in found)
    say(f"| {name} | {len(found)} | {codes} | {resumed} | {slowest:.1f} | {len(bad)} |")
    for line in bad:
        say(f"    {name} {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="of each command; default: %(default)s")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so its children
    print(
        "| command | moments | exit codes | resumed | slowest end, s | faults |", "|---|---|---|---|---|---|", sep="\n"
    )
    faults = 0
    with tempfile.TemporaryDirectory(prefix="telechat-mindie-") as name:
        folder = Path(name)
        model, checkpoint = make_inputs(folder)
        with server(model) as url:
            for scenario in scenarios(model, checkpoint, url):
                if scenario.name in arguments.commands:
                    found = endings(scenario, folder / "runs" / scenario.name, arguments.moments)
                    print_row(scenario.name, found, lambda text: print(text, flush=True))
                    faults += sum(bool(ending.faults()) for ending in found)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
