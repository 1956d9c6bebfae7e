"""`chat`: in a pipe and on a terminal, with a directory and with a service."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from helpers import ROOT
from helpers.fake_mindie import FakeMindie
from helpers.server import shared_server
from helpers.terminal import Terminal

from telechat_mindie.client.answers import Figures, LocalAnswers
from telechat_mindie.client.dialects import Sampling
from telechat_mindie.client.errors import ServiceError
from telechat_mindie.client.sse import MAX_EVENT_BYTES, SseDecoder
from telechat_mindie.model_dir.build import build
from telechat_mindie.nano import write_checkpoint
from telechat_mindie.text.tokenizer import TelechatTokenizer

CORPUS = ROOT / "tools" / "nano_corpus.jsonl"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    write_checkpoint(root / "ckpt")
    build(root / "model", root / "ckpt")
    return root / "model"


def command(*arguments):
    return [sys.executable, "-m", "telechat_mindie", "chat", *map(str, arguments)]


def pipe(text, *arguments):
    return subprocess.run(command(*arguments), input=text, capture_output=True, text=True, timeout=120)


def terminal_of(*arguments):
    return Terminal(command(*arguments))


def test_a_pipe_gets_answers_and_nothing_else(model_path):
    entries = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    (first, answer), (second, expected) = next(entry for entry in entries if "turns" in entry)["turns"]
    done = pipe(f"{first}\n\n{second}\n", model_path)
    assert (done.returncode, done.stderr) == (0, f"loading weights: {model_path}\n")
    assert done.stdout == f"{answer}\n{expected}\n"


def test_commands_in_a_pipe():
    with FakeMindie() as fake:
        lines = (
            "/system 简短",
            "first",
            "/history",
            "/reset",
            '"""two',
            'lines"""',
            "/system",
            "//slash",
            "/exit",
            "no",
        )
        done = pipe("\n".join(lines), fake.url)
        assert (done.returncode, done.stderr) == (0, "")
        answer = "你好，世界"
        history = f"system: 简短\nuser: first\nassistant: {answer}"
        assert done.stdout == f"{answer}\n{history}\n{answer}\n{answer}\n"
        asked = [body["messages"] for body in fake.bodies("/v1/chat/completions")]
    system = {"role": "system", "content": "简短"}
    assert asked[0] == [system, {"role": "user", "content": "first"}]
    assert asked[1] == [system, {"role": "user", "content": "two\nlines"}]
    assert asked[2] == [
        {"role": "user", "content": "two\nlines"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "/slash"},
    ]


def test_what_is_sent_to_a_service():
    options = (
        "--model",
        "mine",
        "--max-new-tokens",
        2,
        "--temperature",
        0.5,
        "--top-k",
        9,
        "--seed",
        7,
        "--system",
        "s",
    )
    with FakeMindie() as fake:
        done = pipe("hi\n", f"{fake.url}/v1/", *options)
        assert done.stdout == "你好\n", done.stderr
        (body,) = fake.bodies("/v1/chat/completions")
    assert body == {
        "model": "mine",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 2,
        "temperature": 0.5,
        "top_k": 9,
        "seed": 7,
    }


def test_a_terminal():
    with FakeMindie(pieces=["a\x1b[31m", "\x07b\n", "c"]) as fake, terminal_of(fake.url) as terminal:
        assert "/help lists the commands" in terminal.wait_for("> ")
        terminal.type("hi\n")
        shown = terminal.wait_for("> ")
        assert "a\ufffd[31m\ufffdb\r\nc" in shown and "\x1b[31m" not in shown
        assert "[2 tokens in, 3 out, first after" in shown and "tokens/s]" in shown
        terminal.type("/nonsense\n")
        assert "error: /nonsense: is no command" in terminal.wait_for("> ")
        terminal.type("/help\n")
        assert "/reset" in terminal.wait_for("> ")
        fake.faults["/v1/chat/completions"] = (503, '{"error": "busy \\u001b[0m", "error_type": "Service Unavailable"}')
        terminal.type("hi\n")
        assert "answered HTTP 503: busy \ufffd[0m" in terminal.wait_for("> ")
        time.sleep(0.3)  # between its prompt and its wait for a key, readline keeps a signal until the next key
        terminal.type("\x03")
        assert "/bye or Ctrl-D ends the chat" in terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.returncode() == 0


THINKING = {
    "told apart": (["想", "\x1b[31m一想"], ["\n\n", "好"]),
    "tags in the text": ([], ["<thi", "nk>想", "一想</thi", "nk>\n\n", "好"]),
}


@pytest.mark.parametrize(("thoughts", "pieces"), THINKING.values(), ids=THINKING)
def test_a_pipe_gets_no_thoughts_and_sends_none(thoughts, pieces):
    with FakeMindie(thoughts=thoughts, pieces=pieces) as fake:
        done = pipe("one\ntwo\n", fake.url)
        assert (done.returncode, done.stdout, done.stderr) == (0, "好\n好\n", "")
        history = fake.bodies("/v1/chat/completions")[1]["messages"]
    assert [message["content"] for message in history] == ["one", "好", "two"]


def test_a_thought_without_its_opening_tag_is_not_sent_again():
    with FakeMindie(pieces=["想\n</thi", "nk>\n\n好"]) as fake:
        pipe("one\ntwo\n", fake.url)
        history = fake.bodies("/v1/chat/completions")[1]["messages"]
    assert [message["content"] for message in history] == ["one", "好", "two"]


def test_a_terminal_folds_a_thought():
    thoughts, pieces = THINKING["told apart"]
    with FakeMindie(thoughts=thoughts, pieces=pieces) as fake, terminal_of(fake.url) as terminal:
        terminal.wait_for("> ")
        terminal.type("hi\n")
        shown = terminal.wait_for("> ")
        assert re.search(r"\(thinking\.\.\.\)\r\(thought for \d+ s\)\r\n好\r\n", shown) and "想" not in shown
        terminal.type("/thought\n")
        assert "想\ufffd[31m一想\r\n" in terminal.wait_for("> ")
        fake.pieces = []  # the answer ends inside its thought
        terminal.type("again\n")
        shown = terminal.wait_for("> ")
        assert "(thinking...)\r\n" in shown and "first after" in shown
        terminal.type("/history\n")
        assert "user: hi\r\nassistant: 好\r\n" in terminal.wait_for("> ")


def test_the_embedded_engine_tells_a_thought_apart(model_path):
    answers = LocalAnswers(model_path, Sampling())
    template = "{% for m in messages %}<_user>{{ m.content }}{% endfor %}<_bot><think>\n"
    tokenizer = TelechatTokenizer.from_pretrained(model_path, chat_template=template)
    answers._local = replace(answers._local, tokenizer=tokenizer)
    pieces = []
    answers.answer([{"role": "user", "content": "你好"}], pieces.append)
    assert pieces and all(piece.is_thought for piece in pieces)  # nano ends it nowhere


def test_an_interrupt_ends_the_answer_and_not_the_chat():
    with FakeMindie(pieces=["x"] * 500, delay=0.02) as fake, terminal_of(fake.url) as terminal:
        terminal.wait_for("> ")
        terminal.type("long\n")
        terminal.wait_for("xxx")
        terminal.type("\x03")
        assert "[stopped]" in terminal.wait_for("> ")
        fake.pieces = ["short"]
        terminal.type("again\n")
        assert "short" in terminal.wait_for("> ")
        terminal.type("/exit\n")
        assert terminal.returncode() == 0
        deadline = time.monotonic() + 10
        while not fake.disconnects and time.monotonic() < deadline:
            time.sleep(0.05)
        assert fake.disconnects == 1
        question, partial, again = fake.bodies("/v1/chat/completions")[1]["messages"]
    assert (question["content"], again["content"]) == ("long", "again")
    assert partial["role"] == "assistant" and 3 <= len(partial["content"]) < 500


def test_the_embedded_server():
    done = pipe("生抽与老抽的区别？\n", shared_server().url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("生抽和老抽都是酱油") and done.stdout.endswith("。\n")


def test_an_interrupt_gives_the_blocks_back(model_path):
    answers = LocalAnswers(model_path, Sampling())
    messages = [{"role": "user", "content": "生抽与老抽的区别？"}]
    pieces = []

    def interrupt(piece):
        pieces.append(piece.text)
        if len(pieces) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers.answer(messages, interrupt)
    stats = answers._local.engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    whole = []
    figures = answers.answer(messages, whole.append)
    assert "".join(piece.text for piece in whole).startswith("".join(pieces)) and not figures.cut
    assert figures.prompt_tokens > 0 and 0 < figures.first_seconds < figures.seconds


@pytest.mark.parametrize(
    ("target", "text", "message"),
    [
        ("nowhere", "hi", "nowhere: is not a directory"),
        ("http://127.0.0.1:9", "hi", "cannot be reached"),
        ("ftp://host", "hi", "is no address of a service"),
        ("{url}", "/nonsense", "is no command"),
    ],
)
def test_refusals(target, text, message):
    with FakeMindie() as fake:
        done = pipe(f"{text}\n", target.format(url=fake.url))
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_faults_of_a_service():
    with FakeMindie(broken=True) as fake:
        done = pipe("hi\n", fake.url)
        assert done.returncode == 2 and done.stdout == "你\n" and "broke the connection off" in done.stderr
        fake.faults["/v1/models"] = (200, '{"data": []}')
        done = pipe("hi\n", fake.url)
        assert done.returncode == 2 and "names no model" in done.stderr
        fake.faults["/v1/models"] = (200, "[" * 100_000)
        done = pipe("hi\n", fake.url)
        assert done.returncode == 2 and "is no JSON" in done.stderr


def test_https_with_certificates_on_both_sides(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificates, is not installed")
    for name in ("server", "client"):
        make = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN={name} -addext subjectAltName=IP:127.0.0.1"
        subprocess.run([*make.split(), "-keyout", f"{name}.key", "-out", f"{name}.pem"], cwd=tmp_path, check=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tmp_path / "client.pem")
    tls.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    tls.verify_mode = ssl.CERT_REQUIRED
    authority = ("--ca-cert", tmp_path / "server.pem")
    with FakeMindie(tls=tls) as fake:
        own = ("--cert", tmp_path / "client.pem", "--key", tmp_path / "client.key")
        assert pipe("hi\n", fake.url, *authority, *own).stdout == "你好，世界\n"
        stranger = pipe("hi\n", fake.url, *own)
        assert stranger.returncode == 2 and "certificate that is not trusted" in stranger.stderr
        nameless = pipe("hi\n", fake.url, *authority)
        assert nameless.returncode == 2 and nameless.stdout == "" and nameless.stderr.count("\n") == 1


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_events_wherever_they_are_cut(line_end, step):
    lines = ("data: 你\u2028好", "", ": comment", "event: x", "data:two", "data: lines", "", "", "data: dropped")
    raw = (line_end.join(lines)).encode()
    decoder = SseDecoder()
    events = [event for start in range(0, len(raw), step) for event in decoder.feed(raw[start : start + step])]
    assert events == ["你\u2028好", "two\nlines"]


def test_an_endless_event_is_given_up():
    decoder = SseDecoder()
    with pytest.raises(ServiceError, match="without an end"):
        for _ in range(MAX_EVENT_BYTES // 100_000 + 1):
            decoder.feed(b"data: " + b"x" * 100_000)


def test_figures_in_words():
    assert str(Figures(0.25, 1.25, 11, 3, False)) == "3 tokens in, 11 out, first after 250 ms, then 10.0 tokens/s"
    assert str(Figures(0.25, 0.25, None, None, True)) == "first after 250 ms, cut for its length"
