"""The one name table: Hugging Face name, mindformers name, role and shape of every TeleChat2 weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from telechat_mindie.checkpoint.sharding import Role, rank_shape
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, name_some
from telechat_mindie.foreign import refuse_foreign


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table. `shape` names the axes, see `weights`."""

    source: str
    target: str
    role: Role
    shape: str
    when: str = ""  # "", "dense", "moe" or "embed_layernorm": the models that have it


EMBEDDINGS, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
"""One weight, where they are tied."""

_LAYER = "transformer.h.{layer}."
_EXPERT = _LAYER + "mlp.local_experts.{expert}."
_TARGET = "model.layers.{layer}."

RULES = (
    Rule(EMBEDDINGS, "model.tok_embeddings.embedding_weight", Role.COLUMN, "V h"),
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
    Rule(HEAD, HEAD, Role.COLUMN, "V h"),
)

HUGGING_FACE_DROPPED = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention|self_attention)\.(masked_)?bias)"
)
"""Buffers that old exports saved: the rotary embedding's tables and the causal mask; they are computed, not learned."""

PUBLISHED_NAME = re.compile(
    r"(?P<wrapper>(?:(?:module|model|_orig_mod|base_model\.model)\.)*)"
    r"(?:(?P<trunk>transformer\.)?(?P<rest>(?:word_embeddings|ln_f|h\.\d+)[._].*)|lm_head\..*)"
)
"""A published name behind prefixes that training and saving leave, with or without `transformer.`.

`module.` is DataParallel's and DeepSpeed's prefix, `_orig_mod.` torch.compile's, `base_model.model.` peft's, `model.`
that of many a trainer's wrapper; the base class of transformers saves without `transformer.`."""

MINDFORMERS_NAME = re.compile(
    r"(.*\.)?(tok_embeddings\.|norm_out\.|layers\.\d+\.(attention|feed_forward|attention_norm|ffn_norm)\.)"
)
"""How the names of mindformers' research/telechat2 begin, which safetensors files may have too."""

OPTIMIZER_PREFIX = re.compile(r"(adam_[mv]|moments|moment[12]|accu_grads)\.")
"""What an optimizer puts before a parameter's name for its state of it."""

TRAINING_STATE = {
    "counter": re.compile(
        r"(adam_[mv]\.)?(global_(step|batch_size)|(epoch|step)_num|scale_sense|loss_scale|learning_rate|"
        r"(current|last_overflow)_iterator_step)|beta[12]_power"
    ),
    "optimizer": re.compile(f"{OPTIMIZER_PREFIX.pattern}.+"),
    "buffer": re.compile(
        r"fi_parameter|.+\.(fi_parameter|expert_load)|.+\.router\.(router\.topk_bias|e_score_correction_bias)"
    ),
}
"""What a training checkpoint of mindformers holds besides weights, by kind: the optimizer's state of each parameter,
counters of the run, and what the router's balancing counts, which inference does not use (callback.py of mindformers,
CheckpointMonitor and MoE callbacks)."""


def training_state(name: str) -> str | None:
    """The kind of TRAINING_STATE that a tensor of a mindformers checkpoint is; None for a weight."""
    return next((kind for kind, pattern in TRAINING_STATE.items() if pattern.fullmatch(name)), None)


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
    """Rows of one weight that go into a target: all of them, or the keys or values of a key_value weight.

    The published key_value weight holds, per kv head, head_dim rows of the key and then head_dim of the value.
    """

    source: str
    shape: tuple[int, ...]  # of the weight
    pick: str = "all"  # all | keys | values
    head_dim: int = 0

    @property
    def rows(self) -> int:
        return self.shape[0] if self.pick == "all" else self.shape[0] // 2

    def pick_rows(self, rows: range) -> Iterator[range]:
        """Those of the weight's `rows`, which are of whole heads, that belong to the part."""
        if self.pick == "all":
            yield rows
            return
        for head in range(rows.start, rows.stop, 2 * self.head_dim):
            first = head if self.pick == "keys" else head + self.head_dim
            yield range(first, first + self.head_dim)


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of an output: the parts below each other, each cut by `role`; `shape` is the unsplit shape.

    The parts of an [experts, out, in] tensor are the experts' matrices; with `transposed` each is stored as [in, out],
    as the grouped matmul wants it. `dtype` is set where it is another than that of the whole conversion.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    transposed: bool = False
    dtype: str = ""

    def rank_shape(self, tp: int) -> tuple[int, ...]:
        shape = rank_shape(self.shape, self.role, tp)
        return (shape[0], shape[2], shape[1]) if self.transposed else shape


def weights(config: TelechatConfig) -> dict[str, Weight]:
    """Every weight of a checkpoint with this config, by Hugging Face name, in the published order."""
    axes = {
        "V": config.vocab_size,
        "h": config.hidden_size,
        "kv": 2 * config.kv_size,
        "f": config.ffn_size,
        "E": config.num_experts,
    }
    result: dict[str, Weight] = {}
    for rule, layer in _rules_in_order(config):
        shape = tuple(axes[axis] for axis in rule.shape.split())
        for expert in range(config.num_experts) if "{expert}" in rule.source else (None,):
            name = rule.source.format(layer=layer, expert=expert)
            result[name] = Weight(name, rule.target.format(layer=layer), rule.role, shape, expert)
    return result


def mindformers_targets(config: TelechatConfig, *, qkv_concat: bool, transposed_experts: bool) -> list[Target]:
    """The tensors of a mindformers checkpoint, in the order of the source, so that reading stays sequential.

    Args:
        qkv_concat: pack q, k and v into `w_qkv` and gate and up into `w_gate_hidden` (dense models), as the published
            converter's --qkv_concat does; the per-head interleaved key_value weight becomes all keys, then all values.
        transposed_experts: store expert weights as [experts, in, out] for the grouped matmul, as convert_gmm.py does.
    """
    by_target: dict[str, list[Weight]] = {}
    for weight in weights(config).values():
        by_target.setdefault(weight.target, []).append(weight)
    targets = [_target(name, group, transposed_experts) for name, group in by_target.items()]
    return list(_packed(targets, config)) if qkv_concat else targets


def hugging_face_targets(config: TelechatConfig) -> list[Target]:
    """The tensors of a Hugging Face checkpoint, one a weight."""
    return [Target(w.name, w.role.per_expert, w.shape, (Part(w.name, w.shape),)) for w in weights(config).values()]


def published_names(names: Iterable[str], where: object) -> dict[str, str]:
    """Published name -> name in the file, for every tensor of a Hugging Face checkpoint that is not dropped.

    Raises:
        CheckpointError: the names do not all stand under one prefix, so that it is not certain what they mean.
    """
    result: dict[str, str] = {}
    wrappers: dict[str, str] = {}  # and a name under each
    trunks: dict[str, str] = {}
    for name in names:
        if HUGGING_FACE_DROPPED.fullmatch(name):
            continue
        published = name
        if match := PUBLISHED_NAME.fullmatch(name):
            wrappers.setdefault(match["wrapper"], name)
            published = name.removeprefix(match["wrapper"])
            if match["rest"]:
                trunks.setdefault(match["wrapper"] + (match["trunk"] or ""), name)
                published = f"transformer.{match['rest']}"
        result[published] = name
    for found in (wrappers, trunks):
        if len(found) > 1:
            raise CheckpointError(
                "holds weights under several prefixes, so that it is not certain which are the model's",
                where=where,
                found=" and ".join(sorted(found.values())[:2]),
                advice="Save the state dict of the innermost model alone.",
            )
    return result


def differences(
    found: Mapping[str, tuple[int, ...] | None], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, str]]:
    """How the tensors that are there differ from those that should be: ("missing" | "unknown" | "shape", a clause).

    Args:
        found: shape by name; None where it is not known.
    """
    if missing := [name for name in expected if name not in found]:
        yield "missing", f"{len(missing)} of {len(expected)} weights are missing: {name_some(missing)}"
    if unknown := found.keys() - expected.keys():
        yield "unknown", f"{len(unknown)} weights are unknown: {name_some(unknown)}"
    wrong = [
        f"{name} is {list(shape)} and should be {list(expected[name])}"
        for name, shape in found.items()
        if shape is not None and name in expected and shape != expected[name]
    ]
    if wrong:
        yield "shape", f"{len(wrong)} weights have the wrong shape: {name_some(wrong, 2)}"


def check_weights(found: Mapping[str, tuple[int, ...] | None], config: TelechatConfig, where: object) -> None:
    """Account for every tensor of a Hugging Face checkpoint, by published name, given as for `differences`.

    Raises:
        CheckpointError: weights that the config asks for are missing or of another shape, or some are unknown.
    """
    expected = {weight.name: weight.shape for weight in weights(config).values()}
    if config.tie_word_embeddings and HEAD not in found:
        del expected[HEAD]
    refuse_foreign("tensor", found, where, CheckpointError)
    for problem, clause in differences(found, expected):
        advice = "config.json belongs to another model."
        if expected.keys() - found.keys() == {HEAD}:
            said = "says" if "tie_word_embeddings" in config.raw else "does not say, which means"
            advice = (
                f"config.json {said} tie_word_embeddings false; set it to true if the model was trained with the "
                "embeddings as its output layer, otherwise the download is incomplete."
            )
        elif problem == "missing":
            advice = f"The download is incomplete, or {advice}"
        raise CheckpointError(clause, where=where, advice=advice)


def _target(name: str, group: list[Weight], transposed_experts: bool) -> Target:
    """The target that one weight makes, or the same weight of every expert."""
    first = group[0]
    parts = tuple(Part(weight.name, weight.shape) for weight in group)
    if first.expert is None:
        return Target(name, first.role, first.shape, parts)
    if len(first.shape) == 1:
        return Target(name, first.role, (1, len(group), 1, *first.shape), parts)
    return Target(name, first.role, (len(group), *first.shape), parts, transposed_experts)


def _packed(targets: list[Target], config: TelechatConfig) -> Iterator[Target]:
    """Put w_qkv in the place of wq and wk_v, w_gate_hidden in that of w1 and w3."""
    parts = {target.name: target.parts for target in targets}
    for target in targets:
        stem, _, kind = target.name.rpartition(".attention.")
        if kind == "wq.weight":
            key_value = parts[f"{stem}.attention.wk_v.weight"][0]
            keys, values = (
                Part(key_value.source, key_value.shape, kind, config.head_dim) for kind in ("keys", "values")
            )
            yield _pack(f"{stem}.attention.w_qkv.weight", (*target.parts, keys, values))
        elif target.name.endswith("feed_forward.w1.weight"):
            gate_up = target.parts + parts[target.name.replace("w1", "w3")]
            yield _pack(target.name.replace("w1", "w_gate_hidden"), gate_up)
        elif kind != "wk_v.weight" and not target.name.endswith("feed_forward.w3.weight"):
            yield target


def _pack(name: str, parts: tuple[Part, ...]) -> Target:
    return Target(name, Role.COLUMN, (sum(part.rows for part in parts), parts[0].shape[1]), parts)


def _rules_in_order(config: TelechatConfig) -> Iterator[tuple[Rule, int]]:
    """The rules that apply to a model, those of a layer for each layer in turn."""
    wanted = {"", "moe" if config.is_moe else "dense"} | ({"embed_layernorm"} if config.embed_layernorm else set())
    for of_layer, group in groupby(RULES, lambda rule: "{layer}" in rule.source):
        rules = [rule for rule in group if rule.when in wanted]
        for layer in range(config.num_layers) if of_layer else (0,):
            yield from ((rule, layer) for rule in rules)
