"""Load a server for a long time, with clients that leave and requests that are wrong, and account for every one.

A server on telechat2-nano (or --model-path) is started. Each of the clients sends one request after the other: most
are good, in any of MindIE's formats, streamed or not; some are broken; some clients leave in the middle. Afterwards

- every request was answered as it should be, or was left by its client; none is stuck;
- the server's own counts agree with the clients';
- every block of the cache is free again;
- the server's memory at the end is within --tolerance of what it was after the first fifth;
- SIGTERM under load: exit code 0, and every unfinished answer ends, or with an error that says so.

    python tools/soak.py [--minutes 10] [--clients 32] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from telechat_mindie.model_dir.build import build
from telechat_mindie.nano import write_checkpoint

REQUEST_SECONDS = 60  # after which a request counts as stuck
SAMPLE_SECONDS = 2
WORDS = ("生抽与老抽的区别？", "你好", "中国电信是做什么的？", "写一首关于春天的诗", "How are you?", "🙂" * 5)

BAD: tuple[tuple[str, bytes, int], ...] = (
    ("/generate", b"{", 422),
    ("/generate", b'{"inputs": "\xff"}', 422),
    ("/generate", json.dumps({"inputs": "x", "parameters": {"temperature": -1}}).encode(), 422),
    ("/generate", json.dumps({"inputs": "long " * 100_000}).encode(), 424),
    ("/infer", json.dumps({"input_id": [10**6]}).encode(), 424),
    ("/v1/chat/completions", json.dumps({"model": "none", "messages": []}).encode(), 422),
    ("/v1/completions", b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}", 422),
)


def good_request(model: str, dice: random.Random) -> tuple[str, dict[str, Any]]:
    """A request that must be answered with 200."""
    text = dice.choice(WORDS) * dice.randint(1, 6)
    tokens, stream = dice.randint(1, 120), dice.random() < 0.5
    draw = {"temperature": 0.9, "top_k": 20, "seed": dice.randrange(1 << 40)} if dice.random() < 0.5 else {}
    kind = dice.randrange(5)
    if kind == 0:
        path = "/generate_stream" if stream else "/generate"
        return path, {"inputs": text, "parameters": {"max_new_tokens": tokens, **draw}}
    if kind == 1:
        return "/infer", {"inputs": text, "stream": stream, "parameters": {"max_new_tokens": tokens, **draw}}
    if kind == 2:
        return "/generate", {"prompt": text, "stream": stream, "max_tokens": tokens, "stop": ["。"], **draw}
    shared = {"model": model, "stream": stream, "max_tokens": tokens, **draw}
    if kind == 3:
        return "/v1/completions", {**shared, "prompt": text, "logprobs": 2}
    return "/v1/chat/completions", {**shared, "messages": [{"role": "user", "content": text}]}


class Clients:
    """Many clients of one server, and what became of their requests."""

    def __init__(self, url: str, model: str, count: int, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.sent = 0
        self.is_stopping = False  # the server got SIGTERM
        self._url = url
        self._model = model
        self._count = count
        self._seed = seed

    async def run(self, end: float) -> None:
        """Until the time, and then until the last request is over."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
            await asyncio.gather(*(self._client(session, end, number) for number in range(self._count)))

    async def _client(self, session: aiohttp.ClientSession, end: float, number: int) -> None:
        dice = random.Random(f"{self._seed}-{number}")
        while time.monotonic() < end and not self.is_stopping:
            self.sent += 1
            try:
                outcome = await self._one(session, dice)
            except asyncio.TimeoutError:
                outcome = "stuck"
            except aiohttp.ClientError as error:
                outcome = "refused by the stopping server" if self.is_stopping else f"broken: {type(error).__name__}"
            self.outcomes[outcome] += 1
            if outcome.startswith(("stuck", "broken", "wrong")):
                self.faults.append(outcome)

    async def _one(self, session: aiohttp.ClientSession, dice: random.Random) -> str:
        fate = dice.random()
        if fate < 0.1:
            path, raw, expected = dice.choice(BAD)
            async with session.post(self._url + path, data=raw) as response:
                await response.read()
                return self._refusal(response.status) or ("bad" if response.status == expected else f"wrong: {path}")
        path, body = good_request(self._model, dice)
        async with session.post(self._url + path, json=body) as response:
            if fate < 0.25:
                await asyncio.sleep(dice.random() * 0.2)
                response.close()  # the client leaves
                return "left"
            text = await response.text()
            if (refusal := self._refusal(response.status, text)) is not None:
                return refusal
            return "answered" if response.status == 200 and text else f"wrong: {path} {response.status} {text[:200]}"

    def _refusal(self, status: int, text: str = "") -> str | None:
        is_refused = status == 503 or "has been stopped" in text[-200:]
        return "refused at the end" if self.is_stopping and is_refused else None


def memory(pid: int) -> float:
    """MB that a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


async def load(clients: Clients, pid: int, seconds: float) -> list[tuple[float, float]]:
    """Run the clients; (second, MB) of the server."""
    begin = time.monotonic()
    task = asyncio.create_task(clients.run(begin + seconds))
    samples = []
    while not task.done():
        samples.append((time.monotonic() - begin, memory(pid)))
        await asyncio.wait([task], timeout=SAMPLE_SECONDS)
    await task
    return samples


async def counts(url: str) -> dict[str, float]:
    """The server's own counts, once its pool is empty (or ten seconds are over)."""
    async with aiohttp.ClientSession(trust_env=False) as session:
        for _ in range(100):
            async with session.get(f"{url}/metrics") as response:
                lines = (await response.text()).splitlines()
            values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if "{model_name=" in line}
            if not values["npu_cache_usage_perc"] + values["num_requests_running"] + values["num_requests_waiting"]:
                break
            await asyncio.sleep(0.1)
    return values


async def stop_under_load(clients: Clients, server: subprocess.Popen[str]) -> None:
    """SIGTERM while every client has a request."""
    task = asyncio.create_task(clients.run(time.monotonic() + 60))
    await asyncio.sleep(2)
    clients.is_stopping = True
    server.send_signal(signal.SIGTERM)
    await task


def soak(model_path: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Figures and faults."""
    command = [sys.executable, "-m", "telechat_mindie", "serve", str(model_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            lines = iter(server.stdout or ())
            line = next((line for line in lines if "Daemon start success!" in line), "")
            if not line:
                raise SystemExit(f"error: the server ended with exit code {server.wait()}")
            printed: list[str] = []
            threading.Thread(target=printed.extend, args=(lines,), daemon=True).start()  # lest its pipe fills
            url = line.partition(" at ")[2].split(",")[0].strip()
            clients = Clients(url, model_path.name, arguments.clients, arguments.seed)
            samples = asyncio.run(load(clients, server.pid, arguments.minutes * 60))
            values = asyncio.run(counts(url))
            last = Clients(url, model_path.name, arguments.clients, arguments.seed + 1)
            asyncio.run(stop_under_load(last, server))
            code = server.wait(60)
        finally:
            if server.poll() is None:
                server.kill()
    fifth = len(samples) // 5
    early = statistics.median(size for _, size in samples[fifth : 2 * fifth])
    late = statistics.median(size for _, size in samples[-fifth:])
    growth = late / early - 1
    faults = [*clients.faults, *last.faults]
    held = values["npu_cache_usage_perc"] + values["num_requests_running"] + values["num_requests_waiting"]
    for is_wrong, what in (
        (held, f"the pool is not empty at the end: {held}"),
        (growth > arguments.tolerance, f"memory grew by {growth:.1%}, from {early:.0f} to {late:.0f} MB"),
        (code != 0, f"exit code {code} after SIGTERM"),
        (sum(clients.outcomes.values()) != clients.sent, "a request has no outcome"),
        (
            values["request_success_total"] + values["request_failed_total"] != values["request_received_total"],
            "the server has lost a request",
        ),
        (values["request_received_total"] != clients.sent, "server and clients count differently"),
        (any("Traceback" in line for line in printed), "the server printed a traceback"),
    ):
        if is_wrong:
            faults.append(what)
    figures = {
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "requests": clients.sent,
        "outcomes": dict(clients.outcomes),
        "generated_tokens": values["generation_tokens_total"],
        "memory_early_mb": round(early, 1),
        "memory_late_mb": round(late, 1),
        "memory_growth": round(growth, 4),
        "outcomes_at_sigterm": dict(last.outcomes),
        "exit_code": code,
    }
    return figures, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tolerance", type=float, default=0.05, help="growth of memory that is allowed")
    parser.add_argument("--model-path", type=Path, help="default: telechat2-nano")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model_path is None:
            write_checkpoint(Path(folder, "checkpoint"))
            arguments.model_path = Path(folder, "nano")
            build(arguments.model_path, Path(folder, "checkpoint"))
        figures, faults = soak(arguments.model_path, arguments)
    if arguments.json:
        print(json.dumps({**figures, "faults": faults}, indent=2, ensure_ascii=False))
    else:
        for name, value in figures.items():
            print(f"{name}: {value}")
        for fault, count in Counter(faults).most_common(20):
            print(f"FAULT ({count}): {fault}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
