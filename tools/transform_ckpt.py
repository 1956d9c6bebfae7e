"""Rank folders merged into one checkpoint, or a checkpoint cut into rank folders, without strategy files.

    python tools/transform_ckpt.py --src_ckpt_dir DIR --dst_ckpt_dir DIR [--prefix telechat_7B] [--tp N]

Names and flags are those of mindformers' tools/transform_ckpt.py; the strategies are accepted and not needed, since the
weights' names tell how each is cut. The result is DST/rank_N/{prefix}{N}.ckpt.
"""

from __future__ import annotations

from pathlib import Path

import scripts

from telechat_mindie.checkpoint.convert import MindSporeForm, to_mindspore
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.commands.output import byte_progress


def main() -> None:
    parser = scripts.parser(__doc__)
    parser.add_argument("--src_ckpt_strategy", help="accepted and not needed")
    parser.add_argument("--dst_ckpt_strategy", help="accepted and not needed: use --tp")
    parser.add_argument("--src_ckpt_dir", type=Path, required=True, help="MindSpore file, or folder of rank_N folders")
    parser.add_argument("--dst_ckpt_dir", type=Path, required=True, help="folder to make")
    parser.add_argument("--prefix", default="checkpoint_", help="of the files' names")
    parser.add_argument("--tp", type=int, default=1, help="ranks to make; 1 merges")
    scripts.add_config(parser)
    options = parser.parse_args()
    source = open_checkpoint(options.src_ckpt_dir, options.config)
    form = MindSporeForm(
        container="ckpt",
        tp=options.tp,
        ranks=True,
        qkv_concat=source.qkv_concat,
        transposed_experts=source.transposed_experts,
        file=options.prefix.replace("{", "").replace("}", "") + "{rank}",
    )
    with byte_progress("transforming") as start:
        to_mindspore(source, options.dst_ckpt_dir, form, start)


if __name__ == "__main__":
    scripts.run(main)
