from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ftlab.config import DataConfig
from ftlab.data.__main__ import OPTIONS, main
from ftlab.data.inspection import histogram, inspect_records, token_text
from ftlab.data.records import Message, Record
from ftlab.data.sources.hpo import CARD, CITATION, RELEASE
from ftlab.data.templates import ChatTemplate
from ftlab.data.tokenization import Example
from ftlab.models.tokenizer import byte_tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "data"


def test_inspect_shows_tokens_labels_and_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "q" * 30, "completion": "[b]é"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["inspect", str(file), "--template", "chatml", "-n", "2", "--max-length", "40"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "    0     256  -       '<|im_start|>'" in lines
    learnt = [line.split("  ")[-1] for line in lines if " learnt  " in line]
    assert learnt == ["'a'", "'<|im_end|>'", "'['", "'b'", "']'", "'Ã'", "'©'", "'<|im_end|>'"]
    assert "over max_length=40: 1" in lines
    assert any(line.startswith("2 records, ") and "8 learnt" in line for line in lines)


def test_inspect_reports_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "no-such-file.jsonl"]) == 1
    assert main(["inspect", "files"]) == 2
    assert main(["card", "nothing"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: ") for line in errors)


def test_colours_on_a_terminal() -> None:
    tokenizer = byte_tokenizer()
    example = Example("x", [65, 66, 257], [False, True, True])
    text = token_text(example, tokenizer)
    assert text.plain == "AB<|im_end|>"
    assert [span.style for span in text.spans] == ["dim", "bold green underline", "bold green"]
    console = Console(force_terminal=True, width=200, record=True, file=io.StringIO())
    record = Record("id[1]", (Message("user", "[red]q"), Message("assistant", "a")))
    inspect_records([record], ChatTemplate.load("plain", tokenizer), DataConfig(), 1, console)
    assert "id[1]: " in console.export_text(clear=False)
    assert "[red]q" in console.export_text()


def test_histogram_counts_everything() -> None:
    lines = histogram([5, 5, 6, 90], bins=4)
    assert [int(line.split()[3]) for line in lines] == [3, 0, 0, 1]
    assert lines[0].count("#") == 40
    assert len(histogram([7])) == 1


def test_list_and_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in OPTIONS)
    for name in OPTIONS:
        if name not in ("files", "labelled"):  # they have no card: the user knows them
            assert main(["card", name]) == 0
            assert "icence" in capsys.readouterr().out


def test_the_pages_carry_the_cards() -> None:
    page = (DOCS / "hpo.md").read_text("utf-8")
    assert page.startswith(CARD)
    assert RELEASE in page
    assert CITATION in page


def test_inspect_shows_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("text,label\nabc,x\ndefg,y|x\nh,\n")
    assert main(["inspect", str(file), "--labels", "multi", "-n", "1", "--max-length", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "train:2: 4 tokens, x: 'abc'" in lines
    assert not any("defg" in line for line in lines)
    assert "3 texts, 11 tokens, 2 labels (multi)" in lines
    assert ["2  x" in line for line in lines].count(True) == 1
    assert any(line.endswith("1  (none)") for line in lines)
    assert "over max_length=4: 1" in lines
    assert main(["inspect", "topics", "-n", "0"]) == 0
    assert "42 texts" in capsys.readouterr().out


def test_the_help_names_the_files_that_can_be_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "the location of a JSONL or JSON file; with --labels of a CSV or TSV file too" in said
