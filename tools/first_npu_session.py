"""The steps of tools/first_npu_session.sh that need Python; docs/first-npu-session.md says what each should print."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

BLOCK_SIZE = 128
NUM_BLOCKS = 96
PROMPT = 200  # tokens: more than a block, so that a whole block can be hit
DECODES = 5
BATCHES = (1, 8, 32)
STEPS = 20  # of each batch, after as many to warm up
KEPT = (".log", ".json", ".txt", ".md", ".tsv")
"""What goes into the archive; weights, logits and caches do not."""

PACKAGES = ("telechat-mindie", "mindspore", "mindformers", "mindie-llm", "numpy", "torch", "torch-npu", "te", "hccl")


def versions() -> None:
    """Python's version and those of the packages that matter."""
    print(f"python {sys.version.split()[0]} on {os.uname().machine}, {os.cpu_count()} CPUs")
    for name in PACKAGES:
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} is not installed")


def calls(model: Path, logits: Path) -> None:
    """Time MindIE's kinds of call on one prompt, save their logits, and end where those that should agree do not."""
    session = Session(model)
    found = {}
    with timed("warm-up"):
        session.prefill(slots=np.array([0] + [-1] * (PROMPT - 1)))
    for name in ("prefill", "prefill again"):
        with timed(name):
            found[name] = session.prefill()
    for step in range(DECODES):
        with timed(f"decode {step + 1}"):
            found[f"decode {step + 1}"] = session.decode([0], [PROMPT + step])
    half = PROMPT // 2
    with timed("chunks"):
        session.prefill(end=half, block=3)
        found["chunks"] = session.prefill(start=half, block=3)
    with timed("prefix hit"):
        found["prefix hit"] = session.prefill(start=BLOCK_SIZE)
    np.savez(logits, **found)
    print(f"host memory: {peak_memory() / (1 << 20):.2f} GiB at most, of this process and its ranks")
    for name, rows in found.items():
        if rows.shape != (1, session.vocab_size) or not np.isfinite(rows).all():
            sys.exit(f"{name}: expected finite logits [1, {session.vocab_size}], found {rows.shape}")
    agree("chunks against prefill", found["chunks"], found["prefill"])
    agree("prefix hit against prefill", found["prefix hit"], found["prefill"])


def peak_memory() -> int:
    """KiB that this process and those it started held at most, each at its own time."""
    here = psutil.Process()
    status = (Path(f"/proc/{process.pid}/status").read_text() for process in (here, *here.children(recursive=True)))
    return sum(int(match[1]) for text in status if (match := re.search(r"VmHWM:\s*(\d+) kB", text)))


def compare(first: Path, second: Path) -> None:
    """Two devices' logits of the same calls."""
    with np.load(first) as here, np.load(second) as there:
        for name in here.files:
            agree(name, here[name], there[name])


def agree(name: str, first: np.ndarray, second: np.ndarray) -> None:
    """Print how far apart two rows are; end where another token would be chosen by more than they are apart."""
    apart = float(np.abs(first - second).max())
    lost = float(second.max() - second[0, first.argmax()])
    print(f"{name}: at most {apart:.4f} apart, logits up to {np.abs(second).max():.2f}, top token {first.argmax()}")
    if lost > max(2 * apart, 1e-3) or apart > 0.1 * np.abs(second).max():
        sys.exit(f"{name}: expected the same logits, found {apart:.4f} apart; top token {second.argmax()} elsewhere")


def speed(model: Path) -> None:
    """Decode steps of several batches."""
    session = Session(model)
    for batch in BATCHES:
        rows = list(range(batch))
        for row in rows:
            session.prefill(end=8, row=row)
        for position in range(8, 8 + STEPS):
            session.decode(rows, [position] * batch)
        start = time.perf_counter()
        for position in range(8 + STEPS, 8 + 2 * STEPS):
            session.decode(rows, [position] * batch)
        seconds = (time.perf_counter() - start) / STEPS
        print(f"batch {batch}: {1000 * seconds:.2f} ms a step, {batch / seconds:.1f} tokens/s")


class Session:
    """Calls a directory's runner as MindIE does: sequence `row` has block `row`, and a few others to spare."""

    def __init__(self, model: Path) -> None:
        from telechat_mindie.backend.multi_rank import open_runner

        with timed("load"):
            self._runner: Any = open_runner(model, NUM_BLOCKS, BLOCK_SIZE)
        self.vocab_size = self._runner.model_config.vocab_size
        longest = self._runner.model_config.max_position_embedding
        if longest < PROMPT + DECODES:
            sys.exit(f"{model}: expected room for {PROMPT + DECODES} tokens, found {longest}")
        self._ids = np.random.default_rng(0).integers(4, self.vocab_size, PROMPT + 64)

    def prefill(
        self, start: int = 0, end: int = PROMPT, row: int = 0, block: int = 0, slots: np.ndarray | None = None
    ) -> np.ndarray:
        """Tokens start to end of the prompt on blocks from `block` on (or `row`, where a block is enough)."""
        first = block + row
        positions = np.arange(start, end)
        table = np.array([[first, BATCHES[-1] + first + 1]], np.int32)
        if slots is None:
            slots = table[0, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        return self._forward(
            input_ids=self._ids[start:end],
            valid_length_each_example=np.array([end], np.int32),
            block_tables=table,
            slot_mapping=slots.astype(np.int32),
            prefill=True,
            position_ids=positions.astype(np.int32),
            prefill_head_indices=np.array([end - start - 1]),
            q_seq_lens=[end - start] if start or end < PROMPT else None,
        )

    def decode(self, rows: list[int], positions: list[int]) -> np.ndarray:
        tables = np.array([[row, BATCHES[-1] + row + 1] for row in rows], np.int32)
        at = np.array(positions, np.int32)
        return self._forward(
            input_ids=self._ids[at],
            valid_length_each_example=at + 1,
            block_tables=tables,
            slot_mapping=tables[np.arange(len(rows)), at // BLOCK_SIZE] * np.int32(BLOCK_SIZE) + at % BLOCK_SIZE,
            prefill=False,
            position_ids=at,
            prefill_head_indices=None,
            q_seq_lens=None,
        )

    def _forward(self, **arguments: Any) -> np.ndarray:
        given = self._runner.forward(
            adapter_ids=[None] * len(arguments["block_tables"]),
            key_cache=None,
            value_cache=None,
            spec_mask=None,
            **arguments,
        )
        return np.asarray(given.asnumpy() if hasattr(given, "asnumpy") else given, np.float32)


@contextmanager
def timed(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{name}: {1000 * (time.perf_counter() - start):.1f} ms", flush=True)


def service(model: Path, report: Path, device: str, requests: int) -> None:
    """Start MindIE on a card, or this package's server on a CPU; load it by `bench serve`; stop it.

    The service stays in this process's group: a step's time limit signals the group, and nothing is left on the card.
    """
    port = free_port()
    program = [sys.executable, "-m", "telechat_mindie"]
    if device == "cpu":
        start = [*program, "serve", str(model), "--port", str(port)]
    else:
        start = [*program, "launch", str(model), "--insecure-http", "--port-base", str(port)]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(start)
    try:
        wait_for(url, process)
        load = ["bench", "serve", "--url", url, "--requests", str(requests), "--output-tokens", "64", "--json"]
        done = subprocess.run([*program, *load], stdout=subprocess.PIPE, text=True, check=False)
        report.write_text(done.stdout)
        print(done.stdout)
        if done.returncode:
            sys.exit(f"bench serve: expected exit code 0, found {done.returncode}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until the service answers; the step's own time limit bounds it. It is on this machine: no proxy is asked."""
    import urllib.error
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None:
        try:
            with opener.open(f"{url}/v1/models", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    sys.exit(f"the service ended with code {process.returncode} before it answered")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def pack(folder: Path) -> None:
    """Summary and archive of a session's folder: texts only, without what names the machine or its owner."""
    rows = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    lines = ["| step | result | seconds |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")
    print("\n".join(f"{step:<24}{result:<24}{seconds:>8} s" for step, result, seconds in rows))
    archive = folder.with_name(folder.name + ".tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in KEPT:
                path.write_text(scrub(path.read_text(errors="replace")))
                tar.add(path, f"{folder.name}/{path.name}", filter=anonymous)
    print(f"\nSend back: {archive} ({archive.stat().st_size >> 10} KiB)")


SECRETS = (
    (r"\b([\w-]*(?:secret|passw(?:or)?d|credential|api[_-]?key)[\w-]*[\"']?\s*[=:]\s*)[^\s,;|}]+", r"\1<removed>"),
    # A shorter one is a number of tokens, or its id.
    (r"\b([\w-]*token(?![s_i])[\w-]*[\"']?\s*[=:]\s*)[^\s,;|}]{8,}", r"\1<removed>"),
    (r"\b(bearer\s+)[^\s,;\"']+", r"\1<removed>"),
    (r"(://)[^\s/]+@", r"\1<removed>@"),
)
IPV6 = re.compile(r"(?<![\w.])(?:[0-9a-fA-F]{0,4}:){2,8}(?:[0-9a-fA-F]{1,4}|(?<=::))(?!\w)")  # and times, and the like
ADDRESS = re.compile(r"\b(?!127\.0\.0\.)(?:\d{1,3}\.){3}\d{1,3}\b(?!\.\w)|\b(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}\b")


def scrub(text: str) -> str:
    """The text without secrets, host name, home folder, user name, and addresses of IP and Ethernet."""
    for pattern, shown in SECRETS:
        text = re.sub(pattern, shown, text, flags=re.IGNORECASE)
    text = IPV6.sub(without_ipv6, text)
    text = ADDRESS.sub("<address>", text)
    names = {socket.gethostname(): "<host>", str(Path.home()): "~"}
    if user := os.environ.get("USER", ""):
        names[user] = "<user>"
    for name, shown in sorted(names.items(), key=lambda pair: -len(pair[0])):
        if len(name) > 3 and name != "root":
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", shown, text)
    return text


def without_ipv6(match: re.Match[str]) -> str:
    """What a match of IPV6 becomes: only ipaddress can tell an address from a time or a card's PCI address."""
    try:
        address = ipaddress.IPv6Address(match[0])
    except ValueError:
        return match[0]
    return match[0] if address.is_loopback or address.is_unspecified else "<address>"


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("versions")
    for name, arguments in (("calls", ("model", "logits")), ("compare", ("first", "second")), ("speed", ("model",))):
        command = commands.add_parser(name)
        for argument in arguments:
            command.add_argument(argument, type=Path)
    command = commands.add_parser("service")
    command.add_argument("model", type=Path)
    command.add_argument("report", type=Path)
    command.add_argument("--device", choices=("ascend", "cpu"), required=True)
    command.add_argument("--requests", type=int, default=64)
    commands.add_parser("pack").add_argument("folder", type=Path)
    given = vars(parser.parse_args())
    globals()[given.pop("command")](**given)


if __name__ == "__main__":
    main()
