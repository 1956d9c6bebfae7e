"""The shape of a TeleChat2 model, and what follows from it. `config_json` knows how files spell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from telechat_mindie.config_json import read_fields, telechat_keys
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import ConfigError
from telechat_mindie.reading import read_json

MAX_RANKS = 1024
"""Far beyond any split: tp divides the kv heads."""

MAX_STACKS = 1 << 15
"""Layers times experts at most, for the reason that `config_json.LIMITS` gives: the largest published model has
61 x 384."""


@dataclass(frozen=True)
class TelechatConfig:
    """Sizes and constants of one TeleChat2 model. Counts are elements, lengths are tokens.

    `raw` is the config.json as it was read; nothing else here depends on it.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    num_kv_heads: int = 0  # 0: one a query head
    norm_eps: float = 1e-5
    seq_length: int = 8192
    training_seqlen: int = 8192
    base_seqlen: int = 8192
    rope_theta: float = 10000.0  # hard-wired in the 115B's published code; later ones give their own
    num_experts: int = 0  # 0: a dense model
    experts_per_token: int = 0
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = field(default=2, compare=False)  # generation_config.json may name others
    pad_token_id: int = 3
    tie_word_embeddings: bool = False
    embed_layernorm: bool = False
    torch_dtype: str | None = field(default=None, compare=False)  # of the weights, not of the model
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        self._check_divides("num_heads", self.num_heads, "hidden_size", self.hidden_size)
        self._check_divides("num_key_value_heads", self.num_kv_heads, "num_heads", self.num_heads)
        if self.head_dim % 2:
            raise ConfigError("head dimension is odd", where="hidden_size / n_head", found=self.head_dim)
        if (self.num_experts > 0) != (self.experts_per_token > 0):
            raise ConfigError(
                "names experts without saying how many a token uses, or the reverse",
                where="num_local_experts, num_experts_per_tok",
                found=f"{self.num_experts} and {self.experts_per_token}",
            )
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                "a token cannot use more experts than there are",
                where="num_experts_per_tok",
                expected=f"at most {self.num_experts}",
                found=self.experts_per_token,
            )
        if self.num_layers * self.num_experts > MAX_STACKS:
            raise ConfigError(
                "has more layers times experts than any model",
                where="n_layer, num_local_experts",
                expected=f"at most {MAX_STACKS}",
                found=f"{self.num_layers} x {self.num_experts}",
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            object.__setattr__(self, name, checked_token_ids(getattr(self, name), self.vocab_size, name))

    @staticmethod
    def _check_divides(small_name: str, small: int, large_name: str, large: int) -> None:
        if large % small:
            raise ConfigError(
                f"does not divide {large_name}", where=small_name, expected=f"a divisor of {large}", found=small
            )

    @cached_property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @cached_property
    def kv_size(self) -> int:
        """Width of one token's keys (or values) of a layer: kv heads x head dimension."""
        return self.num_kv_heads * self.head_dim

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @cached_property
    def parameter_count(self) -> int:
        """Elements of all tensors, as the published checkpoints count them (113,282,916,352 for the 115B)."""
        return self._count(self.num_experts)

    @cached_property
    def active_parameter_count(self) -> int:
        """Elements that one token meets: all of a dense model; attention, router and the chosen experts of a MoE."""
        return self._count(self.experts_per_token)

    def _count(self, experts: int) -> int:
        hidden, ffn = self.hidden_size, self.ffn_size
        mlp = 3 * hidden * ffn + hidden  # gate, up, down and down's bias
        if self.is_moe:
            mlp = experts * mlp + self.num_experts * hidden  # the router has no bias
        attention = 2 * hidden * hidden + 2 * self.kv_size * hidden + hidden  # query, dense, key_value, dense's bias
        layer = attention + mlp + 2 * hidden
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * hidden
        return embeddings + self.num_layers * layer + hidden * (2 if self.embed_layernorm else 1)

    def weight_bytes(self, dtype: str) -> int:
        return self.parameter_count * DTYPES[dtype].itemsize

    def kv_bytes_per_token(self, dtype: str, tp: int = 1) -> int:
        """Key and value bytes of one token on one of `tp` ranks, all layers."""
        return self.num_layers * 2 * self.kv_size // tp * DTYPES[dtype].itemsize

    def allowed_tp(self) -> tuple[int, ...]:
        """The tensor parallel sizes that divide heads, kv heads, feed-forward and vocabulary alike."""
        sizes = (self.num_heads, self.num_kv_heads, self.ffn_size, self.vocab_size)
        return tuple(
            tp for tp in range(1, min(MAX_RANKS, self.num_kv_heads) + 1) if all(size % tp == 0 for size in sizes)
        )

    def check_tp(self, tp: int) -> None:
        """Raises ConfigError, naming the allowed values, where the model cannot be split into `tp` ranks."""
        allowed = self.allowed_tp()
        if tp not in allowed:
            raise ConfigError(
                "the model cannot be split into that many ranks",
                where="tensor parallel size",
                expected=f"one of {', '.join(map(str, allowed))}",
                found=tp,
                advice=f"It must divide {self.num_heads} heads, {self.num_kv_heads} kv heads, feed-forward "
                f"{self.ffn_size} and vocabulary {self.vocab_size}.",
            )

    @classmethod
    def from_directory(cls, directory: Path) -> TelechatConfig:
        """Read `directory`/config.json.

        Raises:
            ConfigError: the file is missing or malformed, or `from_dict` refuses it.
        """
        return cls.from_file(directory / "config.json")

    @classmethod
    def from_file(cls, path: Path) -> TelechatConfig:
        """Read a config.json. Raises ConfigError as `from_directory`."""
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(str(error), where=path) from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TelechatConfig:
        """From the keys of a config.json, in any of `config_json.SPELLINGS`.

        Raises:
            ConfigError: not a TeleChat2 config, a required key missing, a value of the wrong type, two spellings that
                contradict each other, or a feature that the published modelling code does not have. The key is named.
        """
        data = telechat_keys(data)
        values = read_fields(data)
        head_dim = data.get("head_dim")
        config = cls(**values, raw=dict(data))
        if head_dim is not None and head_dim != config.head_dim:
            raise ConfigError(
                "contradicts hidden_size / n_head", where="head_dim", expected=config.head_dim, found=head_dim
            )
        return config


def checked_token_ids(value: object, vocab_size: int, where: object) -> int | tuple[int, ...]:
    """An id, or the different ids of a list, as transformers takes both for `eos_token_id`; a list of one is its id.

    Raises:
        ConfigError: something else, or an id that the vocabulary does not have.
    """
    ids = tuple(dict.fromkeys(value)) if isinstance(value, (list, tuple)) else (value,)
    if not ids or any(type(one) is not int for one in ids):
        raise ConfigError("has the wrong type", where=where, expected="int or a list of them", found=repr(value))
    for one in ids:
        if not 0 <= one < vocab_size:
            raise ConfigError("id lies outside the vocabulary", where=where, expected=f"< {vocab_size}", found=one)
    return ids if len(ids) > 1 else ids[0]
