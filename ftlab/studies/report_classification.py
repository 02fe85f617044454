"""The part of a report that only a classifier has: its labels, confusion matrix and reliability diagram.

The diagram (DeGroot and Fienberg 1983; Guo et al. 2017, arXiv 1706.04599) sets the share of right decisions against the
confidence in them, bin by bin; a calibrated model lies on the diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftlab.evaluation.intervals import exact_mcnemar, paired_proportion_interval
from ftlab.studies.runs import Answer

__all__ = ["ACCURACIES", "accuracy_difference", "kind_of_labels", "label_part", "loss_unit"]

ACCURACIES = ("accuracy", "subset_accuracy")
SIZE, LEFT, BOTTOM = 300, 44, 40  # of the diagram's square, and the room for its scales
BLUE = "59, 130, 246"


def kind_of_labels(record: Mapping[str, Any]) -> str | None:
    """single, multi or regression; None for a language model."""
    labels = record.get("labels")
    return str(labels.get("kind")) if isinstance(labels, dict) else None


def loss_unit(record: Mapping[str, Any]) -> str:
    """What the loss is measured in."""
    kind = kind_of_labels(record)
    if kind is None:
        return "nats per token"
    return "squared error" if kind == "regression" else "nats per text"


def accuracy_difference(base: Sequence[Answer], final: Sequence[Answer]) -> tuple[float, float, float, float] | None:
    """final - base in points of 100, its 95 % interval (Newcombe) and p (McNemar); None if the texts are others."""
    before, after = {a.id: a for a in base}, {a.id: a for a in final}
    if not before or before.keys() != after.keys():
        return None
    hits = [np.array([side[i].prediction == side[i].reference for i in before]) for side in (before, after)]
    low, high = paired_proportion_interval(*hits)
    return 100 * float(hits[1].mean() - hits[0].mean()), 100 * low, 100 * high, exact_mcnemar(*hits)


def label_part(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the template shows of a classifier's test split: of the trained model, else of the untouched one."""
    found = record.get("classification")
    if not isinstance(found, dict) or not found:
        return None
    who = "final" if "final" in found else "base"
    part = found[who]
    return {
        "who": "trained model" if who == "final" else "untouched model",
        "labels": [_label_row(row) for row in part.get("labels", ())],
        "confusion": _confusion(part),
        "reliability": _diagram(part.get("reliability", ())),
    }


def _label_row(row: Mapping[str, Any]) -> dict[str, str]:
    def shown(value: float | None) -> str:
        return "none" if value is None else f"{value:.1f}"

    interval = ""  # of a label that neither occurs nor is given
    if row["f1"] is not None:
        interval = f"{row['low']:.1f} to {row['high']:.1f}"
        if row["low"] == row["high"]:  # resampling texts that are alike gives no width; that is not certainty
            interval = "all texts alike"
    return {
        "label": str(row["label"]),
        "texts": f"{row['texts']:,}",
        "precision": shown(row["precision"]),
        "recall": shown(row["recall"]),
        "f1": shown(row["f1"]),
        "interval": interval,
    }


def _confusion(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each true label; a cell is tinted by its share of the row."""
    names = [row["label"] for row in part.get("labels", ())]
    rows = []
    for number, (name, counts) in enumerate(zip(names, part.get("confusion", ()), strict=False)):
        total = max(sum(counts), 1)
        cells = [
            {"count": count or "", "tint": f"rgba({BLUE}, {0.85 * count / total:.2f})", "own": column == number}
            for column, count in enumerate(counts)
        ]
        rows.append({"number": number + 1, "label": name, "cells": cells})
    return rows


def _diagram(bins: Sequence[Mapping[str, Any]]) -> str:
    """An <svg>: a bar a bin with decisions in it, wide as the bin and high as the share that holds."""
    if not bins:
        return ""
    total = max(sum(b["count"] for b in bins), 1)
    parts = []
    for b in bins:
        if not b["count"]:
            continue
        x, width = LEFT + SIZE * b["low"], SIZE * (b["high"] - b["low"]) - 1
        height = SIZE * b["accuracy"]
        opacity = 0.35 + 0.65 * b["count"] / total
        text = f"confidence {b['confidence']:.2f}, right {b['accuracy']:.2f}, {b['count']} decisions"
        parts.append(
            f'<rect x="{x:.1f}" y="{SIZE - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="rgb({BLUE})" fill-opacity="{opacity:.2f}"><title>{text}</title></rect>'
        )
    parts.append(f'<path d="M{LEFT} {SIZE} H{LEFT + SIZE} M{LEFT} {SIZE} V0" stroke="currentColor" fill="none"/>')
    parts.append(f'<path d="M{LEFT} {SIZE} L{LEFT + SIZE} 0" stroke="currentColor" stroke-dasharray="4 4"/>')
    style = 'font-size="11" fill="currentColor"'
    for step in range(0, 6):
        value, place = step / 5, SIZE * step / 5
        parts.append(f'<text x="{LEFT + place:.0f}" y="{SIZE + 15}" text-anchor="middle" {style}>{value:g}</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{SIZE - place + 4:.0f}" text-anchor="end" {style}>{value:g}</text>')
    parts.append(f'<text x="{LEFT + SIZE / 2:.0f}" y="{SIZE + 33}" text-anchor="middle" {style}>confidence</text>')
    middle = SIZE / 2
    parts.append(
        f'<text x="12" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 12 {middle:.0f})" {style}>'
        "share that is right</text>"
    )
    box = f"0 -8 {LEFT + SIZE + 12} {SIZE + BOTTOM + 8}"
    return f'<svg viewBox="{box}" role="img" aria-label="Reliability diagram">{"".join(parts)}</svg>'
