#!/usr/bin/env bash
# Run the tests. Installs what is needed on the first call. Arguments go to pytest, paths are relative to the repository.
#
#   scripts/test.sh                    the fast suite
#   scripts/test.sh --long             the slow tests too
#   scripts/test.sh --no-network       without the tests that need the real model or ontology
#   scripts/test.sh tests/test_compose.py -k sweep
#   scripts/test.sh -n 0               in one process: for a debugger, or to read what is printed
#
# One process a core, at most four: the tests use one thread each. A file's tests stay together. The slowest are listed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"
exec "$python" -m pytest -n auto --maxprocesses 4 --dist loadfile --durations 25 --durations-min 5 "$@"
