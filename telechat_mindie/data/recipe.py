"""The rows of mindformers' research/telechat2/telechat_preprocess.py (r1.6.0), bit for bit, its faults included.

For a run that must repeat an earlier one. What is odd about the rows: a system text becomes part of a question or is
lost, control tokens in a text become control ids, the last row and examples longer than a row are left out in silence,
padding stands on the left with every `<_start>` behind it, and a missing answer trains the word "None".
"""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from telechat_mindie.data.packing import IGNORED
from telechat_mindie.data.records import Record
from telechat_mindie.errors import InputError
from telechat_mindie.text.conversation import check_text
from telechat_mindie.text.vocabulary import Vocabulary

SEED = 2024

_TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


@dataclass(frozen=True)
class Markers:
    """The tokens that frame turns; the recipe lets each be another, and the first be empty.

    Raises:
        InputError: one of the others is empty.
    """

    start: str = "<_start>"
    user: str = "<_user>"
    bot: str = "<_bot>"
    end: str = "<_end>"
    pad: str = "<_pad>"

    def __post_init__(self) -> None:
        for name in ("user", "bot", "end", "pad"):
            if not getattr(self, name):
                raise InputError("is empty", where=f"--{name}_token", advice="Only the start token may be left out.")


class RecipeTokenizer:
    """mindformers' TelechatTokenizer: sentencepiece between tokens that are found wherever they stand in a text.

    Those that tokenizer.model lacks get ids behind its last piece, which no embedding has.
    """

    def __init__(self, file: Path) -> None:
        self._vocabulary = Vocabulary(file)
        self._ids: dict[str, int] = {}
        for token in ("<_start>", "<_end>", "<unk>", "<_pad>", "<_user>", "<_bot>", "<_system>", *_TOOL_TOKENS):
            known = self._vocabulary.id_of(token)
            new = self._vocabulary.num_pieces + sum(
                index >= self._vocabulary.num_pieces for index in self._ids.values()
            )
            self._ids[token] = known if self._vocabulary.name_of(known) == token else new
        self._pattern = re.compile("(" + "|".join(map(re.escape, self._ids)) + ")")

    def id_of(self, token: str) -> int:
        return self._ids.get(token, self._vocabulary.id_of(token))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._pattern.split(text):
            if piece in self._ids:
                ids.append(self._ids[piece])
            elif piece:
                ids += self._vocabulary.encode(piece)
        return ids


class Recipe:
    """The recipe for one tokenizer and row length.

    Args:
        tokenizer_file: tokenizer.model.
        max_length: tokens of a row less one, as the recipe's `--max_length`.
        markers: the tokens that frame turns.
        seed: of the shuffle.
    """

    def __init__(self, tokenizer_file: Path, max_length: int, markers: Markers | None = None, seed: int = SEED) -> None:
        self._tokenizer = RecipeTokenizer(tokenizer_file)
        self._length = max_length + 1
        self._marks = markers or Markers()
        self._seed = seed

    def rows(
        self, records: Iterable[Record], scratch: IO[bytes], drop: Callable[[str, int], None]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Token ids and labels of each row, [max_length + 1] int32 each.

        Args:
            records: all of them.
            scratch: a file open for reading and writing, which holds them until they are shuffled.
            drop: told of each record that comes into no row, by its place and tokens.

        Raises:
            InputError: a record on which the recipe fails, or a row of another length, as it makes them where a system
                text stands in front and no start token is put there.
        """
        offsets = array("Q", [0])
        fields: set[str] = set()
        for record in records:
            line, types = self._line(record)
            fields |= types
            if len(fields) > 1:
                raise InputError("mixes texts and numbers", where=f"{record.where}: output", advice=_DEFAULT_MODE)
            entry = f"{record.where}\0{check_text(line, record.where)}"
            offsets.append(offsets[-1] + scratch.write(entry.encode()))
        order = list(range(len(offsets) - 1))
        random.Random(self._seed).shuffle(order)

        def entry_at(index: int) -> tuple[str, str]:
            scratch.seek(offsets[index])
            where, _, line = scratch.read(offsets[index + 1] - offsets[index]).decode().partition("\0")
            return where, line

        packed: list[tuple[str, str, int]] = []
        used = 0
        for where, line in map(entry_at, order):
            length = len(self._encode(line)[0])
            if used + length < self._length:
                packed.append((where, line, length))
                used += length
                continue
            text = self._marks.pad * (self._length - used) + "".join(line for _, line, _ in packed)
            if self._marks.user in text:
                yield self._row(text)
            packed, used = [], 0
            if length < self._length:
                packed, used = [(where, line, length)], length
            else:
                drop(where, length)
        for where, _, length in packed:
            drop(where, length)

    def _line(self, record: Record) -> tuple[str, set[str]]:
        """A conversation in one text, and the kind of its answer."""
        marks, fields = self._marks, record.parse()
        question, answer = fields.get("input"), fields.get("output")
        if not isinstance(question, str):
            raise InputError("is not a text", where=f"{record.where}: input", advice=_DEFAULT_MODE)
        question = question.replace("<_user>", marks.user).replace("<_bot>", marks.bot)
        if not question.startswith(marks.user):
            question = marks.user + question
        if marks.bot not in question:
            text = question + marks.bot + str(answer) + marks.end
        elif isinstance(answer, str):
            turns = question.split(marks.user)[1:]
            closed = (turn + (marks.end if marks.bot in turn else marks.bot) for turn in turns)
            text = "".join(marks.user + turn for turn in closed) + answer + marks.end
        else:
            raise InputError("is not a text", where=f"{record.where}: output", advice=_DEFAULT_MODE)
        return marks.start + text, set() if answer is None else {type(answer).__name__}

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        marks, id_of = self._marks, self._tokenizer.id_of
        padding = 0
        while text.startswith(marks.pad):
            text = text[len(marks.pad) :]
            padding += 1
        ids: list[int] = []
        labels: list[int] = []
        starts = marks.start and marks.start in text
        for conversation in text.split(marks.start)[1:] if starts else [text]:
            questions = [turn.split(marks.bot)[0] for turn in conversation.split(marks.user)[1:]]
            answers = [turn.split(marks.bot)[-1] for turn in conversation.split(marks.end)[:-1]]
            for question, answer in zip(questions, answers, strict=False):
                asked = [id_of(marks.user), *self._tokenizer.encode(question), id_of(marks.bot)]
                said = [*self._tokenizer.encode(answer), id_of(marks.end)]
                ids += asked + said
                labels += [IGNORED] * len(asked) + said
            if starts:
                ids, labels = [id_of(marks.start), *ids], [IGNORED, *labels]
        return [id_of(marks.pad)] * padding + ids, [IGNORED] * padding + labels

    def _row(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = self._encode(text)
        if len(ids) != self._length:
            raise InputError(
                "the recipe makes a row of another length of these records",
                where="--compat",
                expected=self._length,
                found=len(ids),
                advice=_DEFAULT_MODE,
            )
        return np.array(ids, np.int32), np.array(labels, np.int32)


_DEFAULT_MODE = "The recipe fails on it; leave --compat out."
