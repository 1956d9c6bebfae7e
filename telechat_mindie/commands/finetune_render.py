"""`telechat-mindie finetune --render mindformers`: a finetune for Ascend machines, by mindformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telechat_mindie.kv_budget import DEFAULT_CARD_GB

if TYPE_CHECKING:
    from telechat_mindie.config import TelechatConfig
    from telechat_mindie.training.mindformers.layout import Cluster, Work
    from telechat_mindie.training.mindformers.propose import Proposal

MINDFORMERS = "mindformers"
PANEL = f"With --render {MINDFORMERS}"
DEFAULT_LENGTH = 8192
DEFAULT_RATE = 1.5e-4
"""What mindformers' TeleChat2 yamls have."""


def _option(name: str, help: str) -> Any:
    return typer.Option(name, help=help, rich_help_panel=PANEL)


Render = Annotated[str | None, _option("--render", f"{MINDFORMERS}: write what mindformers needs to train it.")]
Variant = Annotated[str | None, _option("--variant", "A released size in place of MODEL, such as 7b or 115b.")]
Nodes = Annotated[int, _option("--nodes", "Machines.")]
Cards = Annotated[int, _option("--cards", "NPUs of each machine.")]
Pp = Annotated[int | None, _option("--pp", "Pipeline stages; default: the fewest that fit.")]
Ep = Annotated[int | None, _option("--ep", "Expert parallel size; default: the smallest that fits.")]
MicroBatches = Annotated[int | None, _option("--micro-batches", "Parts of a step on each card; default: 4 a stage.")]
Interleave = Annotated[int, _option("--interleave", "Runs of layers that a stage has.")]
Offset = Annotated[
    str | None, _option("--offset", "Layers of each stage above the average, as -1,1,1,-1; runs by `;`.")
]
OptimizerShard = Annotated[
    int | None, _option("--optimizer-shard", "Copies that share weights and optimizer; default: the most.")
]
DeviceMem = Annotated[float, _option("--device-mem", "Memory of a card in GB.")]
MasterAddr = Annotated[str | None, _option("--master-addr", "Address of the first machine.")]
MasterPort = Annotated[int, _option("--master-port", "A port that is free there.")]
Loaded = Annotated[
    Path | None, _option("--load", "The converted checkpoint, as the machines see it; default: in OUTPUT.")
]

_TRAINED_ALONE = {
    *("config", "steps", "no_shuffle", "min_learning_rate", "warmup", "clip", "no_document_mask", "ignore_memory"),
    *("dry_run", "eval_data", "eval_share", "eval_every", "save_dtype", "resume"),
}
"""Parameters of the command that mindformers is not told; those that it alone is told stand in PANEL."""

_MATRICES = {
    "query": "wq", "key_value": "wk_v", "dense": "wo", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"
}  # fmt: skip
"""Our modules' names -> mindformers'."""


SHOWN = 8
"""Proposals that are printed."""


def refuse_others(context: typer.Context, *, rendering: bool) -> None:
    """Raises InputError where an option was given that the other way of finetuning alone has."""
    from telechat_mindie.errors import InputError

    given = []
    for option in context.command.params:
        is_others = option.name in _TRAINED_ALONE if rendering else getattr(option, "rich_help_panel", None) == PANEL
        source = context.get_parameter_source(option.name or "")
        if is_others and source is not None and source.name == "COMMANDLINE":
            given.append(option.opts[0])
    if given:
        what = f"has no meaning with --render {MINDFORMERS}" if rendering else f"is for --render {MINDFORMERS}"
        raise InputError(what, where=", ".join(given))


def one_source(data: list[str] | None) -> Path | None:
    """The folder or file of rows that mindformers is given."""
    from telechat_mindie.errors import InputError

    if data and len(data) > 1:
        advice = "Put all of them through one `preprocess`."
        raise InputError("takes one folder or file of rows", where="DATA", found=len(data), advice=advice)
    return Path(data[0]) if data else None


def whole_epochs(epochs: float | None) -> int:
    from telechat_mindie.errors import InputError

    if epochs is not None and (epochs < 1 or epochs != int(epochs)):
        raise InputError("is no whole number", where="--epochs", expected="1 or more", found=f"{epochs:g}")
    return int(epochs or 1)


def matrices(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Modules by the names that mindformers has for them."""
    return tuple(_MATRICES[name] for name in targets)


def render_mindformers(
    checkpoint: Path | None,
    data: Path | None,
    output: Path | None,
    *,
    variant: str | None = None,
    nodes: int = 1,
    cards: int = 8,
    dp: int | None = None,
    tp: int | None = None,
    pp: int | None = None,
    ep: int | None = None,
    sequence_length: int = DEFAULT_LENGTH,
    global_batch: int | None = None,
    micro_batches: int | None = None,
    batch_size: int = 1,
    interleave: int = 1,
    offset: str | None = None,
    optimizer_shard: int | None = None,
    recompute: str | None = None,
    dtype: str = "bfloat16",
    lora_rank: int | None = None,
    lora_alpha: float = 16,
    lora_targets: tuple[str, ...] = (),
    epochs: int = 1,
    learning_rate: float = DEFAULT_RATE,
    weight_decay: float = 0.1,
    save_steps: int | None = None,
    keep: int = 3,
    seed: int = 0,
    device_mem: float = DEFAULT_CARD_GB,
    master_addr: str | None = None,
    master_port: int = 8118,
    load: Path | None = None,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Propose layouts for the cards, and write the files of the best one.

    Args:
        checkpoint: a folder with config.json, of which no more is read, or the config.json itself.
        variant: a released size instead.
        data: mindrecord of `preprocess`; None proposes only.
        output: folder to make; None proposes only.
        dp, tp, pp, ep: what is fixed of the layout; the rest is found.
        lora_rank: None trains all weights.
        lora_targets: names of mindformers' matrices; none: all that can be adapted.

    Raises:
        InputError, ConfigError: a number that mindformers could not train with, data that do not fit, or no layout that
            the cards hold.
        OutputError: the folder exists or cannot be written.
    """
    from telechat_mindie.commands.output import print_json
    from telechat_mindie.errors import InputError
    from telechat_mindie.training.mindformers.layout import Cluster, Lora, Work, adaptable, parse_offset
    from telechat_mindie.training.mindformers.propose import Choice, propose
    from telechat_mindie.training.mindformers.render import Run, write_run
    from telechat_mindie.training.mindformers.rows import count_rows

    if output is not None and data is None:
        raise InputError("is needed, for the files name it", where="DATA", advice="Make it with `preprocess`.")
    config = _config(checkpoint, variant)
    lora = None
    if lora_rank is not None:
        lora = Lora(lora_rank, lora_alpha, lora_targets or adaptable(config))
    choice = Choice(
        dp=dp,
        tp=tp,
        pp=pp,
        ep=ep,
        global_batch=global_batch,
        micro_batches=micro_batches,
        batch_size=batch_size,
        interleave=interleave,
        offset=parse_offset(offset) if offset is not None else (),
        optimizer_shard=optimizer_shard,
        recompute=recompute,
    )
    cluster = Cluster(nodes, cards, device_mem)
    work = Work(config, sequence_length, lora, dtype)
    propose(choice, work, cluster)  # what is wrong without the data is said before they are read
    if data is not None:
        rows = count_rows(data, sequence_length, config.vocab_size)
        work = Work(config, sequence_length, lora, dtype, rows)
    proposals = propose(choice, work, cluster)
    files: list[str] = []
    if output is not None and data is not None:
        run = Run(
            data=data,
            source=checkpoint.parent if checkpoint is not None and checkpoint.suffix == ".json" else checkpoint,
            checkpoint=load,
            epochs=epochs,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            save_steps=save_steps,
            keep=keep,
            seed=seed,
            master_addr=master_addr,
            master_port=master_port,
        )
        files = write_run(output, run, proposals[0], work, cluster, force=force)
    if as_json:
        print_json(_as_dict(proposals, work, output, files))
    else:
        _print(proposals, work, cluster, output, files)


def _config(checkpoint: Path | None, variant: str | None) -> TelechatConfig:
    from telechat_mindie import variants
    from telechat_mindie.computation import check_computation
    from telechat_mindie.config import TelechatConfig
    from telechat_mindie.errors import InputError

    if (checkpoint is None) == (variant is None):
        raise InputError("name one of the two", where="CHECKPOINT, --variant")
    if checkpoint is None:
        return variants.named(variant or "")
    path = checkpoint if checkpoint.suffix == ".json" else checkpoint / "config.json"
    config = TelechatConfig.from_file(path)
    check_computation(config, path)
    return config


def _as_dict(proposals: list[Proposal], work: Work, output: Path | None, files: list[str]) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "output": None if output is None else str(output),
        "files": files,
        "rows": work.rows,
        "proposals": [
            asdict(proposal.layout)
            | {
                "global_batch": proposal.layout.global_batch,
                "stage_bytes": [{part: round(count) for part, count in asdict(m).items()} for m in proposal.stages],
                "peak_bytes": round(proposal.peak),
            }
            for proposal in proposals
        ],
    }


def _print(proposals: list[Proposal], work: Work, cluster: Cluster, output: Path | None, files: list[str]) -> None:
    from telechat_mindie.commands.output import print_table
    from telechat_mindie.training.mindformers.memory import usable_bytes
    from telechat_mindie.training.mindformers.render import memory_table
    from telechat_mindie.units import GB

    if len(proposals) > 1:
        header = ("dp", "tp", "pp", "ep", "sequences a step", "recomputed", "GB a card")
        rows = []
        for proposal in proposals[:SHOWN]:
            layout = proposal.layout
            numbers = (layout.dp, layout.tp, layout.pp, layout.ep, layout.global_batch)
            rows.append((*map(str, numbers), layout.recompute, f"{proposal.peak / GB:.1f}"))
        print_table(f"layouts of {cluster.world} cards, least communication first", rows, header)
    parts = ("stage", "layers", "weights", "gradients", "optimizer", "16 bits", "activations", "logits", "all")
    rows = [
        tuple(map(str, (stage["stage"], stage["layers"], *stage["parts"], stage["total"])))
        for stage in memory_table(proposals[0], work)
    ]
    print_table(
        f"{proposals[0].layout}: GB of a card, of {usable_bytes(cluster) / GB:.1f} that are counted on", rows, parts
    )
    if output is None:
        return
    if work.rows is not None:
        print(f"{work.rows:,} rows, {work.rows // proposals[0].layout.global_batch:,} steps an epoch")
    print(f"{output}: {', '.join(files)}")
    print(f"next: {output / 'README.md'} says what to run in which order")
