"""What `plan --backend atb` says."""

from __future__ import annotations

import shutil
from pathlib import Path

from telechat_mindie import variants
from telechat_mindie.checkpoint.estimate import source_facts
from telechat_mindie.checkpoint.msmodelslim import description_file
from telechat_mindie.commands.output import Facts
from telechat_mindie.kv_budget import CacheShape, CardBudget
from telechat_mindie.mindie import ATB
from telechat_mindie.model_dir.atb.plan import AtbOptions, open_source, plan_atb, plan_float16, refuse
from telechat_mindie.model_dir.atb.rules import BLOCK_SIZE, DTYPE, plain_length
from telechat_mindie.units import GB, format_bytes


def atb_facts(
    checkpoint: Path | None, variant: str | None, options: AtbOptions, tp: int, device_mem: float | None, target: Path
) -> Facts:
    """What `build --backend atb` would write, and what fits beside it on a card."""
    if checkpoint is not None and description_file(checkpoint) is not None:
        made = plan_atb(open_source(checkpoint, options), tp)
    else:
        config = (
            source_facts(checkpoint, options.config_dir, options.choice).config
            if checkpoint is not None
            else variants.named(str(variant))
        )
        refuse(config)
        made = plan_float16(config, tp)
    config, length = made.config, plain_length(made.config)
    facts = Facts()
    facts.add("backend", "atb: MindIE 3.0 and later", backend=ATB, parameters=config.parameter_count)
    listed = [{"path": name, "bytes": nbytes} for name, nbytes in made.files.items()]
    text = f"{len(listed)} file{'s' if len(listed) > 1 else ''}, {format_bytes(made.output_bytes)} of {made.kind}"
    facts.add("output", text, dtype=made.kind, tp=made.tp, files=listed, output_bytes=made.output_bytes)
    nbytes = made.rank_bytes
    text = f"{format_bytes(nbytes)} on each of {made.tp}: the embedding whole, query and key_value twice"
    facts.add("weights a card", text, rank_bytes=nbytes)
    shape = CacheShape(config.kv_bytes_per_token(DTYPE, made.tp), BLOCK_SIZE)
    per_token = shape.token_bytes
    facts.add("KV cache", f"{per_token:,} bytes a token and card", kv_bytes_per_token=per_token)
    text = f"{length} of {config.seq_length} tokens: atb_llm has no dynamic NTK"
    facts.add("right up to", text, max_seq_len=config.seq_length, plain_length=length)
    free = shutil.disk_usage(target).free
    short = max(0, made.output_bytes - free)
    missing = f": {format_bytes(short)} too little" if short else ""
    text = f"{format_bytes(free)} free in {target.resolve()}{missing}"
    facts.add("disk", text, disk_free_bytes=free, disk_short_bytes=short)
    if device_mem is not None:
        budget = CardBudget.of(device_mem, nbytes, config.vocab_size)
        room = budget.room(shape, length, -1)
        fit = {
            "device_bytes": int(budget.card * GB),
            "reserve_bytes": int(budget.reserve * GB),
            "kv_tokens": room.tokens,
            "sequences": room.sequences,
        }
        held = f"{budget.left:.1f} GB of cache: {room.tokens:,} tokens, {room.sequences} sequences of {length}"
        facts.add(f"a {device_mem:g} GB card", f"{budget}, so {held}", fit=fit)
    return facts
