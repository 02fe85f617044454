#!/usr/bin/env python3
"""The records of scripts/gpu_suite.py as Markdown: times, training steps, correctness, and the goals last.

    python scripts/gpu_table.py                            of docs/results/gpu
    python scripts/gpu_table.py --results gpu-results      of another folder

`page(load(folder))` is the same for a generated block of a page. Needs neither torch nor ftlab.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS))

from gpu import records  # noqa: E402

__all__ = ["NOT_MEASURED", "goals_table", "load", "main", "origin", "page", "times_table"]

RESULTS = records.ROOT / "docs" / "results" / "gpu"
NOT_MEASURED = "Not yet measured on a GPU.\n"
ORDER = ("device", "correctness", "lora", "adamw", "head", "pointwise", "end_to_end")
Record = dict[str, Any]


def load(folder: Path) -> list[Record]:
    """The records of a folder in the order of the sections."""
    found = {name: records.read(folder / f"{name}.json") for name in ORDER}
    return [record for record in found.values() if record is not None]


def page(found: Sequence[Record]) -> str:
    """All of it; one sentence where there is no record."""
    if not found:
        return NOT_MEASURED
    parts = [origin(found), sections_table(found), times_table(found), steps_table(found), correctness(found)]
    parts += [goals_table(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def shown(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def rows(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that is aligned as text too; `left` columns are words, the others numbers."""
    widths = [max(len(line[n]) for line in (heads, *lines)) for n in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return f"| {' | '.join(cell.ljust(w) if n < left else cell.rjust(w) for n, (cell, w) in pairs)} |"

    rule = "|".join("-" * (w + 2) if n < left else "-" * (w + 1) + ":" for n, w in enumerate(widths))
    return "\n".join([line(heads), f"|{rule}|", *(line(each) for each in lines)])


# --- where it comes from ----------------------------------------------------------------------------------------------


def origin(found: Sequence[Record]) -> str:
    """Device, versions, commit and the two limits; a line for each set of them that occurs."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for record in found:
        device = (record.get("device") or {}).get("name", "no device")
        versions = record.get("packages") or {}
        names = ("torch", "triton", "peft", "transformers", "liger-kernel", "bitsandbytes")
        listed = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
        commit = str(record.get("commit"))[:10] + (" with uncommitted changes" if record.get("dirty") else "")
        smoke = "; SMOKE RUN, its figures mean nothing" if record.get("smoke") else ""
        groups.setdefault((device, listed, commit, smoke), []).append(record["section"])
    lines = []
    for (device, listed, commit, smoke), names_of in groups.items():
        which = f" ({', '.join(names_of)})" if len(groups) > 1 else ""
        lines.append(f"{device}; {listed}; commit {commit}{smoke}{which}.")
    limits = [record.get("limits") or {} for record in found]
    copies = [limit["copy_bytes_per_second"] / 1e12 for limit in limits if limit.get("copy_bytes_per_second")]
    if copies:
        lines.append(f"C, copy bandwidth: {shown(min(copies))} to {shown(max(copies))} TB/s over the sections.")
    rates = [
        f"{name.removeprefix('matmul ')} {shown(item['flop_per_second'] / 1e12)}"
        for record in found
        if record["section"] == "device"
        for name, item in [("8192^3", record["items"].get("limits", {}).get("matmul", {})), *record["items"].items()]
        if "flop_per_second" in item
    ]
    if rates:
        lines.append(f"F, bf16 products in TFLOP/s: {', '.join(rates)}.")
    return "\n".join(lines)


def sections_table(found: Sequence[Record]) -> str:
    """Which sections ran, and what of them did not."""
    lines = []
    for record in found:
        troubles = [f"{name}: {text.splitlines()[-1]}" for name, text in (record.get("errors") or {}).items()]
        troubles += [f"{name} skipped: {why}" for name, why in (record.get("skipped") or {}).items()]
        troubles += [record["problem"]] if record.get("problem") else []
        text = "; ".join(troubles).replace("|", "/")[:200]
        lines.append((record["section"], record["status"], text, shown(record.get("seconds"))))
    return rows(("section", "status", "what went wrong", "s"), lines, left=3)


# --- times ------------------------------------------------------------------------------------------------------------


def timed_items(found: Sequence[Record]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for record in found:
        for name, item in record["items"].items():
            if "times" in item and "flop_per_second" not in item:
                yield record["section"], name, item


def times_table(found: Sequence[Record]) -> str:
    """Milliseconds of every contestant: of its CUDA graph and by the host's clock, median (p20 to p80)."""
    lines = []
    for section, name, item in timed_items(found):
        for who, times in item["times"].items():
            if times.get("error"):
                lines.append((f"{section}: {name}", f"{who}: {times['error']}".replace("|", "/")[:90], "-", "-", "-"))
                continue
            gain = next((r for n, r in (item.get("ratios") or {}).items() if n == f"{who} / ours"), None)
            cells = (spread(times.get("graph")), spread(times["wall"]))
            lines.append((f"{section}: {name}", who, *cells, "-" if gain is None else shown(gain["median"])))
    if not lines:
        return ""
    heads = ("what", "who", "graph, ms: median (p20 to p80)", "wall, ms", "x ours")
    return rows(heads, lines, left=2)


def spread(times: Mapping[str, float] | None) -> str:
    if times is None:
        return "-"
    return f"{shown(times['median'])} ({shown(times['p20'])} to {shown(times['p80'])})"


def steps_table(found: Sequence[Record]) -> str:
    """Training steps: tokens a second, MFU, peak memory."""
    lines = []
    for record in found:
        for name, item in record["items"].items():
            for who, entry in (item.get("contestants") or {}).items():
                if "tokens_per_second" not in entry:
                    lines.append((name, f"{who}: {entry.get('error', '')}".replace("|", "/")[:90], "-", "-", "-"))
                    continue
                peak = entry.get("peak_bytes")
                cells = (shown(entry["tokens_per_second"]), f"{100 * entry['mfu']:.1f} %" if entry.get("mfu") else "-")
                lines.append((name, who, *cells, "-" if peak is None else f"{peak / 2**30:.1f}"))
    if not lines:
        return ""
    return rows(("LoRA r=16, all linears", "who", "tokens/s", "MFU of 989", "peak GiB"), lines, left=2)


# --- correctness and goals --------------------------------------------------------------------------------------------


def correctness(found: Sequence[Record]) -> str:
    """Counts, and the name of everything that failed."""
    record = next((each for each in found if each["section"] == "correctness"), None)
    if record is None:
        return ""
    items = record["items"]
    tests = items.get("tests") or {}
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted((tests.get("counts") or {}).items()))
    lines = [f"Tests on the device: {counts or 'none'} of {tests.get('collected', 0)}."]
    by_dtype = (tests.get("by_dtype") or {}).items()
    if by_dtype:
        each = (f"{name} {', '.join(f'{n} {o}' for o, n in sorted(counts.items()))}" for name, counts in by_dtype)
        lines.append(f"By dtype: {'; '.join(each)}.")
    lines += [f"- failed: {name}: {why[:160]}" for name, why in (tests.get("failed") or {}).items()]
    differing = [
        f"- not the same bits twice: {name}: {what}"
        for name, what in (items.get("same bits") or {}).get("operations", {}).items()
        if what != "equal"
    ]
    masks = (items.get("same masks") or {}).get("differing", {})
    differing += [f"- another mask: {name}: {count} elements" for name, count in masks.items() if count]
    return "\n".join([*lines, *differing])


def goals_table(found: Sequence[Record]) -> str:
    """Every goal: measured, bound at this device's C and F, and whether it is met."""
    judged = [line for record in found for line in record.get("verdicts") or []]
    if not judged:
        return ""
    words = {True: "met", False: "MISSED", None: "-"}
    lines = []
    for line in judged:
        bound = f"{line['sense']} {shown(line['bound'])}"
        measured = shown(line["measured"])
        last = words[line["met"]] if line["met"] is not None else str(line.get("why") or "-").replace("|", "/")[:60]
        lines.append((line["goal"], line["what"], last, measured, bound, line["unit"]))
    count = {met: sum(line["met"] is met for line in judged) for met in (True, False, None)}
    head = f"Goals: {count[True]} met, {count[False]} missed, {count[None]} without a verdict."
    return f"{head}\n\n" + rows(("goal", "what", "verdict", "measured", "bound", "unit"), lines, left=3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The records of scripts/gpu_suite.py as Markdown.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(argv)
    print(page(load(options.results)), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
