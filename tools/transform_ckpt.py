"""The ranks of a training run merged into one checkpoint, or a checkpoint divided over the ranks of a strategy.

    python tools/transform_ckpt.py --src_ckpt_dir DIR --dst_ckpt_dir DIR [--src_ckpt_strategy PATH]
        [--dst_ckpt_strategy PATH] [--prefix telechat_7B] [--tp N]

Names and flags are those of mindformers' tools/transform_ckpt.py. A strategy is a file or a folder of files; that of
the source is found where training leaves it, beside the folder of the ranks. The result is DST/rank_N/{prefix}{N}.ckpt.

A training run (by its strategy, or EPOCH_STEP in its files' names), and whatever --dst_ckpt_strategy divides, is kept
as it is, also the optimizer's state and counters, but with --weights_only.

Ranks of tensor parallelism alone need no strategy, since the weights' names tell how each is cut, and --tp N divides
the weights so. Of rank folders or a file without a strategy, and with --tp, the weights alone are kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

import scripts

from telechat_mindie.checkpoint.convert import MindSporeForm, to_mindspore
from telechat_mindie.checkpoint.redistribute import Redistribution, redistribute
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.checkpoint.training_run import RunChoice, find_run
from telechat_mindie.commands.output import byte_progress
from telechat_mindie.errors import InputError


def main() -> None:
    parser = scripts.parser(__doc__)
    parser.add_argument("--src_ckpt_strategy", type=_path, help="of the ranks in SRC; default: the folder beside it")
    parser.add_argument("--dst_ckpt_strategy", type=_path, help="of the ranks to make; default: everything in rank_0")
    parser.add_argument("--src_ckpt_dir", type=Path, required=True, help="MindSpore file, or folder of rank_N folders")
    parser.add_argument("--dst_ckpt_dir", type=Path, required=True, help="folder to make")
    parser.add_argument("--prefix", default="checkpoint_", help="of the files' names")
    parser.add_argument("--step", help="of a training run, as EPOCH_STEP; default: the newest")
    parser.add_argument("--source", type=Path, action="append", default=[], help="another machine's folder; repeatable")
    parser.add_argument("--weights_only", action="store_true", help="leave out the optimizer's state and counters")
    parser.add_argument(
        "--tp", type=int, help="ranks of tensor parallelism to make of the weights, without a strategy; 1 merges"
    )
    parser.add_argument(
        "--packed-by-rank", "--packed_by_rank", action="store_true", help="with --tp: a run packed weights rank by rank"
    )
    scripts.add_config(parser)
    options = parser.parse_args()
    source, target = options.src_ckpt_dir, options.dst_ckpt_dir
    choice = RunChoice(options.src_ckpt_strategy, options.step, tuple(options.source), options.packed_by_rank)
    file = options.prefix.replace("{", "").replace("}", "") + "{rank}"
    if options.packed_by_rank and options.tp is None:
        raise InputError("is for --tp; else tensors are copied as they are", where="--packed-by-rank")
    as_it_is = options.dst_ckpt_strategy is not None or find_run(source, choice) is not None
    if options.tp is not None and options.dst_ckpt_strategy is not None:
        raise InputError("name one of the two", where="--tp, --dst_ckpt_strategy")
    with byte_progress("transforming") as start:
        if as_it_is and options.tp is None:
            wanted = Redistribution(
                choice=choice,
                strategy=options.dst_ckpt_strategy,
                training_state=not options.weights_only,
                ranks=True,
                file=file,
            )
            redistribute(source, target, wanted, options.config, start)
            return
        opened = open_checkpoint(source, options.config, choice=choice)
        if opened.note:
            print(opened.note, file=sys.stderr)
        form = MindSporeForm(
            container="ckpt",
            tp=options.tp or 1,
            ranks=True,
            qkv_concat=opened.qkv_concat,
            transposed_experts=opened.transposed_experts,
            file=file,
        )
        to_mindspore(opened, target, form, start)


def _path(text: str) -> Path | None:
    """A path; mindformers takes an empty text and `None` for none."""
    return None if text in ("", "None") else Path(text)


if __name__ == "__main__":
    scripts.run(main)
