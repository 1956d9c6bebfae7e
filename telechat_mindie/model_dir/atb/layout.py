"""A directory for MindIE's atb backend, opened: what of it describes the model, and what is wrong with that."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, read_files
from telechat_mindie.checkpoint.mapping import EMBEDDINGS, HUGGING_FACE_DROPPED, differences, weights
from telechat_mindie.checkpoint.msmodelslim import (
    QUANTISE_AGAIN,
    Quantised,
    description_file,
    read_config,
    read_quantised,
)
from telechat_mindie.checkpoint.quantised_tensors import PER_OUTPUT, quantised_problems
from telechat_mindie.checkpoint.sharding import Role
from telechat_mindie.computation import check_computation, plain_length
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError, ModelDirError
from telechat_mindie.findings import Finding, error, warning
from telechat_mindie.mindie import ATB, GENERATIONS
from telechat_mindie.model_dir.atb.generation import check_generation
from telechat_mindie.model_dir.atb.rules import BUILD, DTYPE, config_refusals, model_refusals
from telechat_mindie.model_dir.manifest import MANIFEST, REBUILD_AS, Entry, backend_of, check_manifest, sound_entries
from telechat_mindie.model_dir.parts import attempt
from telechat_mindie.reading import read_json

CONFIG, GENERATION = "config.json", "generation_config.json"

NOWHERE = "Nothing here computes that, for no backend; check it against the code that the model was published with."
PASSED_OVER = "Nothing to do: atb_llm passes over them."

KEPT_TWICE = ("self_attention.query", "self_attention.key_value")
"""atb_llm loads these as w_pack and once more as w_pack_ori, and moves both to the card (MindIE-LLM v3.0.0 examples/
atb_models/atb_llm/models/telechat/flash_causal_telechat.py:117-163, atb_llm/runner/model_runner.py:522)."""


def is_atb(path: Path, generation: str | None = None) -> bool:
    """Whether a directory is one for atb: `build --backend atb` made it, msmodelslim quantised it, or it is a Hugging
    Face checkpoint and MindIE's `generation` has no other backend for it."""
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
        return False
    if (path / MANIFEST).is_file():
        return backend_of(path) == ATB
    if not (path / CONFIG).is_file():
        return False
    if description_file(path) is not None:
        return True
    takes_no_other = generation is not None and not GENERATIONS[generation].ms_backend
    return takes_no_other and any(path.glob("*.safetensors"))


@dataclass
class AtbParts:
    """What could be read of a directory, None or empty where it could not, and what is wrong with it."""

    path: Path
    manifest: dict[str, Any] | None = None
    files: dict[str, Entry] = field(default_factory=dict)
    config_json: dict[str, Any] | None = None
    config: TelechatConfig | None = None
    quantised: Quantised | None = None
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    problems: list[Finding] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> AtbParts:
        """manifest.json, config.json, generation_config.json, how it is quantised, and the headers of the weights."""
        parts = cls(path)
        if (path / MANIFEST).is_file():
            where = path / MANIFEST
            parts.manifest = attempt(parts.problems, "manifest-json", where, lambda: read_json(where), REBUILD_AS[ATB])
            if parts.manifest is not None:
                parts.problems += check_manifest(parts.manifest, where, ATB)
                parts.files = sound_entries(parts.manifest)
        parts._read_config()
        parts._read_generation()
        parts._read_weights()
        return parts

    @property
    def backend(self) -> str:
        return ATB

    def _read_config(self) -> None:
        where = self.path / CONFIG
        data = self.config_json = attempt(self.problems, "config-json", where, lambda: read_json(where), BUILD)
        if data is None:
            return
        read = read_config if description_file(self.path) else TelechatConfig.from_dict
        config = self.config = attempt(self.problems, "config-json", where, lambda: read(data), BUILD)
        refusals = list(config_refusals(data))
        if config is not None:
            refusals = [*model_refusals(config), *refusals]
            attempt(self.problems, "config-json", where, lambda: check_computation(config, where), NOWHERE)
        self.problems += [error(id, f"{where}: {key}", message, advice) for id, key, message, advice in refusals]

    def _read_generation(self) -> None:
        where = self.path / GENERATION
        data: dict[str, Any] | None = {}
        if where.exists():
            data = attempt(self.problems, "generation-json", where, lambda: read_json(where), REBUILD_AS[ATB])
        if data is not None:
            self.problems += check_generation(data, self.config, where)

    def _read_weights(self) -> None:
        path, config = self.path, self.config
        if config is None:
            return
        if (file := description_file(path)) is not None:
            model = self.quantised = attempt(self.problems, "weights", path, lambda: read_quantised(path), "")
            if model is not None:
                self.tensors = model.tensors
                found = attempt(self.problems, "weights", path, lambda: list(quantised_problems(model)), "")
                self.problems += [
                    warning("tensor-names", path, clause, PASSED_OVER)
                    if id == "unknown"
                    else error(f"quantised-{id}", file, clause, QUANTISE_AGAIN)
                    for id, clause in found or ()
                ]
            return
        shards = sorted(path.glob("*.safetensors"))
        self.tensors = (
            attempt(self.problems, "weights", path, lambda: read_files(shards, read_safetensors, path), BUILD) or {}
        )
        if not shards:
            self.problems.append(error("weights", path, "holds no safetensors, which alone atb_llm loads", BUILD))
        elif self.tensors:
            self.problems += _float_problems(path, self.tensors, config)


def _float_problems(path: Path, tensors: Mapping[str, StoredTensor], config: TelechatConfig) -> list[Finding]:
    expected = {weight.name: weight.shape for weight in weights(config).values()}
    found = {name: tensor.shape for name, tensor in tensors.items() if not HUGGING_FACE_DROPPED.fullmatch(name)}
    problems = [
        warning("tensor-names", path, clause, PASSED_OVER)
        if kind == "unknown"
        else error("shape" if kind == "shape" else "tensor-names", path, clause, BUILD)
        for kind, clause in differences(found, expected)
    ]
    dtypes = sorted({tensor.dtype for name, tensor in tensors.items() if name in expected} - {DTYPE})
    if dtypes:
        message = (
            f"holds weights of {' and '.join(dtypes)}: atb_llm casts them to {DTYPE} without a look at their range"
        )
        problems.append(error("atb-dtype", path, message, BUILD))
    return problems


@dataclass(frozen=True)
class AtbDir:
    """An opened directory for atb, which MindIE would load.

    Attributes:
        files: what the manifest says of each file; empty where there is none.
        tensors: as stored; those of W8A8SC by `partRANK-of-TP/NAME`.
    """

    path: Path
    config: TelechatConfig
    files: Mapping[str, Entry]
    manifest: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    quantised: Quantised | None = None

    @classmethod
    def open(cls, path: Path) -> AtbDir:
        """Read what describes the model, and the headers of its weights.

        Raises:
            ConfigError, ModelDirError: MindIE would not load it, or would compute something else; the first reason.
        """
        return cls.of(AtbParts.read(path))

    @classmethod
    def of(cls, parts: AtbParts) -> AtbDir:
        """What was read already. Raises as `open`."""
        errors = [problem for problem in parts.problems if problem.severity == "error"]
        if errors or parts.config is None:
            kind = ConfigError if errors[0].id.endswith("json") else ModelDirError
            raise kind(errors[0].message, where=errors[0].where, advice=errors[0].advice)
        return cls(parts.path, parts.config, parts.files, parts.manifest or {}, parts.tensors, parts.quantised)

    @property
    def dtype(self) -> str:
        """Of keys and values, and of the weights that are not quantised."""
        return DTYPE

    @property
    def tp(self) -> int:
        """Cards where nobody names any: what it was compressed for, else what `build --tp` said, else one."""
        said = self.manifest.get("tp")
        return said if type(said) is int and said in self.allowed_tp else self.allowed_tp[0]

    @cached_property
    def allowed_tp(self) -> tuple[int, ...]:
        """Numbers of cards that it can be served with; atb_llm cuts the weights as it loads them."""
        return self.config.allowed_tp() if self.quantised is None else self.quantised.allowed_tp

    @property
    def plain_length(self) -> int:
        return plain_length(self.config)

    def rank_bytes(self, tp: int) -> int:
        """Weights of one card: the embedding whole, query and key_value twice, the rest as it is cut."""
        if self.quantised is not None:
            return quantised_bytes(self.quantised, tp)
        return rank_bytes({name: tensor.nbytes for name, tensor in self.tensors.items()}, self.config, tp)


def quantised_bytes(model: Quantised, tp: int) -> int:
    """`rank_bytes` of a quantised model: of its largest part, where it is compressed for the number of cards."""
    if not model.tp:
        return rank_bytes({name: tensor.nbytes for name, tensor in model.tensors.items()}, model.config, tp)
    parts: Counter[str] = Counter()
    for name, tensor in model.tensors.items():
        parts[name.partition("/")[0]] += tensor.nbytes
    return max(parts.values())


def rank_bytes(sizes: Mapping[str, int], config: TelechatConfig, tp: int) -> int:
    """Bytes that a card holds of tensors of these sizes, by Hugging Face name; what a quantised weight has beside it is
    cut where its outputs are."""
    roles = {weight.name.removesuffix(".weight"): weight.role for weight in weights(config).values()}
    total = 0
    for name, nbytes in sizes.items():
        stem, _, leaf = name.rpartition(".")
        role = roles.get(stem, Role.REPLICATED)
        is_cut = role.axis is not None and (leaf == "weight" or (role is Role.COLUMN and leaf in PER_OUTPUT))
        share = nbytes // tp if is_cut and name != EMBEDDINGS else nbytes
        total += share * (2 if stem.endswith(KEPT_TWICE) else 1)
    return total
