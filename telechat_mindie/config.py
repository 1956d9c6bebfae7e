"""The shape of a TeleChat2 model, from any spelling of its config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from telechat_mindie.dtypes import DTYPES, WEIGHT_DTYPES
from telechat_mindie.errors import ConfigError
from telechat_mindie.foreign import ANOTHER_ARCHITECTURE, refuse_foreign
from telechat_mindie.reading import read_json
from telechat_mindie.units import INT32_MAX

MAX_RANKS = 1024
"""Far beyond any split: tp divides the kv heads."""

LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "num_layers": 1 << 10,
    "num_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "ffn_size": 1 << 24,
    "moe_ffn_size": 1 << 24,
    "num_experts": 1 << 10,
}
"""The largest sizes that are believed; what is not named here goes up to INT32_MAX.

Whoever plans, converts or checks a model lists its layers, experts and ranks before it looks at a weight, so a
config.json must not make these lists long. Each limit is eight times and more what any published model has (126 layers,
512 experts, 262,144 tokens, 18,432 wide, 128 heads)."""

MAX_STACKS = 1 << 15
"""Layers times experts at most, for the same reason: the largest published model has 61 x 384."""

MODEL_TYPES = ("telechat", "telechat2", "telechat2_moe")
ARCHITECTURES = ("telechatforcausallm", "telechat2forcausallm", "telechatmoeforcausallm", "telechat2moeforcausallm")

SPELLINGS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "hidden_size": ("hidden_size", "n_embed", "n_embd"),
    "num_layers": ("n_layer", "num_hidden_layers", "num_layers"),
    "num_heads": ("n_head", "num_attention_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "ffn_size": ("ffn_hidden_size", "intermediate_size", "n_inner"),
    "norm_eps": ("layer_norm_epsilon", "rms_norm_eps"),
    "seq_length": ("seq_length", "max_position_embeddings"),
    "training_seqlen": ("training_seqlen", "pretrain_seqlen"),
    "base_seqlen": ("base_seqlen",),
    "rope_theta": ("rope_theta", "theta", "rope_parameters.rope_theta", "rope_scaling.rope_theta"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts", "expert_num"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_chosen", "moe_topk"),
    "moe_ffn_size": ("moe_intermediate_size",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "embed_layernorm": ("embed_layernorm",),
    "torch_dtype": ("torch_dtype", "dtype"),
}
"""Field -> the keys that name it in the wild (published configs, vLLM's attribute map, mindformers' yamls).

A dot leads into an object: transformers 5 writes `rope_parameters` where transformers 4 had rope_theta at the top."""

LLAMA_SECTION = "telechat2"
"""The key of a Llama form's config.json (`checkpoint.llama`) under which the TeleChat2's own keys stand."""

MAX_THETA = 1e12
"""Far beyond any base; what Dynamic NTK makes of it still fits a float32."""

FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "num_shared_experts": (0, None),
    "n_shared_experts": (0, None),
    "shared_expert_num": (0, None),
    "attention_bias": (False,),
}
"""Keys that would change the weights: no published TeleChat2 has another value. `computation.py` has the others."""


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
        """From the keys of a config.json, in any of SPELLINGS.

        Raises:
            ConfigError: not a TeleChat2 config, a required key missing, a value of the wrong type, two spellings that
                contradict each other, or a feature that the published modelling code does not have. The key is named.
        """
        data = _of_llama_form(data)
        _check_family(data)
        _check_fixed(data)
        values = {name: value for name in SPELLINGS if (value := _one_value(data, name)) is not None}
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads"):
            if name not in values:
                raise ConfigError("key is missing", where=" / ".join(SPELLINGS[name]))
        moe_ffn_size = values.pop("moe_ffn_size", None)
        if values.get("num_experts") and moe_ffn_size is not None:
            values["ffn_size"] = moe_ffn_size
        if "ffn_size" not in values:
            raise ConfigError("key is missing", where=" / ".join(SPELLINGS["ffn_size"]))
        # The published code crashes without base_seqlen; equal lengths mean no extension, which is what is meant.
        trained = values.setdefault("training_seqlen", values.get("seq_length", 8192))
        values.setdefault("seq_length", trained)
        values.setdefault("base_seqlen", trained)
        values["rope_theta"] = float(values.get("rope_theta", cls.rope_theta))
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


def _of_llama_form(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a Llama form's config.json says of the TeleChat2 that it was made of; any other file's content itself.

    A tool that quantised or trained the Llama changes the file around the section.
    """
    section = data.get(LLAMA_SECTION)
    if data.get("model_type") != "llama" or not isinstance(section, Mapping):
        return data
    changed = {key: data[key] for key in ("quantization_config", *SPELLINGS["torch_dtype"]) if key in data}
    stored = {key: value for key, value in section.items() if key not in SPELLINGS["torch_dtype"]}
    return {"model_type": MODEL_TYPES[0]} | stored | changed


def _check_family(data: Mapping[str, Any]) -> None:
    refuse_foreign("config", _facts(data), None, ConfigError)
    model_type = data.get("model_type")
    architectures = data.get("architectures") or []
    if model_type is None and not architectures:
        raise ConfigError("names no model family", where="model_type", expected=f"one of {', '.join(MODEL_TYPES)}")
    if model_type is not None and model_type not in MODEL_TYPES:
        raise ConfigError(
            "is not a TeleChat2 model",
            where="model_type",
            expected=f"one of {', '.join(MODEL_TYPES)}",
            found=model_type,
            advice=ANOTHER_ARCHITECTURE,
        )
    if not isinstance(architectures, list) or any(str(name).lower() not in ARCHITECTURES for name in architectures):
        raise ConfigError(
            "is not a TeleChat2 model",
            where="architectures",
            expected="TelechatForCausalLM",
            found=architectures,
            advice=ANOTHER_ARCHITECTURE,
        )


def _facts(data: Mapping[str, Any]) -> Iterator[str]:
    """`key=value` of what tells other models and quantised ones, in lower case."""
    given = dict(data)
    if isinstance(inner := given.pop("quantization_config", None), Mapping):
        given |= {f"quantization_config.{name}": value for name, value in inner.items()}
    for key, value in given.items():
        for one in value if isinstance(value, list) else (value,):
            if isinstance(one, (str, int)):
                without = " without base_seqlen" if data.get("base_seqlen") is None else ""
                yield f"{key}={one}".lower() + (without if key == "vocab_size" else "")


def _check_fixed(data: Mapping[str, Any]) -> None:
    for key, allowed in FIXED.items():
        if key in data and data[key] not in allowed:
            raise ConfigError(
                "is not supported: the published TeleChat2 code has no such variant",
                where=key,
                expected=" or ".join(str(value) for value in allowed),
                found=data[key],
            )


def _one_value(data: Mapping[str, Any], name: str) -> Any:
    """The value that the spellings of a field agree on, or None where none is given."""
    given = {key: value for key in SPELLINGS[name] if (value := _lookup(data, key)) is not None}
    first = next(iter(given), "")
    for key, value in given.items():
        _check_value(name, key, value)
        if value != given[first]:
            raise ConfigError(f"contradicts {first}", where=key, expected=given[first], found=value)
    return given.get(first)


def _lookup(data: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.rpartition(".")
    found = data.get(section) if section else data
    return found.get(name) if isinstance(found, Mapping) else None


def _check_value(name: str, key: str, value: Any) -> None:
    """Refuse a value of the wrong type or size for the field `name`, which the file calls `key`."""
    if name in ("norm_eps", "rope_theta"):
        lowest, highest = (0, 1) if name == "norm_eps" else (1, MAX_THETA)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not lowest < value < highest:
            expected = f"a number between {lowest} and {highest:g}"
            raise ConfigError("is out of range", where=key, expected=expected, found=repr(value)[:80])
    elif name == "torch_dtype":
        if not isinstance(value, str) or value not in WEIGHT_DTYPES:
            raise ConfigError("unknown dtype", where=key, expected=f"one of {', '.join(WEIGHT_DTYPES)}", found=value)
    elif name in ("tie_word_embeddings", "embed_layernorm"):
        if type(value) is not bool:
            raise ConfigError("has the wrong type", where=key, expected="bool", found=repr(value))
    elif name == "eos_token_id" and isinstance(value, list):
        pass  # checked with the size of the vocabulary at hand
    elif type(value) is not int:
        raise ConfigError("has the wrong type", where=key, expected="int", found=repr(value))
    else:
        lowest = 0 if name.endswith("token_id") or "expert" in name else 1
        highest = LIMITS.get(name, INT32_MAX)
        if not lowest <= value <= highest:
            raise ConfigError("is out of range", where=key, expected=f"{lowest} to {highest}", found=value)
