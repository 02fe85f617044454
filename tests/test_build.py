"""What is made of the data group: records and examples that belong to each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlab.build import DataSet, build_data
from ftlab.config import Config, FilesDataConfig
from ftlab.models.tokenizer import byte_tokenizer


def data_of(folder: Path, **settings: Any) -> DataSet:
    """Thirty records, every third one over 100 tokens, as built with `settings` of the data group."""
    rows = [{"prompt": f"{n} " + "long " * (25 if n % 3 == 0 else 1), "completion": f"answer {n}"} for n in range(30)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(data=FilesDataConfig(train=str(file), max_length=100, validation_fraction=0.3, **settings))
    return build_data(config, byte_tokenizer())


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
@pytest.mark.parametrize("side", ["train", "validation", "test"])
def test_records_and_examples_are_the_same_ones_in_order(tmp_path: Path, side: str, too_long: str) -> None:
    data = data_of(tmp_path, too_long=too_long, test_fraction=0.3)
    ids = [example.id for example in getattr(data, side)]
    assert ids == [record.id for record in getattr(data.splits, side)]
    long = {f"train:{n + 1}" for n in range(0, 30, 3)}
    assert bool(long & set(ids)) == (too_long == "truncate")


def test_what_was_dropped_or_cut_is_said(tmp_path: Path) -> None:
    assert "10 records are longer than data.max_length=100 and were dropped" in data_of(tmp_path, too_long="drop").notes
    cut = data_of(tmp_path, too_long="truncate").notes
    assert "10 prompts were cut from the left to data.max_length=100" in cut
