"""The pieces of a TeleChat2 `tokenizer.model`: loading and checking it, and encoding one stretch of plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from telechat_mindie.errors import InputError, TokenizerError
from telechat_mindie.reading import read_bytes
from telechat_mindie.text.control_tokens import CONTROL_IDS, AddedToken, read_added_tokens

UNKNOWN_ID = 0

_MAX_BYTES = 64 << 20  # the published file has 2.2 MB
_SPACE = "\u2581"  # how sentencepiece writes a space
_PROBE = "  a   b "


class Piece(NamedTuple):
    """What one id stands for."""

    data: bytes  # UTF-8, or one byte of it where the piece is a byte of a character without a piece of its own
    is_control: bool  # never part of a text: a control token, or the unknown token
    opens_word: bool  # begins with the space that sentencepiece puts before a word


class Vocabulary:
    """A sentencepiece model with the id layout of TeleChat2.

    Args:
        file: the `tokenizer.model`.
        vocab_size: rows of the model's embedding; None where it is not known.
        added: a tokenizer_config.json's `added_tokens_decoder`, which wins over the names in the file.

    Attributes:
        added: the tokens of `added` that have an embedding, by id.

    Raises:
        TokenizerError: `added` is malformed, or the file is missing or damaged, lacks TeleChat2's layout, or has ids
            beyond `vocab_size`.
    """

    def __init__(self, file: Path, vocab_size: int | None = None, added: object = None) -> None:
        if vocab_size is not None and (not isinstance(vocab_size, int) or vocab_size <= 0):
            raise TokenizerError("is not a size", where="vocab_size", expected="a number", found=repr(vocab_size))
        self._processor = _load(file)
        self.num_pieces: int = len(self._processor)
        if vocab_size is not None and self.num_pieces > vocab_size:
            raise TokenizerError(
                "has more pieces than the model's vocabulary, so it could produce ids without an embedding",
                where=file,
                expected=f"at most {vocab_size}",
                found=self.num_pieces,
                advice="Use the tokenizer.model that was published with this checkpoint.",
            )
        self.size = self.num_pieces if vocab_size is None else vocab_size
        tokens = [] if added is None else read_added_tokens(added, self.size)
        self.added: dict[int, AddedToken] = {token.id: token for token in tokens}
        self._added_ids = {token.content: token.id for token in tokens}
        self._pieces: dict[int, Piece] = {}
        self._check_layout(file)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token; sentencepiece puts a space before its first word.

        `text` must have passed `telechat_mindie.text.chat_template.check_text`.
        """
        return list(self._processor.encode(text, out_type=int))

    def piece(self, index: int) -> Piece:
        """What an id stands for; an id that has an embedding but no piece stands for the empty text.

        Raises:
            InputError: an id outside the vocabulary.
        """
        piece = self._pieces.get(index)
        if piece is None:
            piece = self._pieces[index] = self._look_up(index)
        return piece

    def _look_up(self, index: int) -> Piece:
        if (token := self.added.get(index)) is not None:
            return Piece(token.content.encode(), token.special, False)
        if index >= self.num_pieces or index < 0:
            self.check_id(index)
            return Piece(b"", False, False)
        name: str = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return Piece(bytes([int(name[1:-1], 16)]), False, False)
        if self._processor.is_control(index) or index == UNKNOWN_ID:
            return Piece(name.encode(), True, False)
        return Piece(name.replace(_SPACE, " ").encode(), False, name.startswith(_SPACE))

    def check_id(self, index: int) -> None:
        """Refuse an id that the model cannot have produced.

        Raises:
            InputError: an id outside the vocabulary.
        """
        if not 0 <= index < self.size:
            raise InputError(
                "is not in the vocabulary", where="token id", expected=f"0 to {self.size - 1}", found=index
            )

    def name_of(self, index: int) -> str:
        """The piece of an id as sentencepiece writes it, with U+2581 for a space."""
        self.check_id(index)
        if (token := self.added.get(index)) is not None:
            return token.content
        return str(self._processor.id_to_piece(index)) if index < self.num_pieces else ""

    def id_of(self, name: str) -> int:
        """The id of a piece, or that of `<_unk>`."""
        return self._added_ids.get(name, int(self._processor.piece_to_id(name)))

    def pieces(self) -> tuple[list[str], list[float]]:
        """The name and the score of every piece of the file."""
        ids = list(range(self.num_pieces))
        return self._processor.id_to_piece(ids), self._processor.get_score(ids)

    def control_ids(self) -> frozenset[int]:
        """Ids that are never part of a text."""
        flags = self._processor.is_control(list(range(self.num_pieces)))
        ids = {UNKNOWN_ID, *(index for index, flag in enumerate(flags) if flag)}
        special = {index: token.special for index, token in self.added.items()}
        return frozenset({index for index in ids | special.keys() if special.get(index, True)})

    def _check_layout(self, file: Path) -> None:
        processor = self._processor
        if not processor.is_unknown(UNKNOWN_ID):
            fault = f"is not a TeleChat2 tokenizer: id {UNKNOWN_ID} is not its unknown token"
            raise TokenizerError(fault, where=file, found=processor.id_to_piece(UNKNOWN_ID))
        for name, index in CONTROL_IDS.items():
            found = self.name_of(index) if index < self.size else ""
            if found != name or not self.piece(index).is_control:
                fault = f"is not a TeleChat2 tokenizer: id {index} is not the control token {name}"
                raise TokenizerError(fault, where=file, found=found or "no piece")
        # A file without its last record still loads, with sentencepiece's default normaliser, which drops repeated
        # spaces.
        if processor.decode(processor.encode(_PROBE)) != _PROBE:
            raise TokenizerError(
                "is damaged or not a TeleChat2 tokenizer: it does not keep the spaces of a text",
                where=file,
                advice="Download tokenizer.model again.",
            )


def _load(file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    advice = "Copy tokenizer.model from the checkpoint, or download it again."
    data = read_bytes(file, _MAX_BYTES, TokenizerError, advice)
    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(data)
        processor.id_to_piece(list(range(len(processor))))  # sentencepiece does not mind pieces that are not UTF-8
    except (RuntimeError, UnicodeDecodeError):
        raise TokenizerError("is damaged or not a sentencepiece model", where=file, advice=advice) from None
    return processor
