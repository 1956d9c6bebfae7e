"""The one name table: Hugging Face name, mindformers name, role and shape of every TeleChat2 weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from telechat_mindie.checkpoint.sharding import Role, rank_shape
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, name_some


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table. `target` None: dropped on purpose. `shape` names the axes, see `_axes`."""

    source: str
    target: str | None
    role: Role
    shape: str
    when: str = ""  # "", "dense", "moe" or "embed_layernorm": the models that have it


_LAYER = "transformer.h.{layer}."
_EXPERT = _LAYER + "mlp.local_experts.{expert}."
_TARGET = "model.layers.{layer}."

RULES = (
    Rule("transformer.word_embeddings.weight", "model.tok_embeddings.embedding_weight", Role.COLUMN, "V h"),
    Rule(
        "transformer.word_embeddings_layernorm.weight",
        "model.embedding_norm.weight",
        Role.REPLICATED,
        "h",
        "embed_layernorm",
    ),
    Rule(_LAYER + "input_layernorm.weight", _TARGET + "attention_norm.weight", Role.REPLICATED, "h"),
    Rule(_LAYER + "self_attention.query.weight", _TARGET + "attention.wq.weight", Role.COLUMN, "h h"),
    Rule(_LAYER + "self_attention.key_value.weight", _TARGET + "attention.wk_v.weight", Role.COLUMN, "kv h"),
    Rule(_LAYER + "self_attention.dense.weight", _TARGET + "attention.wo.weight", Role.ROW, "h h"),
    Rule(_LAYER + "self_attention.dense.bias", _TARGET + "attention.wo.bias", Role.REPLICATED, "h"),
    Rule(_LAYER + "post_attention_layernorm.weight", _TARGET + "ffn_norm.weight", Role.REPLICATED, "h"),
    Rule(_LAYER + "mlp.gate_proj.weight", _TARGET + "feed_forward.w1.weight", Role.COLUMN, "f h", "dense"),
    Rule(_LAYER + "mlp.up_proj.weight", _TARGET + "feed_forward.w3.weight", Role.COLUMN, "f h", "dense"),
    Rule(_LAYER + "mlp.down_proj.weight", _TARGET + "feed_forward.w2.weight", Role.ROW, "h f", "dense"),
    Rule(_LAYER + "mlp.down_proj.bias", _TARGET + "feed_forward.w2.bias", Role.REPLICATED, "h", "dense"),
    Rule(_LAYER + "mlp.router.weight", _TARGET + "feed_forward.router.dense.weight", Role.REPLICATED, "E h", "moe"),
    Rule(_EXPERT + "gate_proj.weight", _TARGET + "feed_forward.ffn.w1.weight", Role.EXPERT_COLUMN, "f h", "moe"),
    Rule(_EXPERT + "up_proj.weight", _TARGET + "feed_forward.ffn.w3.weight", Role.EXPERT_COLUMN, "f h", "moe"),
    Rule(_EXPERT + "down_proj.weight", _TARGET + "feed_forward.ffn.w2.weight", Role.EXPERT_ROW, "h f", "moe"),
    Rule(_EXPERT + "down_proj.bias", _TARGET + "feed_forward.ffn.w2.bias", Role.REPLICATED, "h", "moe"),
    Rule("transformer.ln_f.weight", "model.norm_out.weight", Role.REPLICATED, "h"),
    Rule("lm_head.weight", "lm_head.weight", Role.COLUMN, "V h"),
    # Old exports saved this buffer of the rotary embedding; it is computed, not learned.
    Rule(_LAYER + "self_attention.rotary_emb.inv_freq", None, Role.REPLICATED, "d"),
)

MINDFORMERS_DROPPED = re.compile(
    r"^(adam_[mv]|moments|accu_grads|moment[12])\.|^(beta[12]_power|scale_sense)$|"
    r"^(global_step|epoch_num|step_num|learning_rate|loss_scale|current_iterator_step|last_overflow_iterator_step)$|"
    r"\.router\.(router\.topk_bias|e_score_correction_bias)$"
)
"""What a training checkpoint of mindformers holds besides weights: optimizer state, counters, unused router buffers."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight by its Hugging Face name. `shape` is the unsplit shape; experts are single matrices here."""

    name: str
    target: str
    role: Role
    shape: tuple[int, ...]
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one Hugging Face weight that go into a target: all of them, or the keys or values of a key_value weight.

    The published key_value weight holds, per kv head, head_dim rows of the key and then head_dim of the value.
    """

    source: str
    shape: tuple[int, ...]
    pick: str = "all"  # all | keys | values

    @property
    def rows(self) -> int:
        return self.shape[0] if self.pick == "all" else self.shape[0] // 2


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of an output: the parts below each other, each cut by `role`; `shape` is the unsplit shape.

    `stacked` parts are the experts of a [experts, out, in] weight; with `transposed` each is stored as [in, out], as
    the grouped matmul wants it.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    stacked: bool = False
    transposed: bool = False

    def rank_shape(self, tp: int) -> tuple[int, ...]:
        shape = rank_shape(self.shape, self.role, tp)
        return (shape[0], shape[2], shape[1]) if self.transposed else shape


def weights(config: TelechatConfig) -> dict[str, Weight]:
    """Every weight of a checkpoint with this config, by Hugging Face name, in the published order."""
    result: dict[str, Weight] = {}
    for rule, layer in _rules_in_order(config):
        if rule.target is None:
            continue
        for expert in range(config.num_experts) if "{expert}" in rule.source else (None,):
            name = rule.source.format(layer=layer, expert=expert)
            shape = tuple(_axes(config)[axis] for axis in rule.shape.split())
            result[name] = Weight(name, rule.target.format(layer=layer), rule.role, shape, expert)
    return result


def dropped(config: TelechatConfig) -> set[str]:
    """Names that a checkpoint may hold and that are left out on purpose."""
    return {rule.source.format(layer=layer) for rule, layer in _rules_in_order(config) if rule.target is None}


def check_names(found: Iterable[str], config: TelechatConfig, where: object) -> None:
    """Account for every name of a Hugging Face checkpoint.

    Raises:
        CheckpointError: weights that the config asks for are missing, or some are unknown; the first five are named.
    """
    expected = weights(config)
    names = set(found) - dropped(config)
    missing = [name for name in expected if name not in names]
    if config.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(expected)} weights are missing: {name_some(missing)}",
            where=where,
            advice="The download is incomplete, or config.json belongs to another model.",
        )
    unknown = names - expected.keys()
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} weights are unknown: {name_some(unknown)}",
            where=where,
            advice="config.json belongs to another model, or this is no TeleChat2 checkpoint.",
        )


def mindformers_targets(config: TelechatConfig, *, qkv_concat: bool, transposed_experts: bool) -> list[Target]:
    """The tensors of a mindformers checkpoint, in the order of the source, so that reading stays sequential.

    Args:
        qkv_concat: pack q, k and v into `w_qkv` and gate and up into `w_gate_hidden` (dense models), as the published
            converter's --qkv_concat does; the per-head interleaved key_value weight becomes all keys, then all values.
        transposed_experts: store expert weights as [experts, in, out] for the grouped matmul, as convert_gmm.py does.
    """
    result: dict[str, Target] = {}
    for weight in weights(config).values():
        part = Part(weight.name, weight.shape)
        before = result.get(weight.target)
        if weight.expert is None:
            result[weight.target] = Target(weight.target, weight.role, weight.shape, (part,))
        elif before is None:
            shape = (
                (1, config.num_experts, 1, *weight.shape)
                if len(weight.shape) == 1
                else (config.num_experts, *weight.shape)
            )
            transposed = transposed_experts and len(weight.shape) == 2
            result[weight.target] = Target(weight.target, weight.role, shape, (part,), True, transposed)
        else:
            result[weight.target] = Target(
                before.name, before.role, before.shape, (*before.parts, part), True, before.transposed
            )
    targets = list(result.values())
    return list(_packed(targets, config)) if qkv_concat else targets


def hugging_face_targets(config: TelechatConfig) -> list[Target]:
    """The tensors of a Hugging Face checkpoint, one a weight."""
    return [Target(w.name, w.role.per_expert, w.shape, (Part(w.name, w.shape),)) for w in weights(config).values()]


def _packed(targets: list[Target], config: TelechatConfig) -> Iterator[Target]:
    """Put w_qkv in the place of wq and wk_v, w_gate_hidden in that of w1 and w3."""
    by_name = {target.name: target for target in targets}
    for target in targets:
        stem, _, kind = target.name.rpartition(".attention.")
        if kind == "wq.weight":
            query, key_value = target.parts[0], by_name[f"{stem}.attention.wk_v.weight"].parts[0]
            keys, values = (Part(key_value.source, key_value.shape, pick) for pick in ("keys", "values"))
            yield _pack(f"{stem}.attention.w_qkv.weight", (query, keys, values))
        elif target.name.endswith("feed_forward.w1.weight"):
            gate, up = target, by_name[target.name.replace("w1", "w3")]
            yield _pack(target.name.replace("w1", "w_gate_hidden"), gate.parts + up.parts)
        elif kind != "wk_v.weight" and not target.name.endswith("feed_forward.w3.weight"):
            yield target


def _pack(name: str, parts: tuple[Part, ...]) -> Target:
    return Target(name, Role.COLUMN, (sum(part.rows for part in parts), parts[0].shape[1]), parts)


def _rules_in_order(config: TelechatConfig) -> Iterator[tuple[Rule, int]]:
    wanted = {"", "moe" if config.is_moe else "dense"} | ({"embed_layernorm"} if config.embed_layernorm else set())
    rules = [rule for rule in RULES if rule.when in wanted]
    first_layer_rule = next(i for i, rule in enumerate(rules) if "{layer}" in rule.source)
    for rule in rules[:first_layer_rule]:
        yield rule, 0
    for layer in range(config.num_layers):
        for rule in rules:
            if "{layer}" in rule.source:
                yield rule, layer
    for rule in rules[first_layer_rule:]:
        if "{layer}" not in rule.source:
            yield rule, 0


def _axes(config: TelechatConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "h": config.hidden_size,
        "kv": 2 * config.kv_size,
        "f": config.ffn_size,
        "E": config.num_experts,
    }
