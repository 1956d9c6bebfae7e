#!/usr/bin/env bash
# Exercise this package behind the real mindformers, on the CPU: its ModelRunner must hand over to ours by the yaml's
# model.arch.type, and its get_model must find our tokenizer by auto_map. Usage: tools/mindformers_seam.sh [VENV]
#
# mindformers 1.6.0 asks for more than an NPU-less machine can install, so it is installed without its dependencies,
# beside the few that it imports.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${1:-$(mktemp -d)/venv}

python3 -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" "numpy<2" mindspore==2.7.0 "$root"
"${pip[@]}" "numpy<2" pyarrow==15.0.2 requests jieba rouge_chinese nltk deprecated tokenizers tiktoken tensorboardX
"${pip[@]}" --no-deps mindpet mindformers==1.6.0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$venv/bin/telechat-mindie" nano ckpt
"$venv/bin/telechat-mindie" build model_path --checkpoint ckpt
GLOG_v=3 "$venv/bin/python" "$root/tools/mindformers_seam.py" model_path
