"""``python -m ftlab.studies.report RUN_DIR``: report.html, one self-contained file about one run.

Everything in it comes from the run folder, so it can be made again at any time. A part that the run does not have (no
baseline, no generated answers, a run that failed) is left out, and the report says so.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from ftlab.errors import FtlabError
from ftlab.evaluation.metrics import LOWER_IS_BETTER, METRICS, paired_difference
from ftlab.evaluation.text_metrics import normalise_answer
from ftlab.files import atomic_write
from ftlab.studies.curves import NAMES, draw, panels_of
from ftlab.studies.report_classification import (
    ACCURACIES,
    accuracy_difference,
    kind_of_labels,
    label_part,
    loss_unit,
)
from ftlab.studies.runs import Answer, RunFolder, read_run
from ftlab.training.progress import duration, memory_size

__all__ = ["main", "write_report"]

TEMPLATE = Path(__file__).with_name("report.html.jinja")
UNITS = {"exact_match": "% of answers", "accuracy": "% of texts", "subset_accuracy": "% of texts"}
DECIMALS = ("loss", "perplexity", "mse")  # not on 0 to 100
MAIN = ("exact_match", *ACCURACIES)
SAMPLE_SEED = 0
SPACE = "\N{NO-BREAK SPACE}"
LONGEST_TEXT = 600  # characters of a prompt or an answer that a sample shows
STATUSES = ("finished", "interrupted", "failed", "running")
PHASES = {
    "data": "reading the data",
    "model": "loading the model",
    "preflight": "trying the largest micro-batch",
    "training": "training, validation included",
    "validation": "of that, validation",
    "test_base": "test split, untouched model",
    "test_final": "test split, trained model",
}
MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations of the largest micro-batch",
    "peak_rss": "peak of the process (RSS)",
    "peak_device": "peak on the GPU",
}


def write_report(run_dir: str | Path) -> Path:
    """Write RUN_DIR/report.html and return its path.

    Raises:
        FtlabError: `run_dir` is not a run folder.
    """
    run = read_run(run_dir)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(_content(run))
    path = run.path / "report.html"
    atomic_write(path, page)
    return path


def _content(run: RunFolder) -> dict[str, Any]:
    """What the template shows, under the template's names."""
    record = run.record
    changes = _changes(run)
    marks = _marks(record)
    return {
        "name": record.get("name") or run.path.resolve().name,
        "status": _status(record),
        "headline": _headline(run, changes),
        "subtitle": _subtitle(record),
        "notes": _notes(run),
        "scores": _score_rows(record, changes),
        "scores_note": _scores_note(record),
        "label_part": label_part(record),
        "samples": _samples(run),
        "samples_note": _samples_note(run),
        "curves": [{"title": panel.title, "svg": draw(panel, marks)} for panel in panels_of(run)],
        "marks": "Dotted lines: " + "; ".join(marks.values()) + "." if marks else "",
        "parameters": _parameter_rows(record),
        "parameters_note": _parameters_note(record),
        "timings": _timings(record),
        "profile": _profile(record),
        "profile_heads": _profile_heads(record),
        "memory": [(MEMORY.get(key, key), memory_size(size)) for key, size in _part(record, "memory").items() if size],
        "data": _data_card(record),
        "command": record.get("command"),
        "reproduce": _reproduce(record),
        "packages": list(_part(record, "packages").items()),
        "config": run.config_text,
    }


def _part(record: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """A nested object of the record; empty if it is not there."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


# --- the head of the page ------------------------------------------------------------------------------------------


def _status(record: Mapping[str, Any]) -> str:
    status = record.get("status")
    return status if status in STATUSES else "unknown"


def _headline(run: RunFolder, changes: Mapping[str, Change]) -> str:
    """The result in a sentence: exact match or accuracy if there is one, else test loss, else validation loss."""
    base, final = _part(run.record, "scores", "base"), _part(run.record, "scores", "final")
    count = len(run.predictions.get("final", ())) or run.record.get("data", {}).get("test") or 0
    main = next((key for key in MAIN if key in final), None)
    unit = loss_unit(run.record)
    if main is not None:
        after = _with_interval(final[main], f"{SPACE}%")
        title = NAMES.get(main, main).capitalize()
        if main not in base:
            return f"{title} on {count} test records: {after} after training."
        before, verb = base[main]["value"], _verb(changes.get(main))
        if before == final[main]["value"]:
            return f"{title} on {count} test records stayed at {after}."
        return f"{title} on {count} test records {verb} from {before:.1f}{SPACE}% to {after}."
    if "loss" in final:
        after = f"{final['loss']['value']:.3f} {unit}"
        if "loss" not in base:
            return f"Test loss: {after} after training."
        return f"Test loss went from {base['loss']['value']:.3f} to {after}."
    _, values = run.series("validation", "loss")
    if values:
        return f"Validation loss went from {values[0]:.3f} to {values[-1]:.3f} {unit}; the test split is unscored."
    return "This run has no result."


def _verb(change: Change | None) -> str:
    if change is None or not math.isfinite(change.value):
        return "went"
    if change.low is not None and change.high is not None and change.low <= 0 <= change.high:
        return "did not clearly change:"
    return "rose" if change.value > 0 else "fell"


def _with_interval(score: Mapping[str, Any], unit: str) -> str:
    text = f"{score['value']:.1f}{unit}"
    if not _has_interval(score):
        return text
    return f"{text} (95{SPACE}% interval {score['low']:.1f} to {score['high']:.1f})"


def _has_interval(score: Mapping[str, Any]) -> bool:
    return score.get("low") is not None and math.isfinite(score["low"])


def _subtitle(record: Mapping[str, Any]) -> str:
    parts = []
    model, data = _part(record, "model"), _part(record, "data")
    if model:
        parts.append(f"{model.get('name', 'model')} ({model.get('parameters', 0) / 1e6:,.1f} M parameters)")
    if method := _part(record, "config", "method").get("name"):
        parts.append(str(method))
    if data:
        parts.append(str(data.get("title") or data.get("name")))
    if record.get("steps"):
        parts.append(f"{record['steps']} steps")
    if total := _total_seconds(record):
        parts.append(duration(total))
    if name := _part(record, "device").get("name"):
        parts.append(str(name))
    if started := record.get("started"):
        parts.append(_date(str(started)))
    return " · ".join(parts)


def _date(text: str) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text


def _notes(run: RunFolder) -> list[str]:
    """What a reader should know before believing the numbers."""
    record, notes = run.record, []
    reason = f": {record['reason']}" if record.get("reason") else ""
    step = record.get("steps") or max((line["step"] for line in run.metrics), default=0)
    match _status(record):
        case "failed":
            notes.append(f"The run failed after step {step}{reason}.")
        case "interrupted":
            again = str(record.get("again", "the same command"))
            notes.append(f"The run was interrupted after step {step}{reason}. {again[0].upper()}{again[1:]} goes on.")
        case "running":
            notes.append(f"The run is still going on, or was killed after step {step}.")
    notes += run.problems
    if skipped := record.get("skipped_steps"):
        notes.append(f"{skipped} steps were skipped, because a gradient was not finite.")
    if resumed := record.get("resumed_from"):
        notes.append(f"The run was resumed after step {', '.join(map(str, resumed))}.")
    if record.get("dirty"):
        notes.append("The working tree had changes that are in no commit.")
    notes += [str(note) for note in _part(record, "data").get("notes") or ()]
    return notes + [str(warning) for warning in record.get("warnings") or ()]


def _marks(record: Mapping[str, Any]) -> dict[int, str]:
    """Steps that the curves mark."""
    marks = {int(step): f"resumed after step {step}" for step in record.get("resumed_from") or ()}
    best = _part(record, "best")
    if isinstance(best.get("step"), int):
        marks[best["step"]] = f"step {best['step']} was the best by validation {best.get('metric')} and was kept"
    return marks


# --- scores and samples --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """after - before of a metric; the interval and p value exist if the answers of both models do."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def _changes(run: RunFolder) -> dict[str, Change]:
    base, final = _part(run.record, "scores", "base"), _part(run.record, "scores", "final")
    changes = {key: Change(final[key]["value"] - base[key]["value"]) for key in final if key in base}
    answers = run.predictions
    if "base" not in answers or "final" not in answers:
        return changes
    resamples = _part(run.record, "config", "evaluation").get("bootstrap", 1000)
    for key in changes:
        if key in ACCURACIES and (change := accuracy_difference(answers["base"], answers["final"])):
            changes[key] = Change(*change)
        if key in METRICS:
            try:
                changes[key] = Change(*paired_difference(answers["base"], answers["final"], key, bootstrap=resamples))
            except FtlabError:  # the two were scored on different records, so only the plain difference is known
                break
    return changes


def _score_rows(record: Mapping[str, Any], changes: Mapping[str, Change]) -> list[dict[str, Any]]:
    base, final = _part(record, "scores", "base"), _part(record, "scores", "final")
    units = {**UNITS, "loss": loss_unit(record)}
    first = METRICS if kind_of_labels(record) is None else ACCURACIES
    last = ("loss", "perplexity")
    order = [key for key in first if key in base or key in final]
    order += [key for key in {**final, **base} if key not in (*order, *last)]
    order += [key for key in last if key in base or key in final]
    return [
        {
            "name": NAMES.get(key, key),
            "unit": units.get(key, ""),
            "main": key in MAIN,
            "before": _cell(key, base.get(key)),
            "after": _cell(key, final.get(key)),
            "change": _change_cell(key, changes.get(key)),
            "verdict": _verdict(key, changes.get(key)),
            "signature": (final.get(key) or base.get(key) or {}).get("signature") or "not recorded",
        }
        for key in order
    ]


def _number(key: str, value: float, *, sign: bool = False) -> str:
    if not math.isfinite(value):
        return str(value)
    form = ("+" if sign else "") + (".3f" if key in DECIMALS and abs(value) < 1000 else ".1f")
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def _cell(key: str, score: Mapping[str, Any] | None) -> dict[str, str]:
    if not score:
        return {"value": "not scored", "interval": ""}
    interval = f"{_number(key, score['low'])} to {_number(key, score['high'])}" if _has_interval(score) else ""
    if interval and score["low"] == score["high"]:  # resampling equal scores gives no width; that is not certainty
        interval = "all records alike"
    return {"value": _number(key, score["value"]), "interval": interval}


def _change_cell(key: str, change: Change | None) -> dict[str, str]:
    if change is None:
        return {"value": "", "interval": "", "p": ""}
    interval, p = "", ""
    if change.low is not None and change.high is not None and change.p is not None and change.low < change.high:
        p = "p < 0.001" if change.p < 0.001 else f"p = {change.p:.3f}"
        interval = f"{_number(key, change.low, sign=True)} to {_number(key, change.high, sign=True)}"
    return {"value": _number(key, change.value, sign=True), "interval": interval, "p": p}


def _verdict(key: str, change: Change | None) -> str:
    """good or bad if the difference is beyond its interval; without an interval nothing is claimed."""
    if change is None or change.low is None or change.high is None or change.low <= 0 <= change.high:
        return "unclear"
    return "good" if (change.value > 0) != (key in LOWER_IS_BETTER) else "bad"


def _scores_note(record: Mapping[str, Any]) -> str:
    base, final = _part(record, "scores", "base"), _part(record, "scores", "final")
    if not base and not final:
        return "The test split was not scored."
    parts = [
        "Scores are on 0 to 100, correlations and MCC on -100 to 100; loss, perplexity and MSE are what they are. "
        "Below each stands its 95 % interval over the test records. The interval of the difference compares both "
        "models on the same records. None of them covers the spread over training seeds."
    ]
    if not base:
        parts.append("The untouched model was not scored, so there is no before.")
    if not final:
        parts.append("The trained model was not scored, so there is no after.")
    if "exact_match" not in final and "exact_match" not in base and kind_of_labels(record) is None:
        parts.append("No answers were generated.")
    return " ".join(parts)


def _is_right(answer: Answer, kind: str | None) -> bool | None:
    """By exact match; of a classifier (`kind` of labels) by the very label, as accuracy counts; of a number None."""
    if kind == "regression":
        return None
    if kind is not None:  # C and C# are two labels
        return answer.prediction == answer.reference
    return normalise_answer(answer.prediction) == normalise_answer(answer.reference)


def _chosen(run: RunFolder) -> list[Answer]:
    """As many right as wrong answers of the trained model where there are enough, drawn with a fixed seed.

    Numbers are neither, so they are drawn as they come.
    """
    answers, kind = run.predictions.get("final", []), kind_of_labels(run.record)
    wanted = min(_part(run.record, "config", "evaluation").get("samples", 20), len(answers))
    shuffled = random.Random(SAMPLE_SEED).sample(answers, len(answers))
    if kind == "regression":
        return shuffled[:wanted]
    right, wrong = ([a for a in shuffled if _is_right(a, kind) is verdict] for verdict in (True, False))
    num_right = min(len(right), max(wanted - len(wrong), (wanted + 1) // 2))
    return [*right[:num_right], *wrong[: wanted - num_right]]


def _samples(run: RunFolder) -> list[dict[str, Any]]:
    before = {answer.id: answer.prediction for answer in run.predictions.get("base", ())}
    return [
        {
            "prompt": _shortened(answer.prompt),
            "reference": _shortened(answer.reference),
            "before": _shortened(before[answer.id]) if answer.id in before else None,
            "after": _shortened(answer.prediction),
            "right": _is_right(answer, kind_of_labels(run.record)),
        }
        for answer in _chosen(run)
    ]


def _shortened(text: str) -> str:
    text = text.strip() or "(nothing)"
    more = len(text) - LONGEST_TEXT
    return text if more <= 0 else f"{text[:LONGEST_TEXT]} … ({more} more characters)"


def _samples_note(run: RunFolder) -> str:
    answers = run.predictions.get("final", [])
    if not answers:
        return "There are no answers of the trained model: nothing was generated for the test split."
    kind, chosen = kind_of_labels(run.record), _chosen(run)
    if kind == "regression":
        return f"{len(chosen)} of {len(answers)} test records, drawn with a fixed seed ({SAMPLE_SEED})."
    right = sum(_is_right(answer, kind) is True for answer in answers)
    note = f"The trained model answered {right} of {len(answers)} test records exactly right."
    if not chosen:
        return note + " No samples were asked for."
    shown = sum(_is_right(answer, kind) is True for answer in chosen)
    note += (
        f" Shown are {shown} right and {len(chosen) - shown} wrong answers, drawn with a fixed seed ({SAMPLE_SEED}) to "
        "show both kinds as equally as possible, not how often each occurs."
    )
    return note if "base" in run.predictions else note + " The untouched model's answers were not recorded."


# --- facts ---------------------------------------------------------------------------------------------------------


def _parameter_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "rule": row.get("rule", ""),
            "trains": "yes" if row.get("trainable") else "no",
            "tensors": f"{row.get('tensors', 0):,}",
            "count": f"{row.get('count', 0):,}",
            "scale": f"{row.get('lr_scale', 1.0):g}" if row.get("trainable") else "",
        }
        for row in record.get("parameters") or ()
    ]


def _parameters_note(record: Mapping[str, Any]) -> str:
    rows = record.get("parameters") or ()
    total = sum(row.get("count", 0) for row in rows)
    trained = sum(row.get("count", 0) for row in rows if row.get("trainable"))
    share = 100 * trained / total if total else 0.0
    return f"{trained:,} of {total:,} numbers train ({share:.2f} %). The first rule that matches a name decides."


def _total_seconds(record: Mapping[str, Any]) -> float:
    """Seconds of all phases; validation lies within training."""
    timings = _part(record, "timings")
    nested = "training" in timings
    return float(sum(spent for name, spent in timings.items() if name != "validation" or not nested))


def _timings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    timings = _part(record, "timings")
    names = [name for name in PHASES if name in timings] + [name for name in timings if name not in PHASES]
    rows = [(PHASES.get(name, name.replace("_", " ")), duration(timings[name])) for name in names]
    if rows:
        rows.append(("all phases", duration(_total_seconds(record))))
    if speed := _part(record, "throughput").get("tokens_per_second"):
        rows.append(("training speed", f"{speed:,.0f} tokens/s, padding not counted"))
    return rows


def _profile_heads(record: Mapping[str, Any]) -> list[str]:
    """What the columns of `_profile` after the operator are."""
    return ["ms", *(["GPU ms"] if _on_gpu(record) else []), "share", "calls"]


def _profile(record: Mapping[str, Any]) -> list[list[str]]:
    """The heaviest operators of a profiled run."""
    on_gpu = _on_gpu(record)
    return [
        [
            str(row["operator"]),
            f"{row['milliseconds']:.2f}",
            *([f"{row['device_milliseconds'] or 0:.2f}"] if on_gpu else []),
            f"{100 * row['share']:.1f} %",
            f"{row['calls']:,}",
        ]
        for row in record.get("profile") or ()
    ]


def _on_gpu(record: Mapping[str, Any]) -> bool:
    return any(row.get("device_milliseconds") is not None for row in record.get("profile") or ())


def _data_card(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = _part(record, "data")
    if not data:
        return []
    sizes = ", ".join(f"{data[split]:,} {split}" for split in ("train", "validation", "test") if split in data)
    rows = [
        ("source", data.get("title") or data.get("name")),
        ("version", data.get("version")),
        ("licence", data.get("licence")),
        ("citation", data.get("citation")),
        ("page", data.get("url")),
        ("file", data.get("location")),
        ("sha256", data.get("sha256")),
        ("records", sizes),
        ("training tokens", _tokens(record, data)),
    ]
    return [(name, str(value)) for name, value in rows if value]


def _tokens(record: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    if "train_tokens" not in data:
        return ""
    if kind_of_labels(record) is not None:
        return f"{data['train_tokens']:,} in one epoch"
    return f"{data['train_tokens']:,} in one epoch, of which {data.get('train_supervised', 0):,} are supervised"


def _reproduce(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    device, model = _part(record, "device"), _part(record, "model")
    commit = record.get("commit")
    rows: list[tuple[str, Any]] = [
        ("commit", f"{commit} with changes that are in no commit" if commit and record.get("dirty") else commit),
        ("seeds", ", ".join(f"{name} {seed}" for name, seed in _part(record, "seeds").items())),
        ("base model", model.get("location")),
        ("its sha256", model.get("sha256")),
        ("configuration", f"hash {record['config_hash']}" if record.get("config_hash") else None),
        ("data order", f"digest {record['data_digest']}" if record.get("data_digest") else None),
        ("machine", _machine(device) if device else None),
        ("started", record.get("started")),
        ("finished", record.get("finished")),
    ]
    return [(name, str(value)) for name, value in rows if value]


def _machine(device: Mapping[str, Any]) -> str:
    parts = [
        str(device.get("name") or device.get("kind")),
        f"{device.get('cpu_cores')} cores",
        f"{device.get('threads')} threads a rank",
        f"{device.get('world_size', 1)} rank(s)",
    ]
    if device.get("memory_bytes"):
        parts.append(f"{memory_size(device['memory_bytes'])} memory")
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report of a run folder again; the exit status is 0, or that of the error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m ftlab.studies.report RUN_DIR", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        print(write_report(arguments[0]))
    except FtlabError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
