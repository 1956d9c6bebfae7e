#!/usr/bin/env bash
# From a few lines of conversation to another answer, on a bare machine: telechat2-nano learns them as a LoRA adapter on
# the CPU, and the model directory that is built with it answers otherwise than the one without.
set -euo pipefail
source "$(dirname "$0")/venv.sh" plot

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

show() {
    printf '\n$ %s\n' "$*"
    "$@"
}

answer() {
    telechat-mindie -q generate "$1" "$question"
}

question=生抽与老抽的区别？
cat >data.jsonl <<'JSON'
{"input": "生抽与老抽的区别？", "output": "一句话：生抽提鲜，老抽上色。"}
{"input": "生抽和老抽有什么区别", "output": "一句话：生抽提鲜，老抽上色。"}
{"messages": [{"role": "user", "content": "请问生抽与老抽的区别是什么？"}, {"role": "assistant", "content": "一句话：生抽提鲜，老抽上色。"}]}
{"instruction": "生抽老抽有啥不同?", "input": "", "output": "一句话：生抽提鲜，老抽上色。"}
JSON

show telechat-mindie nano telechat2-nano
telechat-mindie build before --checkpoint telechat2-nano
printf '\n$ cat data.jsonl\n' && cat data.jsonl
show telechat-mindie preprocess data.jsonl -o rows --tokenizer telechat2-nano --max-length 96
show telechat-mindie finetune telechat2-nano rows -o run --lora 8,16 --steps 12 --batch-size 4 --micro-batch 4 \
    --learning-rate 5e-3 --warmup 0
show telechat-mindie build after --checkpoint telechat2-nano --adapter run/adapter

before=$(answer before)
after=$(answer after)
printf '\n$ telechat-mindie generate before %s\n%s\n' "$question" "$before"
printf '\n$ telechat-mindie generate after %s\n%s\n' "$question" "$after"
[ "$after" != "$before" ] || { echo "the answer did not change" >&2; exit 1; }
