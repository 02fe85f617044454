#!/usr/bin/env bash
# Fine-tune. Installs what is needed on the first call.
#
#   scripts/run.sh                                     the main job: +experiment=lora_medical
#   scripts/run.sh +experiment=full_tiny               any arguments replace that default and go to
#   scripts/run.sh +experiment=lora_medical -m ...     `python -m ftlab.train` as they are
#   scripts/run.sh --help
#
# Paths, and the folder `runs`, are relative to the current folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
if [ "$#" -eq 0 ]; then
    set -- +experiment=lora_medical
fi
exec "$python" -m ftlab.train "$@"
