"""Expert weights of a mixture-of-experts checkpoint transposed for the grouped matmul.

    python tools/convert_gmm.py --ckpt_path DIR --save_path DIR --rank N

Names and flags are those of mindformers' research/telechat2/convert_gmm.py: rank_0 .. rank_{N-1} folders go in and come
out. The dtype is kept, where the published script made the experts float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from telechat_mindie.checkpoint.convert import MindSporeForm, to_mindspore
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.commands.output import byte_progress
from telechat_mindie.errors import InputError
from telechat_mindie.scripts import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="folder of rank_N folders")
    parser.add_argument("--save_path", type=Path, required=True, help="folder to make")
    parser.add_argument("--rank", type=int, required=True, help="number of ranks")
    parser.add_argument("--config", type=Path, help="folder of the config.json, if it is not with the weights")
    options = parser.parse_args()
    source = open_checkpoint(options.ckpt_path, options.config)
    if source.ranks != options.rank:
        raise InputError("does not fit the rank folders", where="--rank", expected=source.ranks, found=options.rank)
    if not source.config.is_moe:
        raise InputError("holds no experts to transpose", where=options.ckpt_path)
    form = MindSporeForm(
        container="ckpt",
        dtype=source.dtype,
        tp=options.rank,
        ranks=True,
        qkv_concat=source.packed,
        transposed_experts=True,
    )
    with byte_progress("transposing") as start:
        to_mindspore(source, options.save_path, form, lambda plan: start(plan.output_bytes))


if __name__ == "__main__":
    run(main)
