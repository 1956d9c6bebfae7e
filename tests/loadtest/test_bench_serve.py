"""`bench serve`: what it sends, when, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import time

import pytest
from helpers.fake_mindie import FakeMindie
from helpers.server import shared_server

from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.loadtest.driver import Load, drive
from telechat_mindie.loadtest.prompts import Item, Range, random_items, read_items
from telechat_mindie.loadtest.record import Record
from telechat_mindie.loadtest.report import Report, Spread, in_flight


def bench(*arguments):
    command = [sys.executable, "-m", "telechat_mindie", "bench", "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def figures(*arguments):
    done = bench(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_closed_loop(tmp_path):
    with FakeMindie(pieces=["字"] * 20, delay=0.005) as fake:
        options = ("--concurrency", 4, "--requests", 24, "--prompt-tokens", "30:50", "--output-tokens", "5:10")
        found = figures("--url", fake.url, *options, "--warm-up", 3, "--plot", tmp_path / "plot.png")
        bodies = fake.bodies("/v1/chat/completions")
        assert len(bodies) == 27 and fake.peak == found["peak_concurrency"] == 4
    assert all(body["ignore_eos"] and 5 <= body["max_tokens"] <= 10 for body in bodies)
    prompts = [body["messages"][0]["content"] for body in bodies]
    assert len(set(prompts)) == 27 and all(29 <= len(prompt) <= 51 for prompt in prompts)
    assert (found["requests"], found["succeeded"], found["failed"]) == (24, 24, {})
    assert found["output_tokens"]["max"] <= 10 and 29 <= found["prompt_tokens"]["p50"] <= 51
    mean_output = sum(body["max_tokens"] for body in bodies[3:]) / 24
    assert found["output_tokens"]["mean"] == pytest.approx(mean_output)
    assert found["output_tokens_per_second"] == pytest.approx(24 * mean_output / found["seconds"])
    for measure in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        spread = found[measure]
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p95"] <= spread["p99"] <= spread["max"]
    assert 4 < found["tpot_ms"]["p50"] < 50  # the service sends a token each 5 ms
    assert found["ttft_ms"]["p50"] < found["e2e_ms"]["p50"]
    image = (tmp_path / "plot.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n") and len(image) > 10_000


def test_an_open_loop_over_tgi():
    with FakeMindie(pieces=["字"] * 4, delay=0.02) as fake:
        found = figures("--url", fake.url, "--api", "tgi", "--rate", 40, "--duration", 1, "--output-tokens", 3)
        bodies = fake.bodies("/generate_stream")
    assert len(bodies) == found["requests"] + 2 and 15 < found["requests"] < 75
    assert bodies[0]["parameters"] == {"details": True, "max_new_tokens": 3}
    assert found["output_tokens"]["mean"] == 3 and found["prompt_tokens"]["mean"] == 128
    assert found["settings"]["rate"] == 40 and found["settings"]["concurrency"] is None


@pytest.mark.parametrize("api", ["openai", "tgi"])
def test_the_embedded_server(api):
    load = ("--concurrency", 3, "--requests", 6, "--prompt-tokens", 40, "--output-tokens", 8)
    found = figures("--url", shared_server().url, "--api", api, *load)
    assert found["succeeded"] == 6 and found["notes"] == []
    assert found["output_tokens"]["mean"] == 8 or api == "tgi"  # TGI has no word for going on after the end
    assert 40 <= found["prompt_tokens"]["p50"] <= 140  # and the template's tokens


def test_the_same_seed_asks_the_same():
    asked = []
    for seed in (1, 1, 2):
        with FakeMindie() as fake:
            figures("--url", fake.url, "--requests", 5, "--seed", seed, "--concurrency", 1)
            asked.append(fake.bodies("/v1/chat/completions"))
    assert asked[0] == asked[1] != asked[2]


def test_a_table_and_prompts_of_ones_own(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "一"}) + "\n\n" + json.dumps({"messages": messages, "max_tokens": 2}) + "\n"
    )
    with FakeMindie(usage=False) as fake:
        options = ("--requests", 2, "--concurrency", 1, "--warm-up", 0, "--output-tokens", 9)
        done = bench("--url", fake.url, "--prompts", tmp_path / "p.jsonl", *options)
        one, two = fake.bodies("/v1/chat/completions")
    assert done.returncode == 0, done.stderr
    assert all(
        word in done.stdout for word in ("TTFT, ms", "TPOT, ms", "ITL, ms", "e2e, ms", "p50", "p99", "requests/s")
    )
    assert "note: the service does not count tokens: answers are counted by /v1/tokenizer" in done.stdout
    assert one["messages"] == [{"role": "user", "content": "一"}] and one["max_tokens"] == 9
    assert two["messages"] == messages and two["max_tokens"] == 2 and "ignore_eos" not in two


def test_faults_are_counted_and_do_not_end_the_test():
    with FakeMindie() as fake:
        fake.faults["/v1/chat/completions"] = (503, '{"error": "queue is full", "error_type": "Service Unavailable"}')
        done = bench("--url", fake.url, "--requests", 5, "--warm-up", 0, "--json")
        found = json.loads(done.stdout)
        assert done.returncode == 1 and found["failed"] == {"HTTP 503": 5} and found["succeeded"] == 0
        assert "5 failed, HTTP 503" in done.stderr and "queue is full" in done.stderr
        done = bench("--url", fake.url, "--requests", 5)
        assert done.returncode == 2 and "refuses the warm-up" in done.stderr and done.stderr.count("\n") == 1
    with FakeMindie(broken=True) as fake:
        fake.faults["/v1/tokenizer"] = (404, "{}")
        done = bench("--url", fake.url, "--requests", 3, "--warm-up", 0)
        assert done.returncode == 1 and "3 failed, broken off" in done.stderr and "no /v1/tokenizer" in done.stdout
    with FakeMindie(delay=30) as fake:
        begin = time.monotonic()
        done = bench("--url", fake.url, "--requests", 2, "--warm-up", 0, "--timeout", 1)
        assert done.returncode == 1 and "2 failed, time-out" in done.stderr and time.monotonic() - begin < 20


def test_an_interrupt_reports_what_there_is():
    with FakeMindie(delay=0.02) as fake:
        command = [sys.executable, "-m", "telechat_mindie", "bench", "serve", "--url", fake.url, "--requests", "100000"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(fake.bodies("/v1/chat/completions")) < 30 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(2)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "note: interrupted" in output and "TTFT" in output, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "http://127.0.0.1:9"), "cannot be reached"),
        (("--url", "127.0.0.1:1025"), "is no address of a service"),
        (("--rate", 5, "--concurrency", 5), "exclude each other"),
        (("--rate", "nan"), "--rate: is out of range"),
        (("--prompt-tokens", "9:3"), "--prompt-tokens: is no length in tokens"),
        (("--key", "k.pem"), "--client-key: needs a certificate"),
        (("--ca-cert", "nowhere.pem"), "nowhere.pem: cannot be used"),
    ],
)
def test_refusals(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", "{file}"), "is no request"),
        (("--prompts", "{missing}"), "file is missing"),
        (("--api", "tgi", "--fixed-output"), "cannot go on after the end"),
        (("--requests", 1, "--rate", 0.001, "--duration", 0.1), "ended before a request was sent"),
    ],
)
def test_refusals_after_the_first_contact(tmp_path, arguments, message):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n{"prompt": 3}\n')
    with FakeMindie() as fake:
        names = {"file": file, "missing": tmp_path / "none"}
        done = bench("--url", fake.url, *(str(argument).format(**names) for argument in arguments))
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_missing_library_is_named():
    code = (
        "import sys\n"
        "sys.modules[sys.argv[1]] = None\n"
        "sys.argv[1:] = ['bench', 'serve', '--plot', 'x.png']\n"
        "from telechat_mindie.__main__ import main; main()"
    )
    for library in ("matplotlib.figure", "aiohttp"):
        done = subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        name = library.split(".")[0]
        assert f"{name} is not installed. It comes with `pip install " in done.stderr and f"'{name}>=" in done.stderr


def records():
    """Two answers by hand, and a fault. The first: four tokens in three pieces, at 1.2, 1.4 and 1.8 s."""
    return [
        Record(1.0, 2.0, [1.2, 1.4, 1.8], prompt_tokens=10, generated_tokens=4),
        Record(1.5, 3.0, [2.5], prompt_tokens=20, generated_tokens=1),
        Record(2.0, 2.5, [2.1], error="HTTP 503", message="busy"),
    ]


def test_the_figures_by_hand():
    report = Report.of(records())
    assert report.failed == {"HTTP 503": 1} and (report.requests, report.succeeded) == (3, 2)
    assert report.seconds == 2 and report.peak_concurrency == 2
    assert report.requests_per_second == 1
    assert report.output_tokens_per_second == 2.5 and report.total_tokens_per_second == 17.5
    assert report.ttft_ms.mean == pytest.approx(600) and report.ttft_ms.max == pytest.approx(1000)
    assert report.tpot_ms.mean == report.tpot_ms.p99 == pytest.approx(200)  # of the first only
    assert (report.itl_ms.mean, report.itl_ms.max) == (pytest.approx(300), pytest.approx(400))
    assert report.e2e_ms.p50 == pytest.approx(1250)
    assert in_flight(records()) == ([1.0, 1.5, 2.0, 2.0, 2.5, 3.0], [1, 2, 1, 2, 1, 0])


def test_percentiles():
    spread = Spread.of([*range(101)])
    assert (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.max) == (50, 50, 90, 95, 99, 100)
    assert Spread.of([]) is None


def test_a_closed_loop_keeps_its_number_running():
    running, peaks = 0, []

    async def send(_):
        nonlocal running
        running += 1
        peaks.append(running)
        await asyncio.sleep(0.001)
        running -= 1

    items = iter([Item("x", 1)] * 50)
    asyncio.run(drive(send, items, Load(concurrency=7), random.Random(0)))
    assert len(peaks) == 50 and max(peaks) == 7 and set(peaks[7:]) == {7}


def test_an_open_loop_does_not_wait_for_answers():
    starts = []

    async def send(_):
        starts.append(time.perf_counter())
        await asyncio.sleep(0.5)

    load = Load(rate=200, requests=60)
    begin = time.perf_counter()
    asyncio.run(drive(send, itertools.repeat(Item("x", 1)), load, random.Random(3)))
    assert len(starts) == 60
    source, due = random.Random(3), begin
    expected = [due := due + source.expovariate(200) for _ in range(60)]
    assert starts[-1] - begin == pytest.approx(expected[-1] - begin, abs=0.2)
    assert starts[-1] - begin < 0.5 + 0.2  # it had sent all before the first answer came


def test_lengths():
    assert (Range.parse("128", ""), Range.parse("1:2", "")) == (Range(128, 128), Range(1, 2))
    for text in ("", "0", "-1", "a", "1:", ":1", "2:1", "1.5", "1:2:3"):
        with pytest.raises(InputError, match="is no length"):
            Range.parse(text, "--x")
    drawn = {Range(3, 5).draw(random.Random(seed)) for seed in range(50)}
    assert drawn == {3, 4, 5}


def test_random_prompts_have_the_wanted_length():
    items = random_items(Range(100, 100), Range(7, 7), 2.0, random.Random(0))
    texts = [next(items) for _ in range(3)]
    assert all(len(item.prompt) == 100 and item.max_tokens == 7 for item in texts)  # 50 words of two tokens
    assert len({item.prompt for item in texts}) == 3


def test_a_text_file_of_prompts_goes_round(tmp_path):
    (tmp_path / "p.txt").write_text(" one \n\n{not json\n", encoding="utf-8")
    items = read_items(tmp_path / "p.txt", Range(4, 4), random.Random(0))
    assert list(itertools.islice(items, 3)) == [Item("one", 4), Item("{not json", 4), Item("one", 4)]
    for content, error, message in (
        (b"", InputError, "holds no prompt"),
        (b"\n \n", InputError, "holds no prompt"),
        (b"\xff\xfe", ConfigError, "not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ConfigError, "Git LFS pointer"),
    ):
        (tmp_path / "p.txt").write_bytes(content)
        with pytest.raises(error, match=message):
            read_items(tmp_path / "p.txt", Range(4, 4), random.Random(0))


def test_prompts_come_from_files_of_any_editor_and_not_from_pipes(tmp_path):
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"prompt": "one"}\r\n{"prompt": "二"}\r'.encode())
    items = read_items(tmp_path / "p.jsonl", Range(4, 4), random.Random(0))
    assert list(itertools.islice(items, 3)) == [Item("one", 4), Item("二", 4), Item("one", 4)]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_items(tmp_path / "pipe", Range(4, 4), random.Random(0))
