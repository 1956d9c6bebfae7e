"""What mindformers 1.6.0 asks of a layout, and what its TeleChat2 cannot train. Sources are files of v1.6.0."""

from __future__ import annotations

from collections.abc import Iterator

from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError, InputError, TelechatMindieError
from telechat_mindie.training.mindformers.layout import RECOMPUTE, Cluster, Layout, Work, adaptable, too_small

ATTENTION_BLOCK = 16
"""Flash attention takes sequences of a multiple of it."""

MAX_CARDS = 4096


def check(layout: Layout, work: Work, cluster: Cluster) -> None:
    """Raise the first of `faults`."""
    for fault in faults(layout, work, cluster):
        raise fault


def faults(layout: Layout, work: Work, cluster: Cluster) -> Iterator[TelechatMindieError]:
    """Why mindformers could not train so, each a sentence that names the numbers."""
    yield from work_faults(work)
    yield from _size_faults(layout, cluster)
    yield from _tensor_faults(layout, work, cluster)
    yield from _world_faults(layout, cluster)
    yield from _stage_faults(layout, work.config)
    yield from _batch_faults(layout, work)
    yield from _expert_faults(layout, work.config)
    yield from _optimizer_faults(layout, work)


def work_faults(work: Work) -> Iterator[TelechatMindieError]:
    """What no layout mends."""
    config, lora = work.config, work.lora
    if config.tie_word_embeddings or config.embed_layernorm:
        what = "tied embeddings" if config.tie_word_embeddings else "a norm after its embedding"
        yield ConfigError(f"has {what}, which mindformers' TeleChat2 has not", where="config.json")
    if work.dtype != "bfloat16":
        advice = "float16 needs a loss scale that this recipe has not, and flash attention takes no float32."
        yield InputError("cannot be trained in", where="--dtype", expected="bfloat16", found=work.dtype, advice=advice)
    if work.sequence_length < 1 or work.sequence_length % ATTENTION_BLOCK:
        yield InputError(
            "does not suit flash attention",
            where="--max-length",
            expected=f"a multiple of {ATTENTION_BLOCK}",
            found=work.sequence_length,
        )
    if lora is None:
        return
    if lora.rank < 1 or lora.alpha <= 0:
        found = f"rank {lora.rank}, alpha {lora.alpha:g}"
        yield InputError("is out of range", where="LoRA", expected="rank >= 1, alpha > 0", found=found)
    allowed = adaptable(config)
    if not lora.targets or (unknown := [name for name in lora.targets if name not in allowed]):
        yield InputError(
            "cannot be adapted" + (": mindformers adapts no experts" if config.is_moe else ""),
            where="LoRA targets",
            expected=", ".join(allowed),
            found=", ".join(unknown) if lora.targets else "none",
        )


def _size_faults(layout: Layout, cluster: Cluster) -> Iterator[InputError]:
    numbers = {
        "--dp": layout.dp,
        "--tp": layout.tp,
        "--pp": layout.pp,
        "--ep": layout.ep,
        "--micro-batch": layout.batch_size,
        "--micro-batches": layout.micro_batches,
        "--interleave": layout.interleave,
        "--optimizer-shard": layout.optimizer_shard,
    }
    yield from too_small(numbers)
    if cluster.world > MAX_CARDS:
        yield InputError("are too many cards", where="--nodes x --cards", expected=MAX_CARDS, found=cluster.world)
    if layout.recompute not in RECOMPUTE:
        yield InputError("is unknown", where="--recompute", expected=" or ".join(RECOMPUTE), found=layout.recompute)


def _tensor_faults(layout: Layout, work: Work, cluster: Cluster) -> Iterator[TelechatMindieError]:
    tp = layout.tp
    if cluster.cards % tp:
        yield InputError(
            "a tensor parallel group would reach over machines",
            where="--tp",
            expected=f"a divisor of the {cluster.cards} cards of one",
            found=tp,
            advice="It exchanges every layer's activations several times a step.",
        )
    try:
        work.config.check_tp(tp)  # the same rule as for serving
    except ConfigError as error:
        yield error
    if layout.sequence_parallel and work.sequence_length % tp:
        yield InputError(
            "cannot be cut by sequence parallelism",
            where="--max-length",
            expected=f"a multiple of tp {tp}",
            found=work.sequence_length,
        )


def _world_faults(layout: Layout, cluster: Cluster) -> Iterator[InputError]:
    if layout.world != cluster.world:  # tools/check_rules.py _check_parallel
        yield InputError(
            f"dp {layout.dp} x tp {layout.tp} x pp {layout.pp} is another number of cards than there are",
            where="--dp, --tp, --pp",
            expected=f"{cluster.world}, {cluster.nodes} x {cluster.cards}",
            found=layout.world,
        )


def _stage_faults(layout: Layout, config: TelechatConfig) -> Iterator[InputError]:
    pp, runs, layers = layout.pp, layout.interleave, config.num_layers
    if runs > 1 and pp == 1:
        yield InputError("needs stages to interleave", where="--interleave", expected="1 with pp 1", found=runs)
    if layers < pp * runs:
        yield InputError(
            "are too few for the stages", where="layers", expected=f"at least {pp} x {runs} = {pp * runs}", found=layers
        )
        return
    offset, left = layout.offsets(layers), layers % (pp * runs)
    if len(offset) != runs or any(len(run) != pp for run in offset):  # models/utils.py LayerSetting._check_inputs
        yield InputError(
            "has the wrong length",
            where="--offset",
            expected=f"{runs} x {pp} numbers, one a stage",
            found=" ; ".join(",".join(map(str, run)) for run in offset),
        )
        return
    if (total := sum(map(sum, offset))) != left:
        yield InputError(
            f"has the wrong sum: {layers} layers over {pp} stages x {runs} leave {left}",
            where="--offset",
            expected=left,
            found=total,
        )
    if (fewest := min(map(min, layout.stage_layers(layers)))) < 1:
        yield InputError("leaves a stage without layers", where="--offset", expected="at least 1", found=fewest)


def _batch_faults(layout: Layout, work: Work) -> Iterator[InputError]:
    if layout.micro_batches < layout.pp:  # modules/transformer/transformer.py TransformerOpParallelConfig
        yield InputError(
            "are fewer than the stages", where="--micro-batches", expected=layout.pp, found=layout.micro_batches
        )
    if layout.world == 1 and layout.micro_batches > 1:  # trainer/base_trainer.py _check_grad_accumulation_steps
        yield InputError(
            "cannot be accumulated by mindformers on a single card",
            where="--micro-batches",
            expected=1,
            found=layout.micro_batches,
            advice="Raise --micro-batch instead.",
        )
    if work.rows is not None and work.rows < layout.global_batch:
        yield InputError(
            f"are fewer than the sequences of one step, {layout.batch_size} x dp {layout.dp} x "
            f"{layout.micro_batches} micro batches: mindformers would train nothing",
            where="rows",
            expected=f"at least {layout.global_batch}",
            found=work.rows,
        )


def _expert_faults(layout: Layout, config: TelechatConfig) -> Iterator[InputError]:
    if not config.is_moe:
        if layout.ep > 1:
            yield InputError("is for a model with experts", where="--ep", expected=1, found=layout.ep)
        return
    if layout.dp % layout.ep:  # modules/transformer/moe.py _check_moe_config
        yield InputError("does not divide dp", where="--ep", expected=f"a divisor of {layout.dp}", found=layout.ep)
    groups = layout.ep * layout.tp
    if config.num_experts % groups:
        yield InputError(
            f"does not divide the experts: ep {layout.ep} x tp {layout.tp} = {groups} groups",
            where="--ep",
            expected=f"a divisor of {config.num_experts}",
            found=groups,
        )


def _optimizer_faults(layout: Layout, work: Work) -> Iterator[InputError]:
    copies = layout.dp // layout.ep if work.config.is_moe else layout.dp
    if max(copies, 1) % layout.optimizer_shard:
        meaning = f"the {copies} copies of an expert, dp / ep" if work.config.is_moe else f"dp {layout.dp}"
        yield InputError(
            "does not divide the copies of a weight",
            where="--optimizer-shard",
            expected=f"a divisor of {meaning}",
            found=layout.optimizer_shard,
        )
