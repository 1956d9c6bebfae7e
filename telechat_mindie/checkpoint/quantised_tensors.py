"""The tensors that a quantised model's description asks for, against those that are there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.checkpoint.mapping import EMBEDDINGS, HEAD, HUGGING_FACE_DROPPED, Weight, weights
from telechat_mindie.checkpoint.msmodelslim import FLOAT, W8A8SC, Quantised
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import WEIGHT_DTYPES
from telechat_mindie.errors import name_some

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


def quantised_problems(model: Quantised) -> Iterator[tuple[str, str]]:
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
    if whole := [name for name in (EMBEDDINGS, HEAD) if model.description.get(name, FLOAT) != FLOAT]:
        yield "layers", f"quantises {name_some(whole)}, of which atb_llm takes the integers for the weights themselves"
    expected = dict(_expected(table.values(), model.description))
    expected |= {
        name: (("float16",), (model.config.hidden_size,)) for name in model.description if _NORM.fullmatch(name)
    }
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
    table: Iterable[Weight], description: Mapping[str, str]
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
