#!/usr/bin/env bash
# From checkpoint to answer on a bare machine: telechat2-nano becomes a model directory, is served with MindIE's HTTP API
# on the CPU, and answers the request of the published README.
set -euo pipefail
source "$(dirname "$0")/venv.sh" serve

work=$(mktemp -d)
server=
finish() {
    [ -z "$server" ] || { kill "$server" && wait "$server" || true; } 2>/dev/null
    rm -rf "$work"
}
trap finish EXIT
cd "$work"

show() {
    printf '\n$ %s\n' "$*"
    "$@"
}

show telechat-mindie nano telechat2-nano
show telechat-mindie build model_path --checkpoint telechat2-nano
find model_path | sort
show telechat-mindie check model_path

printf '\n$ telechat-mindie serve model_path\n'
telechat-mindie serve model_path --port "${PORT:-0}" >server.log 2>&1 &
server=$!
for _ in $(seq 240); do
    grep -q '^Daemon start success!' server.log && break
    kill -0 "$server" 2>/dev/null || { cat server.log; exit 1; }
    sleep 0.5
done
cat server.log
url=$(sed -n 's/^Daemon start success!.* at //p' server.log)

show curl -sS -w "\ntime_total=%{time_total}\n" -H "Accept: application/json" -H "Content-type: application/json" -X POST \
    -d '{"inputs": "生抽与老抽的区别？", "parameters": {"do_sample": false, "max_new_tokens": 512}, "stream": false}' \
    "$url/generate"

kill "$server"
wait "$server"
server=
