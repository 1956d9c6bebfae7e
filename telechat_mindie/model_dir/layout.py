"""A finished model directory: its parts, read and held against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from telechat_mindie.config import MAX_RANKS, TelechatConfig
from telechat_mindie.dtypes import WEIGHT_DTYPES
from telechat_mindie.errors import ConfigError, ModelDirError
from telechat_mindie.reading import read_json, read_yaml

MANIFEST = "manifest.json"
EXTEND_METHODS = ("None", "PI", "NTK", "DYNAMIC_NTK")

_REBUILD = "Build the directory again with `telechat-mindie build --force`."


@dataclass(frozen=True)
class ServingConfig:
    """What the directory's yaml says beyond the model's shape; a person may edit these. Lengths are tokens."""

    dtype: str
    max_seq_len: int
    block_size: int
    extend_method: str
    scaling_factor: float
    rotary_dtype: str
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    max_new_tokens: int


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
}
"""Field of ServingConfig -> key of the yaml's model.model_config."""

_SHAPE_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "n_kv_heads": "num_kv_heads",
    "intermediate_size": "ffn_size",
    "eos_token_id": "eos_token_id",
}
"""Key of the yaml -> field of TelechatConfig that config.json gives; the two must agree."""


@dataclass(frozen=True)
class ModelDir:
    """An opened model directory."""

    path: Path
    yaml_path: Path
    config: TelechatConfig
    serving: ServingConfig
    manifest: Mapping[str, Any]

    @property
    def tp(self) -> int:
        return int(self.manifest["tp"])

    def rank_folder(self, rank: int) -> Path:
        return self.path / f"rank_{rank}"

    @classmethod
    def open(cls, path: Path) -> ModelDir:
        """Read manifest.json, config.json and the one yaml of `path`.

        Raises:
            ModelDirError: the directory is absent or incomplete, holds no or several yamls, or they disagree.
            ConfigError: a file is malformed.
        """
        if not path.is_dir():
            raise ModelDirError("is not a directory", where=path, found="a file" if path.exists() else "nothing")
        if not (path / MANIFEST).is_file():
            raise ModelDirError(
                f"is not a model directory: it has no {MANIFEST}",
                where=path,
                advice="Make one with `telechat-mindie build MODEL_PATH --checkpoint DIR`.",
            )
        manifest = read_json(path / MANIFEST)
        if type(manifest.get("tp")) is int and not 1 <= manifest["tp"] <= MAX_RANKS:
            raise ModelDirError("tp is out of range", where=path / MANIFEST, found=manifest["tp"], advice=_REBUILD)
        for key, kind in (("tp", int), ("dtype", str), ("qkv_concat", bool), ("files", dict)):
            if type(manifest.get(key)) is not kind:
                raise ModelDirError(f"manifest lacks {key}", where=path / MANIFEST, advice=_REBUILD)
        yaml_path = find_yaml(path)
        config = TelechatConfig.from_directory(path)
        model_config = read_yaml(yaml_path).get("model", {})
        model_config = model_config.get("model_config") if isinstance(model_config, dict) else None
        if not isinstance(model_config, dict):
            raise ModelDirError("has no model.model_config", where=yaml_path, advice=_REBUILD)
        for key, field in _SHAPE_KEYS.items():
            if model_config.get(key) != getattr(config, field):
                raise ModelDirError(
                    "contradicts config.json",
                    where=f"{yaml_path}: {key}",
                    expected=getattr(config, field),
                    found=model_config.get(key),
                    advice=_REBUILD,
                )
        serving = _serving(model_config, yaml_path)
        if serving.dtype != manifest["dtype"]:
            raise ModelDirError(
                "is not the dtype of the weights",
                where=f"{yaml_path}: param_init_type",
                expected=manifest["dtype"],
                found=serving.dtype,
                advice=_REBUILD,
            )
        return cls(path, yaml_path, config, serving, manifest)


def find_yaml(path: Path) -> Path:
    """The directory's one yaml. mindformers takes the first that the file system lists, so two are refused."""
    found = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ModelDirError("must hold exactly one yaml", where=path, found=names, advice=_REBUILD)
    return found[0]


def _serving(model_config: Mapping[str, Any], where: Path) -> ServingConfig:
    values: dict[str, Any] = {}
    kinds = {field.name: field.type for field in fields(ServingConfig)}
    for name, key in YAML_KEYS.items():
        value = model_config.get(key, 1.0 if name == "scaling_factor" else None)  # mindformers' yamls leave it out
        if kinds[name] == "float" and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        if type(value).__name__ != kinds[name]:
            raise ConfigError("has the wrong type", where=f"{where}: {key}", expected=kinds[name], found=repr(value))
        values[name] = value
    serving = ServingConfig(**values)
    for key, value, allowed in (
        ("param_init_type", serving.dtype, WEIGHT_DTYPES),
        ("rotary_dtype", serving.rotary_dtype, WEIGHT_DTYPES),
        ("extend_method", serving.extend_method, EXTEND_METHODS),
    ):
        if value not in allowed:
            raise ConfigError("is not supported", where=f"{where}: {key}", expected=" or ".join(allowed), found=value)
    if serving.scaling_factor <= 0:
        raise ConfigError("must be positive", where=f"{where}: scaling_factor", found=serving.scaling_factor)
    for key, size in (("seq_length", serving.max_seq_len), ("block_size", serving.block_size)):
        if size < 1:
            raise ConfigError("must be positive", where=f"{where}: {key}", found=size)
    return serving


def config_json_from_yaml(path: Path) -> dict[str, Any]:
    """What config.json says for a mindformers yaml: its model_config, with the keys that MindIE's C++ reads.

    Raises:
        ConfigError: no model.model_config, or no TeleChat2 model in it.
    """
    described = read_yaml(path)
    model = described.get("model")
    model_config = model.get("model_config") if isinstance(model, dict) else None
    if not isinstance(model_config, dict):
        raise ConfigError("has no model.model_config", where=path)
    found = {key: value for key, value in model_config.items() if key not in ("type", "auto_map")}
    found |= {"model_type": "telechat", "architectures": ["TelechatForCausalLM"]}
    found["torch_dtype"] = model_config.get("param_init_type", model_config.get("compute_dtype", "float16"))
    experts = described.get("moe_config")
    if isinstance(experts, dict) and experts.get("expert_num", 1) > 1:
        found |= {"num_local_experts": experts["expert_num"], "num_experts_per_tok": experts.get("num_experts_chosen")}
    try:
        TelechatConfig.from_dict(found)
    except ConfigError as error:
        raise ConfigError(str(error), where=path) from None
    return found
