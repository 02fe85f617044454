"""What only a classifier's report has, by its numbers: the confusion matrix and the reliability diagram."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from ftlab.studies.report import write_report
from ftlab.studies.report_classification import BLUE, LEFT, SIZE, label_part
from tests.studies.test_report import make_run

ROWS = [
    {"label": name, "texts": texts, "precision": 50.0, "recall": 50.0, "f1": 50.0, "low": 40.0, "high": 60.0}
    for name, texts in (("cat", 10), ("dog", 4), ("owl", 0))
]
CONFUSION = [[7, 2, 1], [0, 1, 3], [0, 0, 0]]  # of the texts with the row's label, those given the column's
BINS: list[dict[str, Any]] = [
    {"low": 0.0, "high": 0.25, "count": 0, "confidence": None, "accuracy": None},
    {"low": 0.25, "high": 0.5, "count": 4, "confidence": 0.4, "accuracy": 0.75},
    {"low": 0.5, "high": 1.0, "count": 12, "confidence": 0.9, "accuracy": 0.5},
]
PART = {"labels": ROWS, "confusion": CONFUSION, "reliability": BINS}
SVG = "{http://www.w3.org/2000/svg}"


def shown() -> dict[str, Any]:
    part = label_part({"classification": {"final": PART}})
    assert part is not None
    return part


def diagram() -> ET.Element:
    return ET.fromstring(shown()["reliability"].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def test_a_row_of_the_confusion_matrix_is_a_true_label() -> None:
    rows = shown()["confusion"]
    assert [(row["number"], row["label"]) for row in rows] == [(1, "cat"), (2, "dog"), (3, "owl")]
    assert [[cell["count"] or 0 for cell in row["cells"]] for row in rows] == CONFUSION
    assert [[cell["own"] for cell in row["cells"]] for row in rows] == [[i == j for j in range(3)] for i in range(3)]
    tints = [[float(cell["tint"].removeprefix(f"rgba({BLUE}, ").rstrip(")")) for cell in row["cells"]] for row in rows]
    shares = [[0.7, 0.2, 0.1], [0, 0.25, 0.75], [0, 0, 0]]  # of the row, not of the column
    assert tints == [[pytest.approx(0.85 * share, abs=0.006) for share in row] for row in shares]


def test_the_page_shows_the_matrix_as_it_is(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", labels={"kind": "single", "names": []}, classification={"final": PART})
    source = write_report(run_dir).read_text("utf-8")
    (table,) = re.findall(r'<table class="confusion">(.*?)</table>', source, re.DOTALL)
    head, *rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    assert re.findall(r">(\w+)</th>", head) == ["label", "1", "2", "3"]
    assert [re.findall(r"<th>(.*?)</th>", row) for row in rows] == [["1 cat"], ["2 dog"], ["3 owl"]]
    cells = [re.findall(r"<td.*?>(.*?)</td>", row) for row in rows]
    assert cells == [["<b>7</b>", "2", "1"], ["", "<b>1</b>", "3"], ["", "", "<b></b>"]]
    assert "the label of the row that were given the label of the column" in source


def test_a_bar_is_as_wide_as_its_bin_and_as_high_as_what_is_right() -> None:
    drawing = diagram()
    bars = [
        {key: float(bar.attrib[key]) for key in ("x", "y", "width", "height")} for bar in drawing.iter(f"{SVG}rect")
    ]
    assert len(bars) == 2, "a bin without decisions has no bar"
    for bar, found in zip(bars, BINS[1:], strict=True):
        assert bar["x"] == LEFT + SIZE * found["low"]
        assert bar["x"] + bar["width"] == pytest.approx(LEFT + SIZE * found["high"], abs=1)
        assert bar["height"] == SIZE * found["accuracy"], "not its confidence"
        assert bar["y"] + bar["height"] == SIZE, "it stands on the axis"
    opacities = [float(bar.attrib["fill-opacity"]) for bar in drawing.iter(f"{SVG}rect")]
    assert opacities[0] < opacities[1], "more decisions, a stronger tint"
    assert [title.text for title in drawing.iter(f"{SVG}title")] == [
        "confidence 0.40, right 0.75, 4 decisions",
        "confidence 0.90, right 0.50, 12 decisions",
    ]


def test_the_diagonal_is_where_confidence_is_what_is_right() -> None:
    drawing = diagram()
    (dashed,) = (path.attrib["d"] for path in drawing.iter(f"{SVG}path") if "stroke-dasharray" in path.attrib)
    assert dashed == f"M{LEFT} {SIZE} L{LEFT + SIZE} 0"
    texts = [(text.text, text.attrib) for text in drawing.iter(f"{SVG}text")]
    across = {float(t): float(a["x"]) for t, a in texts if t and a["text-anchor"] == "middle" and t[0].isdigit()}
    up = {float(t): float(a["y"]) for t, a in texts if t and a["text-anchor"] == "end"}
    assert across == {step / 5: LEFT + SIZE * step / 5 for step in range(6)}
    assert up == {step / 5: pytest.approx(SIZE - SIZE * step / 5, abs=5) for step in range(6)}
