#!/usr/bin/env bash
# The first half hour on a real card: runs every step, whatever becomes of the others, and packs what to send back.
# docs/first-npu-session.md says what each step should print.
#
# Usage: tools/first_npu_session.sh [--checkpoint DIR] [--output DIR] [--mindformers COMMAND] [--fast]
#   --checkpoint   a TeleChat2 checkpoint, best a 7B; without it only the tiny one that ships with the package runs
#   --output       folder of the logs, made anew; default: ./first-npu-session-DATE
#   --mindformers  a command that generates with mindformers on the same card; the line with its speed is kept
#   --fast         few requests to the service, to try the script itself
# TELECHAT_DEVICE=cpu runs what needs no card. PYTHON names the interpreter, else python3.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
checkpoint="" output="first-npu-session-$(date +%Y%m%d-%H%M%S)" mindformers="" requests=64
while [ $# -gt 0 ]; do
  case $1 in
    --checkpoint) checkpoint=$2 && shift 2 ;;
    --output) output=$2 && shift 2 ;;
    --mindformers) mindformers=$2 && shift 2 ;;
    --fast) requests=4 && shift ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit 2 ;;
  esac
done
if [ -e "$output" ]; then echo "error: $output exists already" >&2 && exit 2; fi
set_env=/usr/local/Ascend/ascend-toolkit/set_env.sh
# shellcheck disable=SC1090
if [ -z "${ASCEND_HOME_PATH:-}" ] && [ -f $set_env ]; then set +u && . $set_env && set -u; fi

if [ -z "${TELECHAT_DEVICE:-}" ]; then
  TELECHAT_DEVICE=cpu && [ -e /dev/davinci_manager ] && TELECHAT_DEVICE=ascend
fi
export TELECHAT_DEVICE
python=${PYTHON:-python3}
# The steps run in another folder than the caller's. The link of a virtual environment's interpreter is not followed.
if [ -n "$checkpoint" ]; then checkpoint=$(realpath -m "$checkpoint"); fi
case $python in */*) python=$(realpath -ms "$python") ;; esac
cards=$(find /dev -maxdepth 1 -name 'davinci[0-9]*' 2>/dev/null | wc -l)
mkdir -p "$output/work"
output=$(cd "$output" && pwd)
session=("$python" "$here/first_npu_session.py")
telechat=("$python" -m telechat_mindie)

record() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$output/steps.tsv" && echo "$1: $2"; }
skip() { record "$1" "skipped: $2" 0; }

# step NAME SECONDS COMMAND...: its output goes to NAME.log. A step that fails or does not end stops no other.
step() {
  local name=$1 limit=$2 began=$SECONDS code result=ok
  shift 2
  timeout -k 20 "$limit" "$@" >"$output/$name.log" 2>&1 </dev/null
  code=$?
  if [ $code = 124 ] || [ $code = 137 ]; then result="no end in $limit s"; elif [ $code != 0 ]; then result="exit code $code"; fi
  record "$name" "$result" $((SECONDS - began))
  [ "$result" = ok ]
}

on_card() { [ "$TELECHAT_DEVICE" = ascend ]; }

# What a directory does: MindIE's calls, the same on the CPU, and the speed.
directory() {
  local name=$1 model=$2 limit=$3
  step "$name-calls" "$limit" "${session[@]}" calls "$model" "$output/work/$name.npz"
  if on_card; then
    step "$name-cpu" "$limit" env TELECHAT_DEVICE=cpu "${session[@]}" calls "$model" "$output/work/$name-cpu.npz"
    step "$name-compare" 60 "${session[@]}" compare "$output/work/$name.npz" "$output/work/$name-cpu.npz"
  else
    skip "$name-compare" "needs a card"
  fi
  step "$name-speed" "$limit" "${session[@]}" speed "$model"
}

cd "$output/work" || exit 2
step versions 60 "${session[@]}" versions
step doctor 120 "${telechat[@]}" doctor --json
if on_card; then step npu-smi 30 npu-smi info; else skip npu-smi "needs a card"; fi

step nano-checkpoint 60 "${telechat[@]}" nano ckpt
step nano-build 120 "${telechat[@]}" build nano --checkpoint ckpt
step nano-build-tp2 120 "${telechat[@]}" build nano-tp2 --checkpoint ckpt --tp 2
directory nano nano 600

# Which kernels are chosen, and whether a decode of unchanged shape runs as a static one: both are INFO lines of
# MindSpore (kernel selection; DataPrepareActor::RecordInputAndConvertStatic), which GLOG_v=1 prints.
if on_card; then
  step kernels-raw 600 env GLOG_v=1 "${session[@]}" calls nano work.npz
  grep -hoE "[A-Za-z0-9_]+ select internal kernel|convert static shape: .*" "$output/kernels-raw.log" |
    sed 's/Prepare for actor set.*convert/convert/' | sort | uniq -c >"$output/kernels.txt"
  tail -c 200000 "$output/kernels-raw.log" >"$output/kernels.log" && rm "$output/kernels-raw.log"
else
  skip kernels-raw "needs a card"
fi

if on_card && [ "$cards" -lt 2 ]; then
  skip tp2-calls "needs two cards"
else
  step tp2-calls 600 "${session[@]}" calls nano-tp2 "$output/work/tp2.npz" &&
    step tp2-compare 60 "${session[@]}" compare "$output/work/tp2.npz" "$output/work/nano.npz"
fi

model=nano
if [ -z "$checkpoint" ]; then
  skip model-build "no --checkpoint"
elif step model-build 1800 "${telechat[@]}" build model --checkpoint "$checkpoint"; then
  directory model model 900
  model=model
fi

if [ -n "$mindformers" ]; then
  step mindformers 900 bash -c "$mindformers"
  grep -hiE "tokens/s|generate speed" "$output/mindformers.log" >"$output/mindformers-speed.txt"
else
  skip mindformers "no --mindformers"
fi

step service 1800 "${session[@]}" service $model "$output/bench-serve.json" --device "$TELECHAT_DEVICE" \
  --requests $requests

"${session[@]}" pack "$output"
