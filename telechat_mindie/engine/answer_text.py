"""The text of an answer as it grows: whole characters, up to the first stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from telechat_mindie.text.overlap import overlap


class Decoder(Protocol):
    """Decodes tokens one by one; `telechat_mindie.text.detokenizer.StreamDecoder` is one."""

    def put(self, ids: Iterable[int]) -> str:
        """The characters that are complete with these tokens."""

    def flush(self) -> str:
        """What is left of characters that were not completed."""


class AnswerText:
    """Emits an answer's text and ends it at a stop string.

    Text that may be the beginning of a stop string is held back until that is decided. Of several stop strings the one
    that is complete first ends the answer, and of those the longest; so the text does not depend on how it is cut into
    tokens.

    Args:
        decoder: a fresh one.
        stop: stop strings, none of them empty.
        include_stop: emit the stop string as well.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self.stopped = False

    def put(self, ids: Iterable[int]) -> str:
        """The text that these tokens let go; nothing once `stopped`."""
        return self._feed(self._decoder.put(ids))

    def flush(self) -> str:
        """End the answer: the text that was held back."""
        text = self._feed(self._decoder.flush())
        text, self._held = text + self._held, ""
        return text

    def _feed(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        ends = [
            (start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0
        ]  # the first place of each
        if ends:
            end, start = min(ends)
            self.stopped, self._held = True, ""
            return text[: end if self._include_stop else start]
        emitted = len(text) - max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[emitted:]
        return text[:emitted]
