"""The chat's commands, on a terminal that a test writes to: each is one function call away."""

from __future__ import annotations

import json
import stat

import pytest

from telechat_mindie.client import chat_loop
from telechat_mindie.client.answers import Figures
from telechat_mindie.client.chat_loop import ChatLoop
from telechat_mindie.client.chat_settings import SETTINGS
from telechat_mindie.client.dialects import Sampling
from telechat_mindie.client.line_editor import REMEMBERED, LineEditor
from telechat_mindie.errors import InputError
from telechat_mindie.text.thoughts import Piece


class Parrot:
    """Answers with the number of the question and remembers what it was asked."""

    name = "parrot"

    def __init__(self):
        self.sampling = Sampling()
        self.asked = []
        self.fails = False

    def use(self, sampling):
        if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
            raise InputError("is out of range", where="top_p", expected="above 0, to 1", found=sampling.top_p)
        self.sampling = sampling

    def answer(self, messages, emit):
        self.asked.append(messages)
        if self.fails:
            raise InputError("is gone", where="parrot")
        emit(Piece(f"answer {len(self.asked)}", is_thought=False))
        return Figures(0.5, 1.5, 11, 3, cut=False)


@pytest.fixture
def parrot():
    return Parrot()


@pytest.fixture
def chat(parrot, monkeypatch, capsys):
    """`chat(entry, ...)`: what the chat prints for these entries, before the end of the input."""
    loop = ChatLoop(parrot, None)

    def enter(*entries):
        left = [*entries]

        class Editor:
            def __init__(self, *_):
                self.remembered = []

            def read(self, _):
                if not left:
                    raise EOFError
                return left.pop(0)

            def remember(self, message):
                remembered.append(message)

        remembered.clear()
        monkeypatch.setattr(chat_loop, "LineEditor", Editor)
        loop._interactive = True
        loop.run()
        printed = capsys.readouterr()
        return printed.out + printed.err

    remembered = []
    enter.remembered = remembered
    return enter


def questions(parrot):
    return [[message["content"] for message in messages] for messages in parrot.asked]


def test_retry_asks_again_without_the_answer(chat, parrot):
    assert "/retry: has no question to ask again" in chat("/retry")
    chat("one", "two", "/retry", "/retry", "three")
    assert questions(parrot) == [
        ["one"],
        ["one", "answer 1", "two"],
        ["one", "answer 1", "two"],
        ["one", "answer 1", "two"],
        ["one", "answer 1", "two", "answer 4", "three"],
    ]


def test_retry_after_a_question_that_failed_keeps_what_was_answered(chat, parrot):
    chat("one")
    parrot.fails = True
    assert "error: parrot: is gone" in chat("one")
    parrot.fails = False
    chat("/retry")
    assert questions(parrot)[-1] == ["one", "answer 1", "one"]
    assert "/retry: has no question" in chat("/reset", "/retry")


def test_set_changes_how_answers_are_drawn(chat, parrot):
    assert "temperature as the model has it" in chat("/set")
    said = chat("/set temperature 0.5", "/set top-k 9", "/set --max-new-tokens 7", "/set seed 1", "/set")
    assert parrot.sampling == Sampling(max_tokens=7, temperature=0.5, top_k=9, seed=1)
    assert "[temperature 0.5]" in said and "max_new_tokens 7" in said
    assert "[seed as the model has it]" in chat("/set seed")
    assert parrot.sampling.seed is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/set heat 1", "heat: is no setting (expected max_new_tokens or temperature"),
        ("/set temperature hot", "temperature: is no number (found hot)"),
        ("/set temperature nan", "temperature: is no number (found nan)"),
        ("/set seed 1.5", "seed: is no whole number (found 1.5)"),
        ("/set top_p 3", "top_p: is out of range"),
        ("/save", "/save: needs the name of a file"),
        ("/load nowhere.json", "nowhere.json"),
        ("/lod x", "/lod: is no command. /help lists them"),
    ],
)
def test_refusals_leave_the_chat_as_it_was(chat, parrot, text, message):
    said = chat(text, "on we go")
    assert f"error: {message}" in said or (message == "nowhere.json" and "error: " in said and message in said)
    assert parrot.sampling == Sampling() and questions(parrot) == [["on we go"]]


def test_a_conversation_is_saved_and_loaded(chat, parrot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat("/system 简短", "one", "/save talk.json")
    kept = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [message["role"] for message in kept["messages"]] == ["system", "user", "assistant"]
    assert "[1 questions and answers" in chat("/reset", "/system", "/load talk.json", "two")
    assert questions(parrot)[-1] == ["简短", "one", "answer 1", "two"]
    chat("/save talk.json")  # the same conversation, so the same file
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 5
    chat("/load talk.json", "/retry")
    assert questions(parrot)[-1] == ["简短", "one", "answer 1", "two"]
    (tmp_path / "other").write_text("mine")
    assert "other: exists. Choose another name." in chat("/save other")
    assert (tmp_path / "other").read_text() == "mine"


def test_a_saved_conversation_is_read_by_preprocess_and_bench(chat, tmp_path):
    import random

    from telechat_mindie.data.conversations import FORMS
    from telechat_mindie.loadtest.prompts import Range, read_items

    path = tmp_path / "talk.jsonl"
    chat("one", f"/save {path}")
    item = next(read_items(path, Range(1, 1), random.Random(0)))
    assert [message["content"] for message in item.prompt] == ["one", "answer 1"]
    assert FORMS["messages"].field in json.loads(path.read_text())


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "x",
        [{"role": "user"}],
        [{"role": "user", "content": "x"}],
        [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}],
    ],
)
def test_what_is_no_conversation_is_not_loaded(chat, parrot, tmp_path, messages):
    (tmp_path / "x").write_text(json.dumps({"messages": messages}))
    assert "is no conversation" in chat("one", f"/load {tmp_path / 'x'}", "two")
    assert questions(parrot)[-1] == ["one", "answer 1", "two"]


def test_a_block_may_begin_with_a_slash(chat, parrot):
    chat('"""/bye', 'and on"""', '"""/help"""', '"""', "//two", '"""')
    assert [asked[-1] for asked in questions(parrot)] == ["/bye\nand on", "/help", "//two"]
    assert chat.remembered == ['"""/bye\nand on"""', '"""/help"""', '"""//two"""']


def test_a_pasted_text_with_a_slash_is_a_question(chat, parrot):
    chat("/usr/bin/x: error\nline 2", "// comment\ncode", "//one line", "/system a\nb", "x")
    assert [asked[-1] for asked in questions(parrot)] == [
        "/usr/bin/x: error\nline 2",
        "// comment\ncode",
        "/one line",
        "x",
    ]
    assert parrot.asked[-1][0] == {"role": "system", "content": "a\nb"}


@pytest.mark.parametrize("word", ["/bye", "/exit", "/quit", "  /bye  "])
def test_leaving(chat, parrot, word):
    chat(word, "too late")
    assert parrot.asked == []


def test_help_lists_all_and_figures_are_the_server_s(chat, parrot):
    said = chat("/help", "hi")
    loop = ChatLoop(parrot, None)
    assert all(f"\n{name} " in f"\n{said}" for name in loop._commands) and "/bye, /exit, /quit" in said
    assert "[3 tokens in, 11 out, first after 500 ms, then 10.0 tokens/s]" in said


def test_tab(parrot, tmp_path, monkeypatch):
    loop = ChatLoop(parrot, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file name").touch()
    assert loop._offer("", "/s") == ["/set ", "/system ", "/save "] and loop._offer("", "/b") == ["/bye"]
    assert list(loop._offer("", "s")) == []  # a question's first word
    assert loop._offer("/set ", "top") == ["top_k ", "top_p "] and len(loop._offer("/set ", "")) == len(SETTINGS)
    assert loop._offer("/load ", "fo") == ["folder/"] and loop._offer("/save ", "folder/f") == ["folder/file name"]
    assert loop._offer("/load ", "nowhere/") == [] and list(loop._offer("hi ", "t")) == []


@pytest.fixture
def readline(monkeypatch):
    module = pytest.importorskip("readline")
    module.clear_history()
    yield module
    module.clear_history()
    module.set_completer(None)
    module.set_auto_history(True)


def history_of(readline):
    return [readline.get_history_item(number + 1) for number in range(readline.get_current_history_length())]


def test_history_goes_on_at_the_next_start_for_this_user_alone(readline, tmp_path):
    path = tmp_path / "state" / "history"
    editor = LineEditor(lambda *_: (), path)
    for message in ("one", "二\nlines", "x" * 200_000, ""):
        editor.remember(message)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with path.open("a") as file:
        file.write("damaged\n3\n")
    readline.clear_history()
    LineEditor(lambda *_: (), path)
    assert history_of(readline) == ["one", "二\nlines"]


def test_history_is_cut_where_it_has_grown_long(readline, tmp_path):
    path = tmp_path / "history"
    path.write_text("".join(f'"{number}"\n' for number in range(3 * REMEMBERED)))
    LineEditor(lambda *_: (), path)
    assert history_of(readline)[0] == str(2 * REMEMBERED) and len(history_of(readline)) == REMEMBERED
    assert len(path.read_text().splitlines()) == REMEMBERED and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_does_not_end_the_chat(readline, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "history", tmp_path, None):
        readline.clear_history()
        LineEditor(lambda *_: (), path).remember("one")
        assert history_of(readline) == ["one"]
