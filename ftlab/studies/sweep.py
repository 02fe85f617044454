"""The table of a sweep: what each run changed, how it ended, what it scored.

Reads run folders only: `run.json` and `metrics.jsonl` (docs/architecture.md). A sweep's folder holds `trials/` (one
JSON a run, written as the run ends), `sweep.json` and `sweep.html`.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftlab.files import atomic_write

__all__ = ["Row", "Trial", "best_value", "print_sweep", "read_rows", "read_trials", "write_sweep", "write_trial"]

MAIN_SCORES = ("exact_match", "token_f1", "bleu", "chrf", "rougeL", "perplexity")
FORMAT = 1


@dataclass(frozen=True)
class Trial:
    """How one run of a sweep ended. `error` is empty after success."""

    number: int
    overrides: list[str]
    exit_code: int
    error: str
    run_dir: str


@dataclass(frozen=True)
class Row:
    """A trial with what its run folder says: status, best validation loss in nats, final test scores."""

    trial: Trial
    status: str
    validation_loss: float | None
    scores: dict[str, dict[str, float]]


def write_trial(folder: Path, trial: Trial) -> None:
    """Leave the trial's record in the sweep's folder."""
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "trials" / f"{trial.number:04d}.json", json.dumps(asdict(trial), indent=1) + "\n")


def read_trials(folder: Path) -> list[Trial]:
    """The records of the runs that ended, in the order of their numbers."""
    return [Trial(**json.loads(file.read_text("utf-8"))) for file in sorted((folder / "trials").glob("*.json"))]


def read_record(run_dir: Path) -> dict[str, Any]:
    """A run's run.json; empty if the run failed before it wrote one."""
    try:
        record = json.loads((run_dir / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def best_value(run_dir: Path) -> float | None:
    """Best validation value of a run by its own metric; None if nothing was validated."""
    value = (read_record(run_dir).get("best") or {}).get("value")
    return None if value is None else float(value)


def validation_loss(run_dir: Path, record: dict[str, Any]) -> float | None:
    """Validation loss in nats a token of the state that was best, or else of the last validation."""
    best = record.get("best") or {}
    if best.get("metric") == "loss" and best.get("value") is not None:
        return float(best["value"])
    found: float | None = None
    try:
        lines = (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        if entry.get("split") == "validation" and "loss" in entry:
            found = float(entry["loss"])
            if entry.get("step") == best.get("step"):
                break
    return found


def read_row(trial: Trial) -> Row:
    """Join a trial with its run folder."""
    run_dir = Path(trial.run_dir)
    record = read_record(run_dir)
    status = "failed" if trial.exit_code else str(record.get("status", "finished"))
    if trial.exit_code in (130, 143):
        status = "interrupted"
    final = (record.get("scores") or {}).get("final") or {}
    scores = {
        name: {bound: float(score[bound]) for bound in ("value", "low", "high") if score.get(bound) is not None}
        for name, score in final.items()
        if isinstance(score, dict) and score.get("value") is not None
    }
    return Row(trial, status, validation_loss(run_dir, record), scores)


def read_rows(trials: Sequence[Trial]) -> list[Row]:
    """All rows, in the order of the trials."""
    return [read_row(trial) for trial in trials]


def swept(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Overrides that all runs share, and keys whose value differs between runs, both in order of appearance."""
    shared = (
        [text for text in rows[0].trial.overrides if all(text in row.trial.overrides for row in rows)] if rows else []
    )
    keys = dict.fromkeys(text.partition("=")[0] for row in rows for text in row.trial.overrides if text not in shared)
    return shared, list(keys)


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table as text."""
    _, keys = swept(rows)
    scores = [name for name in MAIN_SCORES if any(name in row.scores for row in rows)]
    body = []
    for row in rows:
        values = dict(text.partition("=")[::2] for text in row.trial.overrides)
        loss = "" if row.validation_loss is None else f"{row.validation_loss:.4f}"
        line = [str(row.trial.number + 1), *(values.get(key, "") for key in keys), row.status, loss]
        body.append([*line, *(score_text(row.scores.get(name)) for name in scores)])
    return ["run", *keys, "status", "validation loss", *scores], body


def score_text(score: dict[str, float] | None) -> str:
    """`21.3 [18.0, 24.9]`: the value and its 95 % interval where there is one."""
    if score is None:
        return ""
    if "low" not in score or "high" not in score:
        return f"{score['value']:.4g}"
    return f"{score['value']:.4g} [{score['low']:.4g}, {score['high']:.4g}]"


def print_sweep(folder: Path, trials: Sequence[Trial]) -> None:
    """The table on the terminal, then every failure in one line."""
    from rich.console import Console
    from rich.table import Table

    rows = read_rows(trials)
    header, body = cells(rows)
    table = Table(title=f"{len(rows)} runs", caption=None)
    for name in header:
        table.add_column(name, overflow="fold", justify="left" if name in ("status", *swept(rows)[1]) else "right")
    for line in body:
        table.add_row(*line)
    console = Console()
    console.print(table)
    for row in rows:
        if row.trial.exit_code:
            what = f"run {row.trial.number + 1} ({' '.join(row.trial.overrides)}) {row.status}: {row.trial.error}"
            console.print(what, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{folder / 'sweep.html'}", markup=False, highlight=False, soft_wrap=True)


def write_sweep(folder: Path, trials: Sequence[Trial]) -> None:
    """Write sweep.json (the numbers) and sweep.html (a self-contained page with links to the runs' reports)."""
    rows = read_rows(trials)
    shared, keys = swept(rows)
    content = {"format": FORMAT, "shared": shared, "swept": keys, "runs": [asdict(row) for row in rows]}
    atomic_write(folder / "sweep.json", json.dumps(content, indent=1) + "\n")
    atomic_write(folder / "sweep.html", page(folder, rows))


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 70rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid #8886; padding: .3rem .7rem; text-align: left; white-space: nowrap; }
.best { font-weight: 700; }
.failed { color: #c33; }
code { overflow-wrap: anywhere; }
"""


def page(folder: Path, rows: Sequence[Row]) -> str:
    """The HTML of a sweep: one table, the run with the lowest validation loss in bold, failures below."""
    shared, _ = swept(rows)
    header, body = cells(rows)
    losses = [row.validation_loss for row in rows if row.validation_loss is not None and not row.trial.exit_code]
    lines = []
    for row, line in zip(rows, body, strict=True):
        report = Path(row.trial.run_dir).absolute() / "report.html"
        if report.is_file():
            link = html.escape(os.path.relpath(report, folder.absolute()).replace(os.sep, "/"))
            line = [f'<a href="{link}">{html.escape(line[0])}</a>', *map(html.escape, line[1:])]
        else:
            line = [html.escape(cell) for cell in line]
        kind = "failed" if row.trial.exit_code else "best" if losses and row.validation_loss == min(losses) else ""
        lines.append(f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>")
    failures = [
        f"<li>run {row.trial.number + 1}: {html.escape(row.trial.error or row.status)}</li>"
        for row in rows
        if row.trial.exit_code
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1"><title>ftlab sweep</title>',
            f"<style>{STYLE}</style></head><body><h1>Sweep of {len(rows)} runs</h1>",
            f"<p>All runs: <code>{html.escape(' '.join(shared)) or 'the defaults'}</code></p>",
            '<div class="wide"><table><thead><tr>' + "".join(f"<th>{html.escape(name)}</th>" for name in header),
            "</tr></thead><tbody>",
            *lines,
            "</tbody></table></div>",
            "<p>Bold: the lowest validation loss. Scores are on the test split, with 95 % intervals.</p>",
            f"<h2>Failures</h2><ul>{''.join(failures)}</ul>" if failures else "",
            "</body></html>\n",
        ]
    )
