#!/usr/bin/env bash
# Exercise this package behind the real mindformers, on the CPU: its ModelRunner must hand over to ours by the yaml's
# model.arch.type, and its get_model must find our tokenizer by auto_map. Given the sources of mindformers r1.6.0, a
# folder with `research` in it, which the wheel lacks, also compare its TeleChat2 graphs with ours on MindSpore 2.7.0:
# nothing may differ outside of tools/graph_differences.yaml; and load the finetunes that are rendered for it.
# Usage: tools/mindformers_seam.sh [VENV [SOURCES]]
#
#   git clone --branch r1.6.0 https://gitee.com/mindspore/mindformers.git && tools/mindformers_seam.sh venv mindformers
#
# mindformers 1.6.0 asks for more than an NPU-less machine can install, so it is installed without its dependencies,
# beside the few that it imports.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${1:-$(mktemp -d)/venv}
sources=${2:+$(cd "$2" && pwd)}
[ -z "$sources" ] || [ -d "$sources/research/telechat2" ] || { echo "$sources: has no research/telechat2" >&2; exit 1; }

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
if [ -n "$sources" ]; then
    GLOG_v=3 "$venv/bin/python" "$root/tools/compare_graphs.py" "$sources"
    GLOG_v=3 "$venv/bin/python" "$root/tools/mindformers_finetune.py" "$sources"
fi
