# Sourced by run.sh and test.sh. Makes $root/.venv if it is missing, installs the pinned packages into it, and sets
# `root` and `python`. Nothing is done (under a second) while pyproject.toml, constraints.txt and Python are the same.
#
# PYTHON=/path/to/python chooses the interpreter; FTLAB_VENV=/path another folder than .venv.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${FTLAB_VENV:-$root/.venv}"
python="$venv/bin/python"
stamp="$venv/.ftlab-stamp"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer was not found; install it, or give its path in PYTHON=..."
}

fingerprint() {
    cat "$root/pyproject.toml" "$root/constraints.txt" | cksum
    printf '%s\n' "$root"
    "$python" -c 'import sys; print(sys.version, sys.prefix)'
}

make_venv() {
    local base
    base="$(find_python)" || exit 1
    echo "making $venv with $base" >&2
    if ! "$base" -m venv --clear "$venv" >/dev/null 2>&1; then
        # Debian splits ensurepip off the interpreter: let the system's pip install one.
        "$base" -m venv --clear --without-pip "$venv" >/dev/null ||
            fail "$base cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)"
        "$base" -m pip --python "$python" install --quiet --disable-pip-version-check pip ||
            fail "no pip for $venv; install Python's venv module (Debian: apt-get install python3-venv)"
    fi
}

install_packages() {
    local pip=("$python" -m pip --disable-pip-version-check --no-input)
    rm -f "$stamp"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        make_venv
    fi
    echo "installing the pinned packages into $venv (once)" >&2
    # torch alone first: a CPU build offered by PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL is then settled for the rest.
    "${pip[@]}" install --quiet "$(grep '^torch==' "$root/constraints.txt")" --constraint "$root/constraints.txt" ||
        fail "torch could not be installed; is the package index reachable?"
    (cd "$root" && "${pip[@]}" install --quiet --editable '.[test]' --constraint constraints.txt) ||
        fail "the packages could not be installed; is the package index reachable?"
    fingerprint >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

prepare() {
    # Programs that keep caches under HOME (matplotlib, wandb, ftlab) get a folder of their own where there is none.
    if [ -z "${HOME:-}" ] || [ ! -d "$HOME" ] || [ ! -w "$HOME" ]; then
        export HOME="$venv/home"
    fi
    if [ ! -f "$stamp" ] || [ "$(fingerprint 2>/dev/null)" != "$(cat "$stamp")" ]; then
        mkdir -p "$venv"
        if command -v flock >/dev/null 2>&1; then
            # Two scripts started together: the second waits, then finds the stamp.
            (
                flock 9
                [ -f "$stamp" ] && [ "$(fingerprint 2>/dev/null)" = "$(cat "$stamp")" ] || install_packages 9>&-
            ) 9>"$venv.lock" || exit 1
        else
            install_packages
        fi
    fi
    mkdir -p "$HOME"
}

prepare
