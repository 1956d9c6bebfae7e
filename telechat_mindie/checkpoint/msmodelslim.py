"""What msmodelslim leaves of a quantised model: its description, and the tensors that this asks for.

W8A8 keeps the published names. A quantised `X.weight` is int8 and has beside it `X.input_scale` and `X.input_offset`,
one number each, `X.quant_bias` in int32 and `X.deq_scale` in int64, one number an output. Biases, norms and whatever
the description calls FLOAT stay as they were. W8A8SC is compressed for one tensor parallel size: a folder
`partRANK-of-TP` a rank, with the names of the model that ran (MindIE-LLM v3.0.0 examples/atb_models/examples/convert/
model_slim/sparse_compressor.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, TensorReader, read_files
from telechat_mindie.checkpoint.mapping import HUGGING_FACE_DROPPED, Weight, weights
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import WEIGHT_DTYPES
from telechat_mindie.errors import CheckpointError, ConfigError, name_some
from telechat_mindie.reading import read_json

DESCRIPTION = "quant_model_description.json"
DESCRIPTION_NAME = re.compile(r"quant_model_description(_\w+)?\.json")
"""Older releases put the kind into the name: quant_model_description_w8a8.json."""

W8A8, W8A8SC, FLOAT = "W8A8", "W8A8SC", "FLOAT"
KINDS = (W8A8, W8A8SC)
"""The kinds that MindIE's TeleChat takes (MindIE-LLM v3.0.0 examples/atb_models/examples/models/telechat/README.md)."""

QUANTISE_AGAIN = (
    "Copy it again, or quantise the float16 checkpoint again with MindIE's examples/models/telechat/"
    "convert_quant_weights.py."
)
KIND_ADVICE = (
    "MindIE's TeleChat takes W8A8, and W8A8SC where its sparse_compressor made it of W8A8S: quantise the float16 "
    "checkpoint again with MindIE's examples/models/telechat/convert_quant_weights.py."
)

PART = re.compile(r"part(0|[1-9]\d{0,3})-of-([1-9]\d{0,3})")

COMPANIONS: dict[str, tuple[str, ...]] = {
    "input_scale": WEIGHT_DTYPES,
    "input_offset": WEIGHT_DTYPES,
    "quant_bias": ("int32",),
    "deq_scale": ("int64",),
}
"""What a quantised weight has beside it -> the dtypes that it may have.

deq_scale is float32 where the model was bfloat16, which MindIE's TeleChat does not compute in."""

PER_OUTPUT = ("quant_bias", "deq_scale")
"""Companions with a number for each output; the others have one for the whole weight."""

ONE_INPUT = (("self_attention.query", "self_attention.key_value"), ("mlp.gate_proj", "mlp.up_proj"))
"""Layers that read the same activations. atb_llm packs each pair, with one scale and offset of the input: it takes
query's for both, and ends where gate_proj's and up_proj's differ (MindIE-LLM v3.0.0 examples/atb_models/atb_llm/models/
telechat/flash_causal_telechat.py:147-149, utils/weights.py:452-460)."""

PACKED_LINEARS = ("self_attention.w_pack", "self_attention.w_pack_ori", "self_attention.dense", "mlp.gate_up_proj")
"""The linear layers of W8A8SC, by the names of the model that ran; down_proj stays float."""

_NORM = re.compile(r"transformer\.(h\.\d+\.(input|post_attention)_layernorm)\.(bias|module\.(weight|bias))")
"""What the outlier suppression adds to norms."""


@dataclass(frozen=True)
class Quantised:
    """A directory that msmodelslim made.

    Attributes:
        kind: W8A8 or W8A8SC.
        description: tensor -> W8A8, W8A8SC or FLOAT; for W8A8SC that of part 0.
        config: without the keys that say that it is quantised.
        tensors: by name; those of all parts, for W8A8SC by `partRANK-of-TP/NAME`.
        tp: the tensor parallel size that W8A8SC was compressed for, else 0.
    """

    path: Path
    kind: str
    description: Mapping[str, str]
    config: TelechatConfig
    tensors: Mapping[str, StoredTensor]
    tp: int = 0
    files: tuple[str, ...] = field(default=(), repr=False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def layers(self, *, quantised: bool) -> list[str]:
        """`self_attention.query`, `lm_head`: the matrices that are quantised, or that stay float, each once."""
        names = {
            re.sub(r"^(transformer|model)\.(h\.\d+\.)?", "", name).removesuffix(".weight")
            for name, kind in self.description.items()
            if name.endswith(".weight") and "norm" not in name and "ln_f" not in name
            if (kind != FLOAT) == quantised
        }
        return sorted(names)


def description_file(path: Path) -> Path | None:
    """The description of a directory, which may be that of its first part; None where it is not quantised so."""
    if not path.is_dir():
        return None
    folders = [path, *sorted(folder for folder in path.iterdir() if PART.fullmatch(folder.name) and folder.is_dir())]
    for folder in folders[:2]:
        for name in sorted(entry.name for entry in folder.iterdir()):
            if DESCRIPTION_NAME.fullmatch(name):
                return folder / name
    return None


def read_config(data: Mapping[str, Any]) -> TelechatConfig:
    """A config.json without what says that its weights are quantised. Raises ConfigError as `TelechatConfig`."""
    plain = {key: value for key, value in data.items() if key not in ("quantize", "quantization_config")}
    return TelechatConfig.from_dict(plain)


def read_quantised(path: Path, config_json: Mapping[str, Any] | None = None) -> Quantised:
    """Read the description, config.json and the headers of the weights; `problems` says what is wrong with them.

    Raises:
        ConfigError: config.json or the description is missing or malformed.
        CheckpointError: a kind that MindIE's TeleChat does not take, parts that are missing, a damaged file.
    """
    file = description_file(path)
    if file is None:
        raise CheckpointError("holds no description of quantised weights", where=path, expected=DESCRIPTION)
    data = dict(config_json) if config_json is not None else read_json(path / "config.json")
    kind, description = _description(file, data)
    try:
        config = read_config(data)
    except ConfigError as failure:
        raise ConfigError(str(failure), where=path / "config.json") from None
    parts = _parts(path)
    if kind == W8A8SC:
        tp = len(parts)
        tensors = {
            f"{folder.name}/{name}": tensor for folder in parts for name, tensor in _read_folder(folder, path).items()
        }
        files = [str(file.relative_to(path)) for folder in parts for file in sorted(folder.iterdir())]
    else:
        tp, tensors, files = 0, _read_folder(path, path), []
    files += [entry.name for entry in path.iterdir() if DESCRIPTION_NAME.fullmatch(entry.name)]
    files += [entry.name for entry in path.glob("*.safetensors")] if kind == W8A8 else []
    return Quantised(path, kind, description, config, tensors, tp, tuple(sorted(files)))


def _description(file: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The kind, and each tensor's own."""
    content = read_json(file)
    described = {name: kind for name, kind in content.items() if isinstance(kind, str) and "." in name}
    said = content.get("model_quant_type") or config.get("quantize")
    if not isinstance(said, str):
        raise CheckpointError(
            "does not say how the model is quantised",
            where=file,
            expected='a model_quant_type here, or "quantize" in config.json',
            advice=KIND_ADVICE,
        )
    given = config.get("quantize")
    if isinstance(given, str) and given != said.lower():
        raise CheckpointError(
            "is contradicted by config.json's quantize, which MindIE compares letter by letter",
            where=file,
            expected=said.lower(),
            found=given,
            advice=f'Write "quantize": "{said.lower()}" in config.json.',
        )
    if said.upper() not in KINDS:
        raise CheckpointError(
            "is of a kind that is not served", where=file, expected=" or ".join(KINDS), found=said, advice=KIND_ADVICE
        )
    return said.upper(), described


def _parts(path: Path) -> list[Path]:
    """The folders of a W8A8SC model in the order of their ranks; empty where there are none.

    Raises:
        CheckpointError: they are not those of one tensor parallel size, each once.
    """
    found = {match.group(): match for entry in path.iterdir() if (match := PART.fullmatch(entry.name))}
    sizes = {int(match[2]) for match in found.values()}
    if not found:
        return []
    size = max(sizes)
    wanted = [f"part{rank}-of-{size}" for rank in range(size)]
    if len(sizes) > 1 or set(wanted) != found.keys():
        raise CheckpointError(
            "holds the parts of several sizes, or not all of one",
            where=path,
            expected=f"part0-of-{size} to part{size - 1}-of-{size}",
            found=name_some(found),
        )
    return [path / name for name in wanted]


def _read_folder(folder: Path, root: Path) -> dict[str, StoredTensor]:
    tensors = read_files(sorted(folder.glob("*.safetensors")), read_safetensors, root)
    if not tensors:
        raise CheckpointError("holds no safetensors", where=folder, advice="The copy is incomplete.")
    return tensors


def problems(model: Quantised) -> Iterator[tuple[str, str]]:
    """What is wrong with the tensors, as (rule, clause): missing ones, dtypes, shapes, and what atb_llm cannot pack."""
    if model.kind == W8A8SC:
        yield from _compressed_problems(model)
        return
    yield from _plain_problems(model)


def _plain_problems(model: Quantised) -> Iterator[tuple[str, str]]:
    table = weights(model.config)
    undescribed = [name for name in table if name.endswith(".weight") and name not in model.description]
    if undescribed:
        yield "description", f"does not describe {name_some(undescribed)}, where atb_llm would end"
    expected = dict(_expected(table.values(), model.description))
    if missing := [name for name in expected if name not in model.tensors]:
        yield "missing", f"{len(missing)} of {len(expected)} tensors are missing: {name_some(missing)}"
    known = (_NORM, HUGGING_FACE_DROPPED)
    unknown = [
        name for name in model.tensors if name not in expected and not any(pattern.fullmatch(name) for pattern in known)
    ]
    if unknown:
        yield "unknown", f"{len(unknown)} tensors are unknown: {name_some(unknown)}"
    wrong, shapes = [], []
    for name, (dtypes, shape) in expected.items():
        tensor = model.tensors.get(name)
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            wrong.append(f"{name} is {tensor.dtype} and should be {' or '.join(dtypes)}")
        if tensor.shape != shape:
            shapes.append(f"{name} is {list(tensor.shape)} and should be {list(shape)}")
    if wrong:
        yield "dtype", f"{len(wrong)} tensors have the wrong dtype: {name_some(wrong, 2)}"
    if shapes:
        yield "shape", f"{len(shapes)} tensors have the wrong shape: {name_some(shapes, 2)}"
    if not missing and not wrong and not shapes:
        yield from _pairs(model)


def _expected(
    table: Iterator[Weight] | Any, description: Mapping[str, str]
) -> Iterator[tuple[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
    """Tensor -> the dtypes that it may have, and its shape."""
    for weight in table:
        kind = description.get(weight.name, FLOAT) if len(weight.shape) == 2 else FLOAT
        if kind == FLOAT:
            yield weight.name, (("float16",), weight.shape)
            continue
        yield weight.name, (("int8",), weight.shape)
        stem = weight.name.removesuffix(".weight")
        for companion, dtypes in COMPANIONS.items():
            yield f"{stem}.{companion}", (dtypes, weight.shape[:1] if companion in PER_OUTPUT else (1,))


def _pairs(model: Quantised) -> Iterator[tuple[str, str]]:
    """Layers that are packed together: both quantised or, for query and key_value, neither; with the same input."""
    mixed, apart = [], []
    with TensorReader() as reader:
        for layer in range(model.config.num_layers):
            for pair in ONE_INPUT:
                stems = [f"transformer.h.{layer}.{name}" for name in pair]
                kinds = {model.description.get(f"{stem}.weight", FLOAT) for stem in stems}
                if len(kinds) > 1:
                    mixed += stems[:1] if pair is ONE_INPUT[0] else []
                elif kinds != {FLOAT}:
                    apart += [
                        f"{stems[0]}.{name}"
                        for name in ("input_scale", "input_offset")
                        if (reader.load(model.tensors[f"{stems[0]}.{name}"]).astype("float32"))
                        != reader.load(model.tensors[f"{stems[1]}.{name}"]).astype("float32")
                    ]
    if mixed:
        yield (
            "pair",
            f"query is quantised and key_value is not, or the reverse, which atb_llm cannot pack: {name_some(mixed)}",
        )
    if apart:
        yield (
            "pair",
            "query and key_value, or gate_proj and up_proj, have another scale or offset of their common input, of "
            f"which atb_llm keeps one: {name_some(apart)}",
        )


def _compressed_problems(model: Quantised) -> Iterator[tuple[str, str]]:
    """Parts hold compressed weights, whose sizes nothing tells: names and dtypes alone."""
    expected = compressed_names(model.config, model.description)
    for rank in range(model.tp):
        folder = f"part{rank}-of-{model.tp}"
        found = {
            name.removeprefix(f"{folder}/"): tensor
            for name, tensor in model.tensors.items()
            if name.startswith(f"{folder}/")
        }
        if missing := [name for name in expected if name not in found]:
            clause = f"{folder}: {len(missing)} of {len(expected)} tensors are missing: {name_some(missing)}"
            other = "model." if compressed_prefix(model.config) != "model." else "transformer."
            if any(name.startswith(other) for name in found):
                clause += f"; its names begin with {other}, and MindIE looks for {compressed_prefix(model.config)}"
            yield "missing", clause
            return
        wrong = [
            f"{name} is {found[name].dtype} and should be {' or '.join(dtypes)}"
            for name, dtypes in expected.items()
            if found[name].dtype not in dtypes
        ]
        if wrong:
            yield "dtype", f"{folder}: {len(wrong)} tensors have the wrong dtype: {name_some(wrong, 2)}"
            return


def compressed_prefix(config: TelechatConfig) -> str:
    """What names of W8A8SC begin with (flash_causal_telechat.py:249-257). The compressor writes `model.` for any model,
    and from 38 layers on, the size of TeleChat-12B, MindIE looks for that."""
    return "model." if config.num_layers >= 38 else "transformer."


def compressed_names(config: TelechatConfig, description: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Tensors of a part -> the dtypes that they may have."""
    prefix, float16 = compressed_prefix(config), ("float16",)
    expected: dict[str, tuple[str, ...]] = {
        f"{prefix}word_embeddings.weight": float16,
        f"{prefix}ln_f.weight": float16,
        "lm_head.weight": float16,
    }
    for layer in range(config.num_layers):
        stem = f"{prefix}h.{layer}."
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attention.dense.bias"):
            expected[stem + name] = float16
        for name in ("mlp.down_proj.weight", "mlp.down_proj.bias"):
            expected[stem + name] = float16
        for linear in PACKED_LINEARS:
            if description.get(f"{stem}{linear}.weight", W8A8SC) == FLOAT:
                expected[f"{stem}{linear}.weight"] = float16
                continue
            expected |= {f"{stem}{linear}.{name}": dtypes for name, dtypes in COMPANIONS.items()}
            expected |= {f"{stem}{linear}.{name}": ("int8",) for name in ("weight", "index")}
    return expected
