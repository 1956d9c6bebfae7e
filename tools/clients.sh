#!/bin/bash
# Check the clients that are too large for the test environment (about 400 MB) against `telechat-mindie serve`:
# langchain-openai and litellm, in a virtual environment that is kept at the path given (default: a temporary one).
#
#     tools/clients.sh [VENV]
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
folder="$(mktemp -d)"
venv="${1:-$folder/venv}"
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$folder"' EXIT

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install -q langchain-openai litellm

"$python" -m telechat_mindie nano "$folder/checkpoint"
"$python" -m telechat_mindie build "$folder/nano" --checkpoint "$folder/checkpoint"
"$python" -m telechat_mindie serve "$folder/nano" --port 0 > "$folder/serve.log" &
server=$!
until grep -q 'Daemon start success!' "$folder/serve.log"; do
    kill -0 "$server"
    sleep 0.2
done
url="$(sed -n 's/.*Daemon start success!.* at \(http[^ ,]*\).*/\1/p' "$folder/serve.log")"
NO_PROXY='*' "$venv/bin/python" tools/clients.py "$url" nano
