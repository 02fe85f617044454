#!/usr/bin/env python3
"""The page docs/kernels-compiled.md: what the compiler makes of every kernel of kernels/, for sm_80 and sm_90.

    python scripts/kernel_table.py             compile everything (one to a few minutes, no GPU) and write the page anew
    python scripts/kernel_table.py --check     write nothing; exit 1 if the page is not what compiling gives now

The page names the triton that it was made with. Registers, shared memory and instructions are another version's own
business, so where another one is installed `--check` compares which kernels there are, for which architecture and in
how many warps, and nothing else. A kernel that may not ship (it spills, say) is an error either way.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ftlab_kernels import aot  # noqa: E402

from ftlab.files import atomic_write  # noqa: E402

__all__ = ["configurations", "made_with", "main", "same"]

PAGE = ROOT / "docs" / "kernels-compiled.md"
OWN_COLUMNS = 3  # kernel, sm, warps: the rest is the compiler's


def made_with(page: str) -> str:
    """The triton version that a page names."""
    found = re.search(r"by triton (\S+) ", page)
    if found is None:
        raise ValueError("the page does not say which triton made it")
    return found[1]


def configurations(page: str) -> list[str]:
    """The headings, and of each row the columns that do not depend on the compiler."""
    lines = [line for line in page.splitlines() if line.startswith(("## ", "| "))]
    return [line if line.startswith("#") else "|".join(line.split("|")[: OWN_COLUMNS + 1]) for line in lines]


def same(old: str, new: str) -> bool:
    """Whether two pages agree in all that their versions of triton let one compare."""
    if made_with(old) == made_with(new):
        return old == new
    return configurations(old) == configurations(new)


def compiled_page() -> str:
    """The page that `python -m ftlab_kernels.aot --markdown` prints. Raises ValueError if a kernel may not ship."""
    made, wrong = aot.compile_all()
    if wrong:
        raise ValueError("; ".join(wrong))
    return aot.markdown(made)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/kernels-compiled.md by compiling every kernel.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not up to date")
    parser.add_argument("--page", type=Path, default=PAGE, help="another page")
    options = parser.parse_args(argv)
    try:
        new = compiled_page()
        old = options.page.read_text("utf-8") if options.page.exists() else None
        fits = old is not None and same(old, new)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.check:
        if not fits:
            print(f"error: {options.page} is not what compiling gives; run {Path(__file__).name}", file=sys.stderr)
        return int(not fits)
    if new != old:
        atomic_write(options.page, new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
