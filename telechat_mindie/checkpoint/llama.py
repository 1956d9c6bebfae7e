"""The Llama form of a dense TeleChat2: the same weights under the names of a Llama with biases, for tools of Llamas.

A TeleChat2 layer is a Llama layer whose key_value weight holds each head's rows of the key and of the value beside each
other, and whose output projections alone have biases. So keys and values come apart, and a Llama's other biases are
zero. Nothing is computed, and the way back gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from telechat_mindie.checkpoint.formats.tensors import StoredTensor, TensorReader
from telechat_mindie.checkpoint.mapping import EMBEDDINGS, HEAD, Part, Target, differences, weights
from telechat_mindie.checkpoint.mindformers import put_together
from telechat_mindie.checkpoint.pieces import Zeros
from telechat_mindie.checkpoint.sharding import Role
from telechat_mindie.checkpoint.tiles import TiledWeight, single_tile
from telechat_mindie.computation import check_computation
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, InputError, name_some

_NAMES = (
    ("transformer.word_embeddings.", "model.embed_tokens."),
    ("transformer.h.", "model.layers."),
    ("transformer.ln_f.", "model.norm."),
    (".self_attention.query.", ".self_attn.q_proj."),
    (".self_attention.dense.", ".self_attn.o_proj."),
)
"""Published name -> Llama's; what stands in none of them is called alike, but for key_value."""

_KEY_VALUE = ".self_attention.key_value.weight"
_WITHOUT_BIAS = (".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".gate_proj.weight", ".up_proj.weight")
"""What has a bias in a Llama with biases, and none in a TeleChat2."""


def is_llama_form(names: Mapping[str, StoredTensor]) -> bool:
    """Whether tensors have a Llama's names, and the bias of a TeleChat2's first output projection."""
    return "model.layers.0.self_attn.o_proj.bias" in names


def check_llama(config: TelechatConfig) -> None:
    """Refuse a model that no Llama computes.

    Raises:
        InputError: a mixture of experts, or a norm behind the embeddings.
        ConfigError: its config.json asks for what TeleChat2 does not compute either.
    """
    for given, what in ((config.is_moe, "a mixture of experts"), (config.embed_layernorm, "a norm of its embeddings")):
        if given:
            raise InputError(f"a model with {what} is no Llama", where="--to llama", advice="Take --to hf.")
    check_computation(config)


def llama_targets(config: TelechatConfig) -> list[Target]:
    """The weights of the Llama form, in the order of the source; zero biases are not among them."""
    targets = []
    for weight in weights(config).values():
        if weight.name.endswith(_KEY_VALUE):
            stem = _llama_name(weight.name.removesuffix(_KEY_VALUE))
            for letter, pick in (("k", "keys"), ("v", "values")):
                part = Part(weight.name, weight.shape, pick, config.head_dim)
                name = f"{stem}.self_attn.{letter}_proj.weight"
                targets.append(Target(name, Role.COLUMN, (part.rows, weight.shape[1]), (part,)))
        else:
            part = Part(weight.name, weight.shape)
            targets.append(Target(_llama_name(weight.name), weight.role, weight.shape, (part,)))
    return targets


def zero_biases(targets: list[Target], dtype: str) -> tuple[list[Target], dict[str, TiledWeight]]:
    """The targets with a Llama's other biases among them, and the weights that these are made of."""
    zeros: dict[str, TiledWeight] = {}
    result = []
    for target in targets:
        result.append(target)
        if target.name.endswith(_WITHOUT_BIAS):
            shape = target.shape[:1]
            part = Part(f"zeros of {shape[0]}", shape)
            zeros[part.source] = single_tile(part.source, Zeros(part.source, dtype, shape, ()))
            result.append(Target(_bias(target.name), Role.COLUMN, shape, (part,)))
    return result, zeros


def tiled_weights(stored: Mapping[str, StoredTensor], config: TelechatConfig, where: Path) -> dict[str, TiledWeight]:
    """Every weight that the config asks for, from the tensors of a Llama form. The zero biases are read.

    Tied embeddings are both weights, for transformers writes a tied Llama without its head.

    Raises:
        CheckpointError: names, shapes or dtypes do not fit the config, or a bias is not zero.
    """
    targets = llama_targets(config)
    embeddings = stored.get(_llama_name(EMBEDDINGS))
    if config.tie_word_embeddings and embeddings is not None:
        stored = {HEAD: embeddings, **stored}
    biases = {_bias(target.name): target.shape[:1] for target in targets if target.name.endswith(_WITHOUT_BIAS)}
    expected = {target.name: target.shape for target in targets}
    given = {name: tensor.shape for name, tensor in stored.items()}
    for _, clause in differences(given, expected | {name: biases[name] for name in biases if name in stored}):
        raise CheckpointError(clause, where=where, advice="config.json belongs to another model.")
    with TensorReader() as reader:
        learned = [name for name in biases if name in stored and np.any(reader.load(stored[name]).astype(np.float32))]
    if learned:
        raise CheckpointError(
            f"holds biases that a TeleChat2 has no place for: {name_some(learned)}",
            where=where,
            expected="zeros",
            advice="Only a Llama form that --to llama made, or whose zero biases a tool left alone, has a way back.",
        )
    return put_together([stored], targets, config)


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _llama_name(name: str) -> str:
    for published, llama in _NAMES:
        name = name.replace(published, llama)
    return name
