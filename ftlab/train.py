"""``python -m ftlab.train``: fine-tune, score, report."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ftlab.allocator import restart_under_mimalloc

if TYPE_CHECKING:
    from ftlab.config import Config

__all__ = ["main"]


def _task(config: Config, resolved: dict[str, Any]) -> int:
    from ftlab.startup import without_collector

    with without_collector():
        from ftlab.session import train  # torch and the rest load only once the configuration is known to be good

    return train(config, resolved)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or that of the error."""
    from ftlab.compose import run_command  # not before the restart, which would load it twice

    return run_command(sys.argv[1:] if argv is None else argv, _task)


if __name__ == "__main__":
    restart_under_mimalloc()
    raise SystemExit(main())
