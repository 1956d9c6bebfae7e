"""tokenizer.json: a tokenizer.model in the form of the `tokenizers` library, with the same ids for every text.

What sentencepiece does, and how it is said there (sentencepiece's bpe_model.cc, tokenizers' models/bpe):

- It puts a space before a text and writes U+2581 for spaces: the normalizer. The library normalises each stretch
  between added tokens by itself, so each has its own dummy space, as in `TelechatTokenizer`.
- It cuts user-defined pieces (digits, `_`, a newline, `<reserve1>`) out of the text first, the longest at each place,
  and never joins them with a neighbour: the pre-tokenizer. A piece that stands alone is found whole (`ignore_merges`),
  since nothing merges letters to `<reserve1>`.
- It joins the two neighbours whose union is the piece with the best score, the leftmost first: the merges, every way to
  cut a piece in two pieces, by the score of the whole.
- A character without a piece becomes its UTF-8 bytes: `byte_fallback`. Unknown tokens cannot come of it.

Decoded, the dummy space goes again: the one that begins a text, and the one behind an added token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from telechat_mindie.checkpoint.formats.bounds import open_bounded
from telechat_mindie.checkpoint.formats.wire import LENGTH_DELIMITED, VARINT, Message
from telechat_mindie.errors import TokenizerError
from telechat_mindie.text.control_tokens import AddedToken
from telechat_mindie.text.tokenizer import TelechatTokenizer

SPACE = "\u2581"  # how sentencepiece writes a space

NORMAL, USER_DEFINED = 1, 4
"""Types of pieces that a text can become (sentencepiece_model.proto, ModelProto.SentencePiece.Type)."""

BPE = 2
"""TrainerSpec.ModelType; 1, which a file need not say, is the unigram model."""


def tokenizer_json(file: Path, tokenizer: TelechatTokenizer) -> dict[str, Any]:
    """The content of tokenizer.json.

    Args:
        file: the tokenizer.model.
        tokenizer: what was made of it, with the added tokens that count.

    Raises:
        CheckpointError: the file is damaged.
        TokenizerError: it is no BPE model.
    """
    types = _piece_types(file)
    pieces, scores = tokenizer.pieces()
    names = _unique(pieces, tokenizer.added_tokens)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token.id,
                "content": token.content,
                "single_word": token.single_word,
                "lstrip": token.lstrip,
                "rstrip": token.rstrip,
                "normalized": False,
                "special": token.special,
            }
            for token in sorted(tokenizer.added_tokens, key=lambda token: token.id)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": _split([piece for piece, kind in zip(pieces, types, strict=True) if kind == USER_DEFINED]),
        "post_processor": _post_processor(tokenizer),
        "decoder": _decoder(tokenizer.added_tokens),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": True,
            "vocab": {name: index for index, name in names.items()},
            "merges": [f"{left} {right}" for left, right in _merges(pieces, scores, types)],
        },
    }


def _piece_types(file: Path) -> list[int]:
    """The type of each piece, which sentencepiece's own interface does not tell of user-defined ones."""
    types, model_type = [], 1
    with open_bounded(file) as opened:
        model = Message(opened, 0, opened.size, "sentencepiece model")
        while not model.is_read():
            number, wire = model.field()
            if (number, wire) == (1, LENGTH_DELIMITED):
                types.append(_varint_of(model.submessage(), 3, NORMAL))
            elif (number, wire) == (2, LENGTH_DELIMITED):
                model_type = _varint_of(model.submessage(), 3, model_type)
            else:
                model.skip_field(wire)
    if model_type != BPE:
        raise TokenizerError(
            "is not a BPE model, as every TeleChat2's is", where=file, found=f"model type {model_type}"
        )
    return types


def _varint_of(message: Message, wanted: int, default: int) -> int:
    found = default
    while not message.is_read():
        number, wire = message.field()
        if (number, wire) == (wanted, VARINT):
            found = message.varint()
        else:
            message.skip_field(wire)
    return found


def _unique(pieces: Sequence[str], added: Sequence[AddedToken]) -> dict[int, str]:
    """Id -> name: the pieces', and over them the added tokens'. A piece that no text becomes any more, since a token of
    another id has its name, gets a name of its own."""
    tokens = {token.id: token.content for token in added}
    taken = set(tokens.values())
    names = {index: f"<{index}>{SPACE}{SPACE}" if piece in taken else piece for index, piece in enumerate(pieces)}
    return dict(sorted((names | tokens).items()))


def _merges(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(left, right), the best first."""
    known = {piece for piece, kind in zip(pieces, types, strict=True) if kind == NORMAL}
    for index in sorted(range(len(pieces)), key=lambda index: -scores[index]):  # stable: equals by id
        piece = pieces[index]
        if types[index] != NORMAL:
            continue
        for at in range(1, len(piece)):
            if piece[:at] in known and piece[at:] in known:
                yield piece[:at], piece[at:]


def _split(user_defined: Sequence[str]) -> dict[str, Any] | None:
    if not user_defined:
        return None
    longest_first = sorted(user_defined, key=len, reverse=True)
    pattern = "|".join(re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", piece) for piece in longest_first)
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _post_processor(tokenizer: TelechatTokenizer) -> dict[str, Any] | None:
    """What puts `<_start>` before a text and `<_end>` behind it, where the tokenizer does."""
    before = [(tokenizer.bos_token, tokenizer.bos_token_id)] if tokenizer.add_bos_token else []
    after = [(tokenizer.eos_token, tokenizer.eos_token_id)] if tokenizer.add_eos_token else []
    if not before and not after:
        return None

    def framed(sequence: str) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": sequence, "type_id": 0}}
        first, last = ([{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in part] for part in (before, after))
        return [*first, text, *last]

    return {
        "type": "TemplateProcessing",
        "single": framed("A"),
        "pair": framed("A") + framed("B"),
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in before + after},
    }


def _decoder(added: Sequence[AddedToken]) -> dict[str, Any]:
    behind = "|".join(f"(?<={re.escape(token.content)})" for token in added)
    return {
        "type": "Sequence",
        "decoders": [
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Replace", "pattern": {"Regex": rf"(?:\A|{behind}){SPACE}"}, "content": ""},
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        ],
    }
