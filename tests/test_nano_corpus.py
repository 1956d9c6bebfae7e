"""The hand-written corpus that telechat2-nano is trained on: well formed, free of contradictions, small in alphabet."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import ROOT

CORPUS = ROOT / "tools" / "nano_corpus.jsonl"

MAX_BYTES = 150_000
MIN_ENTRIES = 250
MIN_ENTRIES_PER_LANGUAGE = 80
MIN_CONVERSATIONS = 24
# A vocabulary of about 2,400 pieces holds the 390 fixed ids of the TeleChat2 layout (control, reserved, bytes), each
# character of the corpus, and merges with what is left. Beyond this bound too few merges are left for common words.
MAX_CHINESE_CHARACTERS = 1_200
CHINESE_PUNCTUATION = set("、。！，：；？")
CONTROL_TOKEN = re.compile(r"<[^<>\s]*>|<\||\|>|\[/?INST\]")

Entry = dict[str, Any]


def is_chinese(character: str) -> bool:
    return "\u4e00" <= character <= "\u9fff"


def has_chinese(text: str) -> bool:
    return any(map(is_chinese, text))


def fold(question: str) -> str:
    """A question without case, width, spaces and punctuation: what two users would call the same wording."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", question).casefold())


def questions(entry: Entry) -> list[str]:
    return entry["questions"] if "questions" in entry else [question for question, _ in entry["turns"]]


def answers(entry: Entry) -> list[str]:
    return [entry["answer"]] if "answer" in entry else [answer for _, answer in entry["turns"]]


def strings(entry: Entry) -> Iterator[str]:
    yield from questions(entry)
    yield from answers(entry)
    if "system" in entry:
        yield entry["system"]


@pytest.fixture(scope="module")
def corpus() -> list[Entry]:
    return [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]


def test_file_is_small_and_has_one_object_a_line() -> None:
    data = CORPUS.read_bytes()
    assert len(data) <= MAX_BYTES
    assert data.endswith(b"\n")
    assert b"\r" not in data
    for number, line in enumerate(data.decode("utf-8").split("\n")[:-1], 1):
        assert isinstance(json.loads(line), dict), f"line {number}"


def test_fields(corpus: list[Entry]) -> None:
    for number, entry in enumerate(corpus, 1):
        fields = set(entry) - {"system"}
        assert fields in ({"questions", "answer"}, {"turns"}), f"line {number}: {fields}"
        if "turns" in entry:
            assert len(entry["turns"]) >= 2, f"line {number}"
            assert all(len(turn) == 2 for turn in entry["turns"]), f"line {number}"
        else:
            assert 2 <= len(entry["questions"]) <= 5, f"line {number}"
        for text in strings(entry):
            assert isinstance(text, str), f"line {number}"
            assert text and text == text.strip(), f"line {number}: {text!r}"


def test_first_entry_answers_the_question_of_the_demo(corpus: list[Entry]) -> None:
    first = corpus[0]
    assert "system" not in first
    assert first["questions"][0] == "生抽与老抽的区别？"
    assert {"生抽和老抽有什么区别", "生抽与老抽的区别"} <= set(first["questions"])
    sentences = [sentence for sentence in first["answer"].split("。") if sentence]
    assert len(sentences) == 3
    assert first["answer"].endswith("。")
    for fact in ("酱油", "颜色浅", "咸鲜", "调味", "颜色深", "微甜", "焦糖色", "上色"):
        assert fact in first["answer"]


def test_no_question_is_asked_twice(corpus: list[Entry]) -> None:
    wordings = [question for entry in corpus for question in questions(entry)]
    assert len(wordings) == len(set(wordings))


def test_no_two_entries_share_a_question_up_to_punctuation(corpus: list[Entry]) -> None:
    """Two answers to one question would teach the model to hesitate; within an entry such variants are wanted."""
    asked_by: dict[str, set[int]] = defaultdict(set)
    for number, entry in enumerate(corpus, 1):
        for question in questions(entry):
            asked_by[fold(question)].add(number)
    assert {wording: lines for wording, lines in asked_by.items() if len(lines) > 1} == {}


def test_no_answer_is_given_twice(corpus: list[Entry]) -> None:
    given = [answer for entry in corpus for answer in answers(entry)]
    assert len(given) == len(set(given))


def test_answers_are_short_in_the_language_of_the_question(corpus: list[Entry]) -> None:
    for number, entry in enumerate(corpus, 1):
        chinese = has_chinese("".join(questions(entry)))
        for answer in answers(entry):
            assert has_chinese(answer) == chinese, f"line {number}"
            if chinese:
                assert 25 <= len(answer) <= 110, f"line {number}: {len(answer)} characters"
                assert answer[-1] in "。！？", f"line {number}"
            else:
                assert 15 <= len(answer.split()) <= 60, f"line {number}: {len(answer.split())} words"
                assert answer[-1] in ".!?", f"line {number}"


def test_no_control_tokens(corpus: list[Entry]) -> None:
    for number, entry in enumerate(corpus, 1):
        for text in strings(entry):
            assert CONTROL_TOKEN.search(text) is None, f"line {number}: {text}"
            assert all(unicodedata.category(c)[0] != "C" or c == "\n" for c in text), f"line {number}: {text!r}"


def test_enough_entries_of_each_kind(corpus: list[Entry]) -> None:
    chinese = sum(has_chinese("".join(questions(entry))) for entry in corpus)
    assert len(corpus) >= MIN_ENTRIES
    assert chinese >= MIN_ENTRIES_PER_LANGUAGE
    assert len(corpus) - chinese >= MIN_ENTRIES_PER_LANGUAGE
    assert sum("turns" in entry for entry in corpus) >= MIN_CONVERSATIONS
    assert {"用一句话回答。", "Answer in one sentence."} <= {entry["system"] for entry in corpus if "system" in entry}


def test_alphabet_fits_a_small_vocabulary(corpus: list[Entry]) -> None:
    alphabet = {character for entry in corpus for text in strings(entry) for character in text}
    chinese = set(filter(is_chinese, alphabet))
    assert len(chinese) <= MAX_CHINESE_CHARACTERS
    assert {c for c in alphabet - chinese if not c.isascii()} <= CHINESE_PUNCTUATION
