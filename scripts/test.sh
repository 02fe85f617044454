#!/usr/bin/env bash
# Run the tests. Installs what is needed on the first call. Arguments go to pytest, paths are relative to the repository.
#
#   scripts/test.sh                    the fast suite
#   scripts/test.sh --long             the slow tests too
#   scripts/test.sh --no-network       without the tests that need the real model or ontology
#   scripts/test.sh tests/test_compose.py -k sweep
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"
exec "$python" -m pytest "$@"
