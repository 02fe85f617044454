"""Curves of a run as small inline SVG that takes its text colour from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlab.studies.report_classification import loss_unit
from ftlab.studies.runs import RunFolder

__all__ = ["Curve", "Panel", "draw", "panels_of"]

# Read on white and on near-black alike.
COLOURS = ("#3b82f6", "#f2762e", "#1fa36b", "#b45bf0", "#e5484d", "#12a5b8", "#c99700")
INK = "#010203"  # stands for the page's text colour in what matplotlib writes
SIZE_INCHES = (4.8, 2.7)
SCORES = ("exact_match", "token_f1", "bleu", "chrf", "rougeL")
LABEL_SCORES = ("accuracy", "subset_accuracy", "macro_f1", "micro_f1", "auroc", "ece", "pearson", "spearman")
NAMES = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "subset_accuracy": "all labels right",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "mcc": "MCC",
    "auroc": "AUROC",
    "ece": "calibration error",
    "mse": "squared error",
    "pearson": "Pearson's r",
    "spearman": "Spearman's rho",
}


@dataclass(frozen=True)
class Curve:
    """One line: steps and values. `dots` also marks each point, for measurements that are far apart."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """A title with its unit, and the curves below it."""

    title: str
    curves: Sequence[Curve]
    from_zero: bool = False


def panels_of(run: RunFolder) -> list[Panel]:
    """The panels that the metrics of this run fill; none of them is empty."""

    def curve(split: str, key: str, name: str | None = None, dots: bool = False) -> Curve:
        return Curve(name or split, *run.series(split, key), dots)

    penalties = [key for key in run.keys("train") if key.startswith("penalty/")]
    shares = [key for key in run.keys("train") if key.startswith("penalty_share/")]
    apart = ("penalty/", "penalty_share/", "average/", "mixout/")
    noted = [key for key in run.keys("train") if "/" in key and not key.startswith(apart)]
    unit = loss_unit(run.record).replace("token", "supervised token")
    panels = [
        Panel(
            f"Loss ({unit})",
            [curve("train", "loss"), curve("validation", "loss", dots=True)],
        ),
        Panel(
            "Validation scores (up to 100)",
            [curve("validation", k, NAMES.get(k, k), True) for k in (*SCORES, *LABEL_SCORES)],
            True,
        ),
        Panel("Learning rate", [curve("train", "lr")], True),
        Panel("Gradient norm before clipping", [curve("train", "grad_norm")], True),
        Panel("Penalties (part of the loss)", [curve("train", k, k.removeprefix("penalty/")) for k in penalties], True),
        Panel(
            "Gradient of the penalties, share of the whole",
            [curve("train", k, k.removeprefix("penalty_share/")) for k in shares],
            True,
        ),
        Panel(f"Regularizers, values in the loss ({unit})", [curve("train", key, key) for key in noted]),
        Panel("Distance of the average from the weights", [curve("train", "average/distance", "distance")], True),
        Panel("Distance from the weights that mixout mixes in", [curve("train", "mixout/distance", "distance")], True),
        Panel("Tokens per second", [curve("train", "tokens_per_second")], True),
        Panel("Loss scale (fp16)", [curve("train", "loss_scale")], True),
    ]
    filled = [Panel(p.title, [c for c in p.curves if c.steps], p.from_zero) for p in panels]
    return [panel for panel in filled if panel.curves]


def draw(panel: Panel, marks: Mapping[int, str]) -> str:
    """The panel as an <svg> element; `marks` are steps to mark with a vertical line, and what they are."""
    # matplotlib takes half a second to import; only the report needs it.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: small, sharp, searchable
        "svg.hashsalt": panel.title,  # the same run gives the same file
        "text.parse_math": False,  # a name with dollar signs is a name
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for curve, colour in zip(panel.curves, COLOURS, strict=False):
            marker = "o" if curve.dots or len(curve.steps) == 1 else None
            axes.plot(curve.steps, curve.values, color=colour, label=curve.name, marker=marker, markersize=3.5, lw=1.5)
        for step in marks:
            axes.axvline(step, color=INK, alpha=0.6, lw=1, ls=":")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.12, lw=0.6)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        if len(panel.curves) > 1:
            figure.legend(loc="outside upper left", ncols=3, frameon=False, handlelength=1.2, columnspacing=1.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_the_page(buffer.getvalue(), panel.title)


def _for_the_page(svg: str, title: str) -> str:
    """Only the <svg> element: scaled by the page, in its font and text colour, without what nothing refers to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', svg, count=1)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r'(<[^>]*?) id="([^"]*)"', lambda m: m[0] if m[2] in used else m[1], svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*; ?", "", re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg))
    return re.sub(r"\n\s*", "\n", svg.replace(INK, "currentColor"))
