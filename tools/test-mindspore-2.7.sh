#!/usr/bin/env bash
# Run what depends on MindSpore's release on 2.7.0, the one of MindIE's present images; tools/test.sh runs the newest.
# Graph mode, and infer_boost wherever an Ascend graph is compiled. Usage: tools/test-mindspore-2.7.sh [PYTEST ARGUMENT]...
#
# Makes .venv-mindspore-2.7, once: a download of 0.8 GB, 2.7 GB on disk.
#
# What runs: the graphs and calls of the Ascend path, their kernels' host code out of 2.7.0's own libraries, export, the
# contract with MindIE over both sets of CPU kernels. Left out, since they hardly touch the release: the tests of the
# native kernels themselves (C++ of this package), those of each cache dtype, and all that imports no MindSpore.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
venv=.venv-mindspore-2.7

if [ ! -e "$venv/.installed" ] || [ setup.cfg -nt "$venv/.installed" ]; then
    if [ ! -x "$venv/bin/python" ]; then
        python=$(command -v python3.11 || command -v python3.10) || {
            echo "MindSpore 2.7.0 has wheels for Python 3.10 and 3.11 alone, and neither is on PATH." >&2
            exit 1
        }
        "$python" -m venv "$venv"
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check mindspore==2.7.0 -e ".[serve,test-base]"
    touch "$venv/.installed"
fi
export PATH="$root/$venv/bin:$PATH" GLOG_v=3
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
exec python -m pytest -q -p no:cacheprovider --numprocesses 2 --dist loadfile --no-loadscope-reorder \
    tests/ascend_host \
    tests/model/test_ascend_kernels.py tests/model/test_export.py tests/model/test_kernel_interface.py \
    tests/model/test_kv_cache.py tests/model/test_rope.py \
    tests/backend/test_ascend_process.py tests/backend/test_ascend_runner.py tests/backend/test_contract.py
