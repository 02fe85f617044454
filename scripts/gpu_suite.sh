#!/usr/bin/env bash
# Measure the kernels on one GPU, at most 9 minutes for everything. Installs nothing: python3 must have torch and triton.
#
#   bash scripts/gpu_suite.sh                      all sections, records into $OUT or ./gpu-results
#   bash scripts/gpu_suite.sh --only lora adamw    some of them; scripts/gpu_suite.py says what else there is
#
# PYTHON=/path/to/python chooses the interpreter, FTLAB_COMMIT names the commit where there is no git.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 "$root/.venv/bin/python" python; do
        if "$candidate" -c 'import importlib.util, sys; sys.exit(sys.version_info < (3, 11) or
            None in map(importlib.util.find_spec, ("torch", "triton")))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with torch and triton; give its path in PYTHON=..."
}

python="$(find_python)" || exit 2
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/scripts/gpu_suite.py" "$@"
