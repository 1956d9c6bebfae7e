#!/usr/bin/env bash
# Run the tests on a bare machine: sets up .venv first. Arguments go to pytest, e.g. -m "not slow".
set -euo pipefail
source "$(dirname "$0")/venv.sh" test
# A worker a core, but at most four (MindSpore takes 1 GB in each); a file's tests stay together, since they share graphs,
# and files are taken in the order of tests/conftest.py.
exec python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
