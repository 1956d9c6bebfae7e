"""What a finetune takes of a card's memory, stage by stage, estimated from the shapes.

Weights are float32 with AdamW's two moments, computed in 16 bits (2 bytes); the optimizer parallel of MindSpore divides
weights and moments over the copies and gathers the 16-bit weights for the step. Activations are what the backward
pass of research/telechat2 needs, counted tensor by tensor. Nothing here was measured on an NPU; the layouts that
mindformers publishes come out below what their yamls allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache

from telechat_mindie.checkpoint.mapping import HEAD, Target, mindformers_targets
from telechat_mindie.checkpoint.sharding import Role
from telechat_mindie.config import TelechatConfig
from telechat_mindie.training.mindformers.layout import Cluster, Layout, Work
from telechat_mindie.units import GB

EMBEDDING, FINAL_NORM = "model.tok_embeddings.embedding_weight", "model.norm_out.weight"

USABLE_SHARE = 0.9
"""Of a card: the rest is the driver's, CANN's and the communication buffers'. mindformers' yamls give the pool 54.5 to
58 of 64 GB."""

FULL, HALF = 4, 2  # bytes of float32 and of the dtype that is computed in

SHARD_THRESHOLD_KB = 64
"""KB of the smallest tensor that the optimizer parallel divides (parallel_optimizer_threshold)."""

GRADIENT_GROUPS = 4
"""Gradients are reduced in so many groups, of which one is whole at a time, in 16 bits (gradient_aggregation_group)."""

CAPACITY_FACTOR = 1.2
"""Places for tokens that experts have, over those that are needed."""

STATISTICS = 64
"""Bytes that flash attention keeps of a token and head: maximum and sum of the softmax, 8 float32 each."""

MASK = 3
"""Bytes of a pair of positions: the causal mask as bytes, and in 16 bits while it is made."""

LOGITS = HALF + 4 * FULL
"""Bytes of a logit at the peak: itself, its logarithm, the one-hot label, the softmax and their difference
(core/loss/loss.py CrossEntropyLoss)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one card of a stage.

    Attributes:
        weights: as stored.
        gradients: accumulated, or of one aggregation group beside the divided ones.
        optimizer: both moments.
        computed: weights in the dtype that is computed in.
        activations: kept for the backward pass by all micro batches under way, and one layer at work.
        logits: of the last stage, with what the loss makes of them.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    computed: float = 0.0
    activations: float = 0.0
    logits: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, count: float) -> Memory:
        return Memory(*(getattr(self, field.name) * count for field in fields(self)))


def usable_bytes(cluster: Cluster) -> float:
    return cluster.device_gb * USABLE_SHARE * GB


def estimate(layout: Layout, work: Work) -> list[Memory]:
    """Of a card of each stage, the first stage first."""
    config = work.config
    layer, first, last = _groups(config)
    of_layer = _weights(layer, layout, work)
    runs = layout.stage_layers(config.num_layers)
    stages = []
    for stage in range(layout.pp):
        layers = sum(run[stage] for run in runs)
        memory = of_layer * layers
        if stage == 0:
            memory += _weights(first, layout, work)
        if stage == layout.pp - 1:
            memory += _weights(last, layout, work) + Memory(logits=_logits(layout, work))
        stages.append(memory + Memory(activations=_activations(stage, runs, layout, work)))
    return stages


@lru_cache(maxsize=1)
def _groups(config: TelechatConfig) -> tuple[list[Target], list[Target], list[Target]]:
    """The tensors of a layer, and those of the first and the last stage beside."""
    layer, first, last = [], [], []
    for target in mindformers_targets(replace(config, num_layers=1), qkv_concat=False, transposed_experts=False):
        if target.name.startswith("model.layers."):
            layer.append(target)
        elif target.name in (HEAD, FINAL_NORM):
            last.append(target)
        else:
            first.append(target)
    return layer, first, last


def _weights(targets: Iterable[Target], layout: Layout, work: Work) -> Memory:
    total = Memory()
    for target in targets:
        shape, copies = _rank_shape(target, layout), layout.dp
        if _is_expert(target):
            copies //= layout.ep
        if work.lora:  # frozen, and stored as it is computed with but for the embedding
            total += Memory(weights=(FULL if target.name == EMBEDDING else HALF) * math.prod(shape))
        else:
            total += _trained(shape, layout, min(layout.optimizer_shard, copies))
        if work.lora and target.name.removesuffix(".weight").rpartition(".")[2] in work.lora.targets:
            for factor in _factors(target, work.lora.rank, layout.tp):
                total += _trained(factor, layout, min(layout.optimizer_shard, copies))
    return total


def _is_expert(target: Target) -> bool:
    return ".feed_forward.ffn." in target.name


def _rank_shape(target: Target, layout: Layout) -> tuple[int, ...]:
    if _is_expert(target):  # [experts, out, in], biases [1, experts, 1, out]: over ep and tp alike (ep_extend_tp)
        groups, shape = layout.ep * layout.tp, target.shape
        return (shape[0] // groups, *shape[1:]) if len(shape) == 3 else (shape[0], shape[1] // groups, *shape[2:])
    return target.rank_shape(layout.tp)


def _factors(target: Target, rank: int, tp: int) -> Iterator[tuple[int, int]]:
    """LoRA's a [rank, in] and b [out, rank]; the one beside the axis that tp cuts is cut with it."""
    rows, columns = target.shape
    yield rank, columns // (tp if target.role is Role.ROW else 1)
    yield rows // (tp if target.role is Role.COLUMN else 1), rank


def _trained(shape: tuple[int, ...], layout: Layout, shard: int) -> Memory:
    elements = math.prod(shape)
    if FULL * elements < SHARD_THRESHOLD_KB << 10 or shape[0] % shard:
        shard = 1  # MindSpore leaves such a tensor whole
    gradients = stored = FULL * elements / shard
    if layout.micro_batches > 1:
        gradients = float(FULL * elements)  # gradient_accumulation_shard is off
    elif shard > 1:
        gradients += HALF * elements / GRADIENT_GROUPS
    gathered = shard > 1 or layout.recompute != "full"  # else each layer's is made again when it is needed
    return Memory(stored, gradients, 2 * stored, HALF * elements if gathered else 0.0)


def _logits(layout: Layout, work: Work) -> float:
    return LOGITS * layout.batch_size * work.sequence_length * work.config.vocab_size / layout.tp


def _activations(stage: int, runs: list[list[int]], layout: Layout, work: Work) -> float:
    """1F1B: the earlier a stage, the more micro batches have passed it and not come back."""
    count, pp = len(runs), layout.pp
    if count == 1:
        under_way = min(layout.micro_batches, pp - stage)
        layers = under_way * runs[0][stage]
    else:
        under_way = min(layout.micro_batches * count, 2 * (pp - stage - 1) + (count - 1) * pp + 1)
        layers = under_way * max(run[stage] for run in runs)
    tokens = layout.batch_size * work.sequence_length
    kept = _layer_bytes(layout, work.config, layout.recompute)
    mask = MASK * layout.batch_size * work.sequence_length**2
    return tokens * (layers * kept + _layer_bytes(layout, work.config, "off")) + mask


def _layer_bytes(layout: Layout, config: TelechatConfig, recompute: str) -> float:
    """Bytes of a token that a layer keeps on a card."""
    hidden, tp = config.hidden_size, layout.tp
    residual = FULL * hidden / tp  # res_dtype float32, cut along the sequence
    if recompute == "full":
        return residual
    selected = recompute == "select"
    normed = HALF * hidden / (tp if selected else 1)  # gathered again where selected
    # q, k and v after the rotation, the output, and the same with heads side by side
    attention = (HALF * (3 * hidden + 2 * config.kv_size) + STATISTICS * config.num_heads) / tp
    share = config.experts_per_token * CAPACITY_FACTOR if config.is_moe else 1
    # gate, its activation, up, and their product; the middle ones are selected
    products = 2 if selected and not config.is_moe else 4
    feed_forward = share * HALF * products * config.ffn_size / tp
    dispatched = 2 * share * HALF * hidden / tp if config.is_moe else 0  # to the experts and back
    return 2 * (residual + normed) + attention + feed_forward + dispatched
