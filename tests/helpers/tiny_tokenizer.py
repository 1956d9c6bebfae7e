"""Trains a sentencepiece model of a few hundred pieces with TeleChat2's settings and id layout."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer

VOCAB_SIZE = 480

CORPUS = [
    "Soy sauce comes in two kinds, a light one for salt and a dark one for colour.",
    "The light kind is thin and salty, and you add it at the end of the cooking.",
    "The dark kind is thick and sweet, and you add it early, so that it can colour the meat.",
    "生抽味道咸，颜色浅，适合调味。",
    "老抽颜色深，适合上色，味道微甜。",
    "红烧肉先放老抽，最后放生抽。",
    "def add(first, second):\n    return first + second",
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>',
]


def train_tiny_tokenizer(directory: Path, *, vocab_size: int = VOCAB_SIZE, **options: Any) -> Path:
    """Write `tokenizer.model` to an existing directory and return its path.

    Args:
        directory: where to.
        vocab_size: pieces, of which 9 are control tokens, 13 user-defined and 256 bytes.
        **options: sentencepiece settings in place of TeleChat2's, to make a tokenizer that is not one.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,  # leaves the rarest characters to the byte pieces
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": 3,
        "unk_piece": "<_unk>",
        "bos_piece": "<_start>",
        "eos_piece": "<_end>",
        "pad_piece": "<_pad>",
        "control_symbols": ["<_user>", "<_bot>", "<_system>", "<_observation>", "<_sep>"],
        "user_defined_symbols": [*"0123456789", "_", "\n", "\t"],
        "minloglevel": 2,
    }
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(CORPUS * 4), model_writer=model, **(settings | options))
    file = directory / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return file


def write_tiny_checkpoint(directory: Path, **settings: Any) -> Path:
    """A directory with a tokenizer.model, a config.json and a tokenizer_config.json that holds `settings`."""
    train_tiny_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory
