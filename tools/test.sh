#!/usr/bin/env bash
# Run the tests on a bare machine: sets up .venv first. Arguments go to pytest, e.g. -m "not slow".
set -euo pipefail
source "$(dirname "$0")/venv.sh" test
exec python -m pytest "$@"
