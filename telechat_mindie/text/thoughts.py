"""The thought that a thinking model writes before its answer: `<think>`, the thought, `</think>`.

T1 and TeleChat2.5 have a chat template that opens the thought in the prompt (a line `<_bot><think>`), so that the
answer holds its end only; other templates leave the opening to the model. What is split off here is what vLLM's
reasoning parsers (deepseek_r1, qwen3) split off, and the rest of the text stays as it is, white space included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from telechat_mindie.text.conversation import ANSWER_ROLES
from telechat_mindie.text.overlap import overlap

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from telechat_mindie.text.tokenizer import TelechatTokenizer

TAGS = BEGIN, END = "<think>", "</think>"
_TAIL = 16  # tokens of a prompt that are looked at: a tag spelt out in letters, and line ends
# With its opening tag, or without it, where the closing one has a line of its own.
_THOUGHT = re.compile(rf"\s*{BEGIN}.*?{END}|.*?^{END}$", re.DOTALL | re.MULTILINE)


class Piece(NamedTuple):
    """A part of an answer's text."""

    text: str
    is_thought: bool = False


class ThoughtParser:
    """Takes an answer's text in pieces of any size and tells the thought at its beginning from what follows.

    A thought that the answer's end cuts off is a thought nevertheless. Tags further on in the answer are text.

    Args:
        opened: the prompt ended with the opening tag; an answer that repeats it is no different.
        expected: False takes all for the answer.
    """

    def __init__(self, *, opened: bool = False, expected: bool = True) -> None:
        self.expected = expected
        self._is_undecided = expected  # whether the answer begins with the opening tag
        self._is_inside = opened
        self._held = ""  # text that may be a tag

    def put(self, text: str) -> Iterator[Piece]:
        """What these characters make certain; pieces are never empty."""
        text, self._held = self._held + text, ""
        if self._is_undecided:
            begin = text.lstrip()
            if len(begin) < len(BEGIN) and BEGIN.startswith(begin):
                self._held = text
                return
            self._is_undecided = False
            if begin.startswith(BEGIN):
                self._is_inside, text = True, begin.removeprefix(BEGIN)
        if self._is_inside:
            thought, tag, text = text.partition(END)
            if not tag:
                kept = overlap(thought, END)
                thought, self._held = thought[: len(thought) - kept], thought[len(thought) - kept :]
            self._is_inside = not tag
            if thought:
                yield Piece(thought, is_thought=True)
        if text:
            yield Piece(text)

    def flush(self) -> Iterator[Piece]:
        """What is left at the answer's end."""
        if self._held:
            yield Piece(self._held, self._is_inside)
        self._held = ""


def thought_parser(
    tokenizer: TelechatTokenizer, prompt_ids: Sequence[int] | NDArray[np.int64], template: str
) -> ThoughtParser:
    """The parser for an answer to this prompt: the prompt's end says whether the thought is open, the chat template
    that wrote it whether the model thinks at all."""
    prompt_end = tokenizer.decode(list(prompt_ids[-_TAIL:])).rstrip()
    opened = prompt_end.endswith(BEGIN)
    return ThoughtParser(opened=opened, expected=opened or BEGIN in template)


def without_thought(text: str) -> str:
    """An answer as the next turn of a conversation has it. The opening tag may have been in the prompt."""
    thought = _THOUGHT.match(text)
    return text[thought.end() :].lstrip("\n") if thought else text


def without_thoughts(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """A conversation as a thinking model has to see it: most chat templates drop earlier thoughts; for one that only
    opens a new thought, this does."""
    if BEGIN not in template or END in template:
        return messages
    return [
        {**message, "content": without_thought(message["content"])} if message["role"] in ANSWER_ROLES else message
        for message in messages
    ]
