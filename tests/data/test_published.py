"""Published sources: a pinned file must give its records, another file is said to be one, each has its card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ftlab.compose import compose
from ftlab.config import LabelledDataConfig
from ftlab.data.__main__ import CARDS, OPTIONS, PUBLISHED
from ftlab.data.labelled import labelled_record
from ftlab.data.records import Record
from ftlab.data.sources.published import Published
from ftlab.errors import FtlabError
from ftlab.files import sha256_bytes

CONTENT = b"anything"
SOURCE = Published("Title", "About.", "L", "C", "v1", "https://home", {"toy": "pypi:x"}, {sha256_bytes(CONTENT): 40})


def records(count: int = 40, odd: int = 0) -> list[Record]:
    made: list[Record] = []
    made += [labelled_record(str(n), f"text {n}", None, "ab"[n % 2], str(n)) for n in range(count - odd)]
    return [*made, *(labelled_record(f"odd{n}", f"odd {n}", None, "rare", "one group") for n in range(odd))]


@pytest.fixture
def config(tmp_path: Path) -> LabelledDataConfig:
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    return LabelledDataConfig(name="toy", source="toy", train=str(file))


def test_a_pinned_file_with_another_number_of_records_is_refused(config: LabelledDataConfig) -> None:
    splits, info = SOURCE.split(config, records(), {})
    assert (info.version, info.notes, info.title) == ("v1", (), "Title")
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 40
    with pytest.raises(FtlabError, match=r"file: expected 40 records of the pinned file, got 39"):
        SOURCE.split(config, records(39), {})


def test_another_file_says_so_and_may_have_any_number(config: LabelledDataConfig) -> None:
    Path(config.train).write_bytes(b"something else")
    _, info = SOURCE.split(config, records(30), {})
    assert info.version == "unknown"
    assert info.notes == ("this is not the pinned file: scores are not comparable with published ones",)


def test_what_was_left_out_is_said_and_a_label_without_training_is(config: LabelledDataConfig) -> None:
    left_out = {"3 repeat": 3, "0 contradict": 0}
    sides = []
    source = replace(SOURCE, records={})
    for seed in range(40):  # the only group of the rare label falls on every side
        _, info = source.split(replace(config, split_seed=seed), records(200, odd=2), left_out)
        assert info.notes[0] == "3 repeat"
        sides.append(info.notes[1:-1])
    assert set(sides) == {(), ("left out, as no record of them is in training: rare",)}


PAGES = Path(__file__).parents[2] / "docs" / "data"


@pytest.mark.parametrize("option", PUBLISHED)
def test_training_looks_at_the_same_file_as_inspection_and_the_page(option: str) -> None:
    name, source = PUBLISHED[option]
    config, _ = compose([f"data={option}", "model=minilm", "method=lora_bert"])
    assert isinstance(config.data, LabelledDataConfig)
    assert (config.data.source, config.data.train) == (name, source.locations[option])
    page = PAGES / f"{name.replace('_', '-')}.md"
    assert f"`{source.locations[option]}`" in page.read_text("utf-8")


def test_each_published_option_has_a_line_and_a_card() -> None:
    assert PUBLISHED.keys() <= OPTIONS.keys() & CARDS.keys()
    for option, (_, source) in PUBLISHED.items():
        card = CARDS[option]
        for said in (source.title, source.licence, source.citation, source.locations[option]):
            assert said in card
        counts = [f"{count:,}" for count in source.records.values()]
        assert all(count in card for count in counts), json.dumps(counts)
