"""The keys of a config.json: how published files spell each field of a TeleChat2, and what a value may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from telechat_mindie.dtypes import WEIGHT_DTYPES
from telechat_mindie.errors import ConfigError
from telechat_mindie.foreign import ANOTHER_ARCHITECTURE, refuse_foreign
from telechat_mindie.units import INT32_MAX

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


def telechat_keys(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a Llama form's config.json says of the TeleChat2 that it was made of; any other file's content itself.

    A tool that quantised or trained the Llama changes the file around the section.
    """
    section = data.get(LLAMA_SECTION)
    if data.get("model_type") != "llama" or not isinstance(section, Mapping):
        return data
    changed = {key: data[key] for key in ("quantization_config", *SPELLINGS["torch_dtype"]) if key in data}
    stored = {key: value for key, value in section.items() if key not in SPELLINGS["torch_dtype"]}
    return {"model_type": MODEL_TYPES[0]} | stored | changed


def read_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config.TelechatConfig` that the keys of a TeleChat2 (`telechat_keys`) give.

    Raises:
        ConfigError: not a TeleChat2 config, a required key missing, a value of the wrong type, two spellings that
            contradict each other, or a feature that the published modelling code does not have. The key is named.
    """
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
    if "rope_theta" in values:
        values["rope_theta"] = float(values["rope_theta"])
    return values


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
