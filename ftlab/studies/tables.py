"""Scores as plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["score_table"]


def score_table(title: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per metric: value, 95 % interval where there is one, signature."""
    lines = [title]
    width = max((len(name) for name in scores), default=0)
    for name, score in scores.items():
        interval = "" if score["low"] is None else f"[{score['low']:.2f}, {score['high']:.2f}]"
        lines.append(f"  {name:<{width}}  {score['value']:9.3f}  {interval:<17} {score['signature']}".rstrip())
    return "\n".join(lines)
