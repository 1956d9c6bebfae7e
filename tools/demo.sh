#!/usr/bin/env bash
# From checkpoint to answer on a bare machine: telechat2-nano becomes a model directory and answers a question.
set -euo pipefail
source "$(dirname "$0")/venv.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$work"

set -x
telechat-mindie nano telechat2-nano
telechat-mindie build model_path --checkpoint telechat2-nano
{ set +x; } 2>/dev/null
find model_path | sort
set -x
telechat-mindie generate model_path "生抽与老抽的区别？"
{ set +x; } 2>/dev/null
