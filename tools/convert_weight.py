"""Hugging Face weights to one MindSpore file, or a MindSpore checkpoint to its qkv_concat form.

    python tools/convert_weight.py --torch_path DIR --mindspore_path FILE.ckpt [--dtype float16]
    python tools/convert_weight.py --qkv_concat True --pre_ckpt_path FILE_OR_DIR --mindspore_ckpt_path FILE_OR_DIR

Names and flags are those of mindformers' research/telechat2/convert_weight.py. Sizes come from the checkpoint itself,
never from --model_name, and the dtype is kept unless --dtype says otherwise.
"""

from __future__ import annotations

from pathlib import Path

import scripts

from telechat_mindie.checkpoint.convert import MindSporeForm, to_mindspore
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.commands.output import byte_progress
from telechat_mindie.errors import InputError


def main() -> None:
    parser = scripts.parser(__doc__)
    parser.add_argument("--torch_path", type=Path, help="folder of the Hugging Face checkpoint")
    parser.add_argument("--mindspore_path", type=Path, help="file to write: .ckpt or .safetensors")
    parser.add_argument("--dtype", default="auto", choices=scripts.DTYPES)
    parser.add_argument("--qkv_concat", type=scripts.flag, default=False, help="convert a MindSpore checkpoint instead")
    parser.add_argument("--pre_ckpt_path", type=Path, help="MindSpore file, or folder of rank_N folders")
    parser.add_argument("--mindspore_ckpt_path", type=Path, default=Path("transform.ckpt"))
    parser.add_argument("--model_name", default=None, help="accepted and not needed: the weights tell their sizes")
    scripts.add_config(parser)
    options = parser.parse_args()
    if options.qkv_concat:
        source = _given(options.pre_ckpt_path, "--pre_ckpt_path")
        opened = open_checkpoint(source, options.config)
        ranks = opened.ranks
        form = MindSporeForm(
            container="ckpt" if ranks else scripts.container_of(options.mindspore_ckpt_path),
            tp=ranks or 1,
            ranks=bool(ranks),
            qkv_concat=True,
        )
        with byte_progress("packing") as start:
            to_mindspore(opened, options.mindspore_ckpt_path, form, start)
    else:
        opened = open_checkpoint(_given(options.torch_path, "--torch_path"), options.config)
        target = _given(options.mindspore_path, "--mindspore_path")
        form = MindSporeForm(container=scripts.container_of(target), dtype=options.dtype)
        with byte_progress("converting") as start:
            to_mindspore(opened, target, form, start)


def _given(path: Path | None, name: str) -> Path:
    if path is None:
        raise InputError("is needed", where=name)
    return path


if __name__ == "__main__":
    scripts.run(main)
