"""Training runs under mimalloc where that is installed.

A training step on a CPU allocates thousands of tensors, aligned to 64 bytes, which glibc's malloc serves from ever
more fragments: with mimalloc (https://github.com/microsoft/mimalloc, the package cmeel-mimalloc) the step of LoRA on
a model of 135 million weights took a tenth less time (docs/LOG.md). An allocator can only be chosen before a process
starts, so the command starts itself again, as the same process, with the library preloaded.

FTLAB_ALLOCATOR=system keeps the system's allocator.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

__all__ = ["allocator_name", "find_mimalloc", "restart_under_mimalloc"]

_WANTED, _MARK = "FTLAB_ALLOCATOR", "mimalloc"
# Freed memory stays with the process: giving it back and taking it again costs a page fault for every 4 KiB.
_SETTINGS = {"MIMALLOC_PURGE_DELAY": "-1"}


def find_mimalloc() -> Path | None:
    """The library of the package cmeel-mimalloc in this environment."""
    path = Path(sysconfig.get_path("platlib"), "cmeel.prefix", "lib", "libmimalloc.so")
    return path if path.exists() else None


def allocator_name() -> str:
    """What this process allocates with: mimalloc or system."""
    try:
        loaded = Path("/proc/self/maps").read_text("utf-8", errors="replace")
    except OSError:
        return "system"
    return _MARK if "libmimalloc" in loaded else "system"


def restart_under_mimalloc() -> None:
    """Start this process's program anew, with the same arguments and process id, unless that is done or not wanted.

    Returns where there is nothing to do: another system than Linux, no such library, FTLAB_ALLOCATOR=system, or an
    allocator that the user preloads.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    if os.environ.get(_WANTED, _MARK) != _MARK or sys.platform != "linux" or "malloc" in preloaded:
        return
    library = find_mimalloc()
    if library is None:
        return
    environment = {**_SETTINGS, **os.environ, "LD_PRELOAD": ":".join(filter(None, [str(library), preloaded]))}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
