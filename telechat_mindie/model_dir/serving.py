"""The directory's one yaml: what it says of the model's shape, and what it decides beyond that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from telechat_mindie.computation import plain_context
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import WEIGHT_DTYPES
from telechat_mindie.errors import ConfigError, ModelDirError
from telechat_mindie.model_dir.manifest import REBUILD, section
from telechat_mindie.reading import read_yaml

BEYOND_PLAIN = "is beyond max_position_embeddings, where the model's rope_type dynamic, not implemented, begins"
ONE_YAML = "must hold exactly one yaml, since MindIE takes the first that the file system lists"
EXTEND_METHODS = ("None", "PI", "NTK", "DYNAMIC_NTK")
LAYER_FORMS = ("flat", "split")
"""How an NPU's graphs write a layer: see model/kernels/ascend.py."""
MAX_SEQ_LEN = 1 << 20
MAX_BLOCK_SIZE = 1024


@dataclass(frozen=True)
class ServingConfig:
    """What the directory's yaml says beyond the model's shape; a person may edit these. Lengths are tokens.

    A yaml may leave out what has a default: mindformers' have no factor, and those of 0.1.0 and 0.2.0 no form.
    """

    dtype: str
    max_seq_len: int
    block_size: int
    extend_method: str
    rotary_dtype: str
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    max_new_tokens: int
    scaling_factor: float = 1.0
    layer_form: str = LAYER_FORMS[0]


YAML_KEYS = {
    "dtype": "param_init_type",
    "max_seq_len": "seq_length",
    "block_size": "block_size",
    "extend_method": "extend_method",
    "scaling_factor": "scaling_factor",
    "rotary_dtype": "rotary_dtype",
    "do_sample": "do_sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_decode_length",
    "layer_form": "layer_form",
}
"""Field of ServingConfig -> key of the yaml's model.model_config."""

SHAPE_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "n_kv_heads": "num_kv_heads",
    "intermediate_size": "ffn_size",
    "theta": "rope_theta",
    "eos_token_id": "eos_token_id",
}
"""Key of the yaml -> field of TelechatConfig that config.json gives; the two must agree."""


def yaml_files(path: Path) -> list[Path]:
    """The yamls at the top of a directory. mindformers takes the first that the file system lists."""
    return sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml"))


def find_yaml(path: Path) -> Path:
    """The directory's one yaml.

    Raises:
        ModelDirError: there is none, or more than one.
    """
    found = yaml_files(path)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ModelDirError(ONE_YAML, where=path, found=names, advice=REBUILD)
    return found[0]


def contradictions(model_config: Mapping[str, Any], config: TelechatConfig) -> Iterator[tuple[str, str]]:
    """Keys of the yaml's model_config that say something else than config.json, and what they say."""
    for key, field in SHAPE_KEYS.items():
        # Directories of 0.1.0 have no theta: it took the published code's alone.
        default = TelechatConfig.rope_theta if key == "theta" else None
        wanted, found = getattr(config, field), model_config.get(key, default)
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted
        if found != wanted:
            yield key, f"contradicts config.json (expected {wanted}, found {found!r})"
    longest, length = plain_context(config), model_config.get("seq_length")
    if longest is not None and type(length) is int and length > longest:
        yield "seq_length", f"{BEYOND_PLAIN} (expected at most {longest}, found {length})"


def read_serving(model_config: Mapping[str, Any], where: Path) -> ServingConfig:
    """The serving values of a yaml's model_config.

    Raises:
        ConfigError: one of them is missing or cannot be; the key is named.
    """
    values: dict[str, Any] = {}
    kinds = {field.name: field.type for field in fields(ServingConfig)}
    for name, key in YAML_KEYS.items():
        value = model_config.get(key, getattr(ServingConfig, name, None))
        if kinds[name] == "float" and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        if type(value).__name__ != kinds[name]:
            raise ConfigError("has the wrong type", where=f"{where}: {key}", expected=kinds[name], found=repr(value))
        values[name] = value
    for name, allowed in (
        ("dtype", WEIGHT_DTYPES),
        ("rotary_dtype", WEIGHT_DTYPES),
        ("extend_method", EXTEND_METHODS),
        ("layer_form", LAYER_FORMS),
    ):
        if values[name] not in allowed:
            raise ConfigError(
                "is not supported",
                where=f"{where}: {YAML_KEYS[name]}",
                expected=" or ".join(allowed),
                found=repr(values[name]),
            )
    if not values["scaling_factor"] > 0:
        raise ConfigError("must be positive", where=f"{where}: scaling_factor", found=values["scaling_factor"])
    for name, limit in (("max_seq_len", MAX_SEQ_LEN), ("block_size", MAX_BLOCK_SIZE)):
        if not 1 <= values[name] <= limit:
            key = YAML_KEYS[name]
            raise ConfigError("is out of range", where=f"{where}: {key}", expected=f"1 to {limit}", found=values[name])
    return ServingConfig(**values)


def config_json_from_yaml(path: Path) -> dict[str, Any]:
    """What config.json says for a mindformers yaml: its model_config, with the keys that MindIE's C++ reads.

    Raises:
        ConfigError: no model.model_config, or no TeleChat2 model in it.
    """
    described = read_yaml(path)
    model_config = section(described, "model", "model_config")
    if not model_config:
        raise ConfigError("has no model.model_config", where=path)
    found = {key: value for key, value in model_config.items() if key not in ("type", "auto_map")}
    found |= {"model_type": "telechat", "architectures": ["TelechatForCausalLM"]}
    found["torch_dtype"] = model_config.get("param_init_type", model_config.get("compute_dtype", "float16"))
    experts = section(described, "moe_config")
    if experts.get("expert_num") not in (None, 0, 1):
        found |= {"num_local_experts": experts["expert_num"], "num_experts_per_tok": experts.get("num_experts_chosen")}
    try:
        TelechatConfig.from_dict(found)
    except ConfigError as error:
        raise ConfigError(str(error), where=path) from None
    return found
