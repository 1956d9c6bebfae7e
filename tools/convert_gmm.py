"""Expert weights of a mixture-of-experts checkpoint transposed for the grouped matmul.

    python tools/convert_gmm.py --ckpt_path DIR --save_path DIR --rank N

Names and flags are those of mindformers' research/telechat2/convert_gmm.py: rank_0 .. rank_{N-1} folders go in and come
out, the experts are known by their names, and no config.json is needed. The dtype is kept, where the published script
made the experts float32.
"""

from __future__ import annotations

from pathlib import Path

import scripts

from telechat_mindie.checkpoint.convert import transpose_experts
from telechat_mindie.commands.output import byte_progress


def main() -> None:
    parser = scripts.parser(__doc__)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="folder of rank_N folders")
    parser.add_argument("--save_path", type=Path, required=True, help="folder to make")
    parser.add_argument("--rank", type=int, required=True, help="number of ranks")
    parser.add_argument("--config", type=Path, help="accepted and not needed: the names tell the experts")
    options = parser.parse_args()
    with byte_progress("transposing") as start:
        transpose_experts(options.ckpt_path, options.save_path, options.rank, start)


if __name__ == "__main__":
    scripts.run(main)
