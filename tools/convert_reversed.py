"""MindSpore weights back to the Hugging Face format.

    python tools/convert_reversed.py --mindspore_path FILE_OR_DIR --torch_path DIR [--dtype float16]

Names and flags are those of mindformers' research/telechat2/convert_reversed.py. The output is a folder of safetensors
shards with their index, and the input may be in any form: whole or by rank, kv_concat or qkv_concat. The dtype is kept
unless --dtype says otherwise.
"""

from __future__ import annotations

from pathlib import Path

import scripts

from telechat_mindie.checkpoint.convert import OutputOptions, to_hugging_face
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.commands.output import byte_progress


def main() -> None:
    parser = scripts.parser(__doc__)
    parser.add_argument("--mindspore_path", type=Path, required=True, help="MindSpore file or rank folders")
    parser.add_argument("--torch_path", type=Path, required=True, help="folder to make")
    parser.add_argument("--dtype", default="auto", choices=scripts.DTYPES)
    scripts.add_config(parser)
    options = parser.parse_args()
    source = open_checkpoint(options.mindspore_path, options.config)
    with byte_progress("converting") as start:
        to_hugging_face(source, options.torch_path, OutputOptions(dtype=options.dtype), start)


if __name__ == "__main__":
    scripts.run(main)
