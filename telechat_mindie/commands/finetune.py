"""`telechat-mindie finetune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from telechat_mindie.commands.finetune_options import (
    BatchSize,
    Clip,
    Data,
    Dp,
    DryRun,
    Dtype,
    Epochs,
    EvalData,
    EvalEvery,
    EvalShare,
    IgnoreMemory,
    Keep,
    LearningRate,
    Lora,
    MaxLength,
    MicroBatch,
    MinLearningRate,
    Model,
    NoDocumentMask,
    NoShuffle,
    Output,
    Recompute,
    SaveDtype,
    SaveEvery,
    Seed,
    Steps,
    Tp,
    Warmup,
    WeightDecay,
)
from telechat_mindie.commands.finetune_render import (
    DEFAULT_LENGTH,
    DEFAULT_RATE,
    MINDFORMERS,
    Cards,
    DeviceMem,
    Ep,
    Interleave,
    Loaded,
    MasterAddr,
    MasterPort,
    MicroBatches,
    Nodes,
    Offset,
    OptimizerShard,
    Pp,
    Render,
    Variant,
    matrices,
    one_source,
    refuse_others,
    render_mindformers,
    whole_epochs,
)
from telechat_mindie.commands.options import AsJson, ConfigDir, Force, Resume
from telechat_mindie.kv_budget import DEFAULT_CARD_GB

if TYPE_CHECKING:
    from telechat_mindie.training import settings


def finetune(
    context: typer.Context,
    model: Model = None,
    data: Data = None,
    output: Output = None,
    config: ConfigDir = None,
    lora: Lora = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    micro_batch: MicroBatch = 1,
    max_length: MaxLength = None,
    seed: Seed = 0,
    no_shuffle: NoShuffle = False,
    learning_rate: LearningRate = None,
    min_learning_rate: MinLearningRate = None,
    warmup: Warmup = None,
    weight_decay: WeightDecay = 0.1,
    clip: Clip = 1.0,
    dtype: Dtype = None,
    recompute: Recompute = False,
    no_document_mask: NoDocumentMask = False,
    dp: Dp = None,
    tp: Tp = None,
    ignore_memory: IgnoreMemory = False,
    dry_run: DryRun = False,
    eval_data: EvalData = None,
    eval_share: EvalShare = 0.0,
    eval_every: EvalEvery = 0,
    save_every: SaveEvery = 0,
    keep: Keep = 2,
    save_dtype: SaveDtype = "auto",
    render: Render = None,
    variant: Variant = None,
    nodes: Nodes = 1,
    cards: Cards = 8,
    pp: Pp = None,
    ep: Ep = None,
    micro_batches: MicroBatches = None,
    interleave: Interleave = 1,
    offset: Offset = None,
    optimizer_shard: OptimizerShard = None,
    device_mem: DeviceMem = DEFAULT_CARD_GB,
    master_addr: MasterAddr = None,
    master_port: MasterPort = 8118,
    load: Loaded = None,
    resume: Resume = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train all weights of a checkpoint, or a LoRA adapter, on conversations.

    OUTPUT/model is a checkpoint for `build`, OUTPUT/adapter one for `build --adapter`. It runs on a CPU; on Ascend it
    is the same code, unproven. --render mindformers trains nothing: it writes what mindformers needs to do it on
    Ascend machines, and without DATA only proposes how to divide the model over the cards.

    Examples:
        telechat-mindie finetune TeleChat2-7B rows -o run --lora 8,16
        telechat-mindie finetune TeleChat2-7B rows -o run --lora 8,16 --resume
        telechat-mindie finetune TeleChat2-115B rows -o cluster --render mindformers --nodes 8 --cards 8
        telechat-mindie finetune --render mindformers --variant 35b --nodes 2
    """
    from telechat_mindie.errors import InputError

    refuse_others(context, rendering=render is not None)
    if render is not None:
        if render != MINDFORMERS:
            raise InputError("is unknown", where="--render", expected=MINDFORMERS, found=render)
        factors = _lora(lora, seed)
        named = [*([] if model is None else [str(model)]), *(data or ())]  # with --variant all of them are DATA
        render_mindformers(
            None if variant is not None else model,
            one_source(named if variant is not None else data),
            output,
            variant=variant,
            nodes=nodes,
            cards=cards,
            dp=dp,
            tp=tp,
            pp=pp,
            ep=ep,
            sequence_length=DEFAULT_LENGTH if max_length is None else max_length,
            global_batch=batch_size,
            micro_batches=micro_batches,
            batch_size=micro_batch,
            interleave=interleave,
            offset=offset,
            optimizer_shard=optimizer_shard,
            recompute="full" if recompute else None,
            dtype=_dtype(dtype or "bf16"),
            lora_rank=factors.rank if factors else None,
            lora_alpha=factors.alpha if factors else 0,
            lora_targets=matrices(factors.targets) if factors and (lora or "").count(",") > 1 else (),
            epochs=whole_epochs(epochs),
            learning_rate=DEFAULT_RATE if learning_rate is None else learning_rate,
            weight_decay=weight_decay,
            save_steps=save_every or None,
            keep=keep,
            seed=seed,
            device_mem=device_mem,
            master_addr=master_addr,
            master_port=master_port,
            load=load,
            force=force,
            as_json=as_json,
        )
        return
    if model is None or not data or output is None:
        missing = "MODEL" if model is None else "-o" if data else "DATA"
        raise InputError("is missing", where=missing, advice="telechat-mindie finetune MODEL DATA -o OUTPUT")

    from telechat_mindie.commands.finetune_run import run_finetune, try_finetune
    from telechat_mindie.training.request import Request
    from telechat_mindie.training.settings import Computation

    request = Request(
        model=model,
        config_dir=config,
        data=data,
        held_out=eval_data or (),
        held_out_share=eval_share,
        max_length=max_length,
        epochs=epochs,
        steps=steps,
        batch=8 if batch_size is None else batch_size,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        min_learning_rate=min_learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        lora=_lora(lora, seed),
        computation=Computation(
            dtype=_dtype(dtype or "fp32"),
            recompute=recompute,
            document_mask=not no_document_mask,
            dp=1 if dp is None else dp,
            tp=1 if tp is None else tp,
        ),
        seed=seed,
        shuffle=not no_shuffle,
        eval_every=eval_every,
        save_every=save_every,
        save_dtype=save_dtype,
    )
    if dry_run:
        try_finetune(request, output, as_json)
    else:
        run_finetune(request, output, keep, resume, force, ignore_memory, as_json)


def _lora(text: str | None, seed: int) -> settings.Lora | None:
    """`8,16` or `8,16,query+key_value`."""
    from telechat_mindie.errors import InputError
    from telechat_mindie.training import settings

    if text is None:
        return None
    rank, _, rest = text.partition(",")
    alpha, _, modules = rest.partition(",")
    try:
        return settings.Lora(int(rank), float(alpha), tuple(modules.split("+")) if modules else settings.TARGETS, seed)
    except ValueError:
        raise InputError(
            "is not understood", where="--lora", expected="R,ALPHA or R,ALPHA,MODULE+MODULE", found=text
        ) from None


def _dtype(name: str) -> str:
    from telechat_mindie.errors import InputError
    from telechat_mindie.training.settings import COMPUTE_DTYPES

    short = {"fp32": "float32", "bf16": "bfloat16"}
    if short.get(name, name) not in COMPUTE_DTYPES:
        raise InputError("is unknown", where="--dtype", expected=" or ".join(short), found=name)
    return short.get(name, name)
