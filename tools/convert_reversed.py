"""MindSpore weights back to the Hugging Face format.

    python tools/convert_reversed.py --mindspore_path FILE_OR_DIR --torch_path DIR [--dtype float16]

Names and flags are those of mindformers' research/telechat2/convert_reversed.py. The output is a folder of safetensors
shards with their index, and the input may be in any form: whole or by rank, kv_concat or qkv_concat.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from telechat_mindie.checkpoint.convert import to_hugging_face
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.checkpoint.stream import ConvertOptions
from telechat_mindie.commands.output import byte_progress
from telechat_mindie.scripts import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mindspore_path", type=Path, required=True, help="MindSpore file or rank folders")
    parser.add_argument("--torch_path", type=Path, required=True, help="folder to make")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float16", "bfloat16", "float32"])
    parser.add_argument("--config", type=Path, help="folder of the config.json, if it is not with the weights")
    options = parser.parse_args()
    source = open_checkpoint(options.mindspore_path, options.config)
    with byte_progress("converting") as start:
        to_hugging_face(
            source,
            options.torch_path,
            ConvertOptions(),
            options.dtype,
            on_start=lambda plan: start(plan.output_bytes),
        )


if __name__ == "__main__":
    run(main)
