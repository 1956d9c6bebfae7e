# Sourced by the other scripts: makes .venv with the package in it, once, and puts it on PATH.
# Usage: source tools/venv.sh [EXTRA]      EXTRA: an extra of setup.cfg, "test" say

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.10 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.10, 3.11 or 3.12 is needed and was not found on PATH." >&2
    return 1
}

extra=${1:-}
stamp=.venv/.installed${extra:+-$extra}
if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    python=$(find_python)
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "Installing into .venv (MindSpore is a large download, once) ..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
    touch "$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
