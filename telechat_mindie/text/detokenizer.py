"""From ids to text: at once, through a window as MindIE streams, or token by token."""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telechat_mindie.errors import InputError
from telechat_mindie.text.control_tokens import CONTROL_IDS
from telechat_mindie.text.vocabulary import Vocabulary

BOT_ID = CONTROL_IDS["<_bot>"]
CLOSING_IDS = frozenset({CONTROL_IDS["<_end>"], CONTROL_IDS["<_pad>"]})

CONTEXT = 3
"""Tokens that a token's text depends on: a character has at most four bytes, and each may be a token."""


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


# One U+FFFD a byte, as sentencepiece decodes; Python's own "replace" writes one for several.
codecs.register_error("telechat_mindie.replace_each_byte", _replace_each_byte)


class Detokenizer:
    """Decodes ids of one vocabulary.

    Args:
        vocabulary: what the ids stand for.
        special_ids: ids that separate texts and are printed by name unless skipped; other control ids print nothing.
        hide_turn: never print the `<_bot>` that opens an answer, nor `<_end>` and `<_pad>` that close it. MindIE asks
            for control tokens to be skipped only where a request says so, which a TGI request cannot, and counts the
            closing token as part of the answer.
        as_transformers: where a text begins, and so drops the space that `encode` put there. False: behind every
            special token. True, as transformers with the published tokenizer class: at the very beginning, and behind
            the last special token that is printed. One difference is wanted: an answer begins behind `<_bot>`, and
            no answer begins with a space.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        special_ids: frozenset[int],
        hide_turn: bool = False,
        as_transformers: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.special_ids = special_ids
        self.hide_turn = hide_turn
        self.as_transformers = as_transformers

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of ids; a *slice* of a one-dimensional numpy array is read as a window of that array.

        MindIE streams by decoding `ids[previous:]` and `ids[previous:current]` and emitting what the first has more
        than the second; its ms wrapper then moves both marks on, whether or not it emitted something (MindIE-LLM
        v3.0.0.beta.2, mf_tokenizer_wrapper.py and single_req_infer_interface_base.cpp). With a token a step the window
        is two tokens wide, so a character of three or four byte tokens (an emoji) would never be whole in one. But the
        wrapper passes slices of one array, and numpy tells of a slice where it lies. Hence two meanings:

        - A list, or an array that is no slice, is a whole text. A cut-off character at its end is U+FFFD.
        - A slice holds the characters that are complete in it, each in the slice with its last byte; its first word
          keeps its space unless the array begins there or a control token stands before it.

        Args:
            token_ids: one id, a sequence of ids, or a one-dimensional array of integers.
            skip_special_tokens: leave out control tokens instead of printing their names.

        Raises:
            InputError: not ids, or an id outside the vocabulary.
        """
        ids = to_ids(token_ids)
        decoder = StreamDecoder(self, skip_special_tokens)
        before = _tokens_before(token_ids)
        if before is None:
            last = 0
            if self.as_transformers and not skip_special_tokens:
                last = next((at for at in range(len(ids), 0, -1) if ids[at - 1] in self.special_ids), 0)
            head = decoder.put(ids[:last])
            if last:
                decoder.begin_text()
            return head + decoder.put(ids[last:]) + decoder.flush()
        context = before[-CONTEXT:].tolist()
        if any(index not in self.special_ids for index in before[:-CONTEXT]):
            decoder.continue_text()
        # Nothing else that is cut off on the left of the context can matter: UTF-8 shows where a character begins, and
        # three tokens reach back to the first byte of any that ends in the slice.
        decoder.put(index for index in context if 0 <= index < self.vocabulary.size)
        return decoder.put(ids)


class StreamDecoder:
    """Decodes an answer token by token, and never emits a part of a character.

    The texts of all `put` and the final `flush` add up to what `Detokenizer.decode` makes of all ids at once; but where
    that drops a space behind the last special token, a stream, which does not know it for the last, prints it.

    Where a text begins, a leading space is sentencepiece's dummy prefix, which `encode` put there, and is dropped.

    Args:
        detokenizer: whose rules hold.
        skip_special_tokens: leave special tokens out.
        keep: ids of special tokens that are printed nevertheless.
    """

    def __init__(
        self, detokenizer: Detokenizer, skip_special_tokens: bool = True, keep: frozenset[int] = frozenset()
    ) -> None:
        self._detokenizer = detokenizer
        self._skip = skip_special_tokens
        self._keep = keep
        self._reset()

    def put(self, ids: Iterable[int]) -> str:
        """The characters that are complete with these ids.

        Raises:
            InputError: an id outside the vocabulary.
        """
        return "".join(map(self._put_one, ids))

    def flush(self) -> str:
        """End the text: U+FFFD for each byte of a character that was not completed. What follows is a new text."""
        text = self._utf8.decode(b"", final=True)
        self._reset()
        return text

    def _reset(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="telechat_mindie.replace_each_byte")
        self._is_empty = True  # no token yet
        self._has_text = False
        self._at_text_start = True
        self._closing = ""  # tokens that close the answer, unless more follows

    def begin_text(self) -> None:
        """What follows begins a text."""
        self._at_text_start = True

    def continue_text(self) -> None:
        """There was text before all of this."""
        self._has_text, self._at_text_start = True, False

    def _put_one(self, index: int) -> str:
        piece = self._detokenizer.vocabulary.piece(index)
        opens_answer, self._is_empty = self._is_empty and index == BOT_ID, False
        if index not in self._detokenizer.special_ids:
            if piece.is_control:
                return ""
            data = piece.data[1:] if self._at_text_start and piece.opens_word else piece.data
            self._at_text_start, self._has_text = index in self._detokenizer.vocabulary.added, True
            before, self._closing = self._closing, ""
            return before + self._utf8.decode(data)
        cut_off = self._utf8.decode(b"", final=True)
        is_skipped = self._skip and index not in self._keep
        if not self._detokenizer.as_transformers or index == BOT_ID:
            self._at_text_start = True
        else:
            self._at_text_start = is_skipped and not self._has_text
        if is_skipped:
            return cut_off
        name = piece.data.decode()
        if self._detokenizer.hide_turn:
            if opens_answer:
                return cut_off
            if index in CLOSING_IDS:
                self._closing += name
                return cut_off
        self._has_text = True
        before, self._closing = self._closing, ""
        return cut_off + before + name


def to_ids(token_ids: Any) -> list[int]:
    """Plain integers from an int, a sequence of ints, or anything with `tolist` (numpy, MindSpore, torch).

    Raises:
        InputError: not whole numbers in one dimension.
    """
    values = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    try:
        return [operator.index(value) for value in (values if isinstance(values, Iterable) else [values])]
    except TypeError:
        raise InputError(
            "are not a sequence of integers", where="token ids", advice="Use batch_decode for several sequences."
        ) from None


def _tokens_before(token_ids: Any) -> NDArray[Any] | None:
    """The ids before a slice of a one-dimensional array; None for anything else."""
    whole = token_ids.base if isinstance(token_ids, np.ndarray) else None
    if (
        not isinstance(whole, np.ndarray)
        or whole.ndim != 1
        or token_ids.ndim != 1
        or whole.dtype != token_ids.dtype
        or whole.strides != token_ids.strides
    ):
        return None
    return whole[: (token_ids.ctypes.data - whole.ctypes.data) // whole.itemsize]
