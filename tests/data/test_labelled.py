from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import (
    LabelledExample,
    LabelledLoader,
    LabelledRecord,
    encode_labelled,
    few_shots,
    labelled_batches,
    labelled_record,
    load_labelled,
)
from ftlab.data.records import Record
from ftlab.data.sources.labelled_files import read_labelled
from ftlab.errors import FtlabError
from ftlab.models.labels import LabelSet
from ftlab.models.tokenizer import byte_tokenizer
from tests.helpers.classifiers import LABELS, MULTI, batch_of, texts


def config(**changes: Any) -> LabelledDataConfig:
    return LabelledDataConfig(**({"train": "unused"} | changes))


def write(folder: Path, text: str, name: str = "my.jsonl") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def rows_file(folder: Path, rows: list[dict[str, Any]], name: str = "my.jsonl") -> str:
    return str(write(folder, "".join(json.dumps(row) + "\n" for row in rows), name))


def many(count: int = 60) -> list[dict[str, Any]]:
    return [{"text": f"text number {i}", "label": "abc"[i % 3]} for i in range(count)]


def labels_of(records: list[Record]) -> list[Any]:
    return [record.label for record in records if isinstance(record, LabelledRecord)]


# --- files -----------------------------------------------------------------------------------------------------------


def test_jsonl_csv_and_json_give_the_same_records(tmp_path: Path) -> None:
    rows = [{"text": 'a "b", c', "text_pair": "d\ne", "label": "x"}, {"text": "f", "label": "1"}]
    jsonl = read_labelled(Path(rows_file(tmp_path, rows)), config())
    table = write(tmp_path, 'label,text,text_pair\nx,"a ""b"", c","d\ne"\n1,f,\n', "my.csv")
    listed = write(tmp_path, json.dumps(rows), "my.json")
    tabbed = write(tmp_path, 'label\ttext\ttext_pair\nx\t"a ""b"", c"\t"d\ne"\n1\tf\t\n', "my.tsv")
    for path in (table, listed, tabbed):
        found = read_labelled(path, config())
        assert [replace(r, id="") for r in found] == [replace(r, id="") for r in jsonl]
    first = jsonl[0]
    assert isinstance(first, LabelledRecord)
    assert (first.text, first.pair, first.label, first.reference) == ('a "b", c', "d\ne", "x", "x")


def test_labels_of_each_kind(tmp_path: Path) -> None:
    path = Path(rows_file(tmp_path, [{"text": "a", "label": v} for v in ("x", 3, True)]))
    assert labels_of(read_labelled(path, config())) == ["x", "3", "true"]
    path = Path(rows_file(tmp_path, [{"text": "a", "label": v} for v in (["y", "x", "x"], [])]))
    assert labels_of(read_labelled(path, config(labels="multi"))) == [("x", "y"), ()]
    path = write(tmp_path, "text,label\na,y|x\nb,\n", "my.csv")
    assert labels_of(read_labelled(path, config(labels="multi"))) == [("x", "y"), ()]
    path = write(tmp_path, "text,label\na,-1.5\nb,2\n", "my.csv")
    assert labels_of(read_labelled(path, config(labels="regression"))) == [-1.5, 2.0]


def test_fields_have_the_names_that_were_given(tmp_path: Path) -> None:
    path = write(tmp_path, "review,premise,stars\na,b,5\n", "my.csv")
    found = read_labelled(path, config(text_field="review", pair_field="premise", label_field="stars"))
    assert labels_of(found) == ["5"]
    assert found[0].messages[0].content == "a\nb"


def test_a_second_text_may_be_missing_from_a_row_but_not_from_a_file(tmp_path: Path) -> None:
    rows = [{"text": "a", "premise": None, "label": "x"}, {"text": "b", "label": "y"}]
    assert len(read_labelled(Path(rows_file(tmp_path, rows)), config(pair_field="premise"))) == 2
    assert len(read_labelled(Path(rows_file(tmp_path, rows[1:])), config())) == 1  # the default field is optional
    assert (
        len(read_labelled(write(tmp_path, "text,premise,label\na,,x\n", "my.csv"), config(pair_field="premise"))) == 1
    )


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    """csv refuses more than 131,072 characters by itself."""
    long = "word, " * 50_000
    (record,) = read_labelled(write(tmp_path, f'text,label\n"{long}",x\n', "my.csv"), config())
    assert isinstance(record, LabelledRecord)
    assert record.text == long


@pytest.mark.parametrize(
    ("name", "text", "changes", "message"),
    [
        ("my.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', {}, "my.jsonl, line 2, field label: is missing"),
        ("my.jsonl", '\n{"label": "x"}\n', {}, "my.jsonl, line 2, field text: is missing"),
        ("my.jsonl", '{"text": " ", "label": "x"}\n', {}, "line 1, field text: is empty"),
        ("my.jsonl", '{"text": "a", "label": ""}\n', {}, "line 1, field label: is empty"),
        ("my.jsonl", '{"text": "a", "label": 0.5}\n', {}, "expected a text or a whole number"),
        ("my.jsonl", '{"text": "a", "label": ["x"]}\n', {}, "data.labels=multi takes lists"),
        ("my.jsonl", '{"text": "a", "label": "x"}\n', {"labels": "multi"}, "expected a list of labels"),
        ("my.jsonl", '{"text": "a", "label": "5"}\n', {"labels": "regression"}, "expected a finite number"),
        ("my.csv", "text,label\na,many\n", {"labels": "regression"}, "line 2, field label: expected a finite number"),
        ("my.csv", "text,label\na,inf\n", {"labels": "regression"}, "expected a finite number"),
        ("my.jsonl", '{"text": "a", "label": "x"\n', {}, "my.jsonl, line 1: not JSON"),
        ("my.jsonl", "[1]\n", {}, "in an object, got a list"),
        ("my.jsonl", "\n", {}, "holds no record"),
        ("my.json", '[\n{"text": "a", "label": "x"},\n{"text": "b"}]', {}, r"line 3 \(row 2\), field label"),
        ("my.csv", "text,class\na,x\n", {}, "line 1: there is no column label; the columns are text, class"),
        ("my.csv", "text,label,text\na,x,b\n", {}, "line 1: a column name comes twice"),
        ("my.csv", "text,label\na,x\nb\n", {}, "line 3: 1 cells, the header has 2"),
        ("my.csv", 'text,label\n"a,x\n', {}, "not CSV"),
        ("my.csv", "id,text,label\n1,a,x\n1,b,y\n", {}, "line 3, field id: '1' was used before"),
        (
            "my.jsonl",
            f'{{"text": "a", "label": 1{"0" * 400}}}\n',
            {"labels": "regression"},
            r"line 1, field label: expected a finite number \(data.labels=regression\), got 10{10,}\.\.\.0+$",
        ),
        (
            "my.jsonl",
            '{"text": "a", "label": "x"}\n{"text": "b", "premise": "c", "label": "x"}\n',
            {"pair_field": "premiss"},
            r"my.jsonl: no row has the field premiss \(data.pair_field\); the fields are text, label, premise$",
        ),
        (
            "my.json",
            '[{"text": "a", "label": "x"}]',
            {"pair_field": "premiss"},
            "my.json: no row has the field premiss",
        ),
        (
            "my.csv",
            "text,premise,label\na,b,x\n",
            {"pair_field": "premiss"},
            "my.csv, line 1: there is no column premiss; the columns are text, premise, label",
        ),
    ],
)
def test_broken_rows_are_named(name: str, text: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FtlabError, match=message):
        read_labelled(write(tmp_path, text, name), config(**changes))


def test_texts_that_are_equal_stay_together(tmp_path: Path) -> None:
    rows = [{"text": f"Text {i // 3}{'!' * (i % 3)}", "label": "ab"[i % 2]} for i in range(150)]
    splits, _, _ = load_labelled(config(train=rows_file(tmp_path, rows)))
    sides = [{record.group for record in side} for side in (splits.train, splits.validation, splits.test)]
    assert all(sides)
    assert sum(len(side) for side in sides) == len(set.union(*sides)) == 50
    test = rows_file(tmp_path, [{"text": "text 7", "label": "a"}], "test.jsonl")
    with pytest.raises(FtlabError, match="same prompt"):
        load_labelled(config(train=rows_file(tmp_path, rows), test=test))


def test_a_text_stays_together_whatever_its_pair_is(tmp_path: Path) -> None:
    rows = [
        {"text": f"Text {i // 3}{'!' * (i % 3)}", "text_pair": f"pair {i}", "label": "ab"[i % 2]} for i in range(150)
    ]
    rows += [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(50)]  # and one without a second text
    splits, _, _ = load_labelled(config(train=rows_file(tmp_path, rows)))
    sides = [{record.group for record in side} for side in (splits.train, splits.validation, splits.test)]
    assert all(sides)
    assert sum(len(side) for side in sides) == len(set.union(*sides)) == 50
    test = rows_file(tmp_path, [{"text": "text 7", "text_pair": "another", "label": "a"}], "test.jsonl")
    assert len(load_labelled(config(train=rows_file(tmp_path, rows), test=test))[0].test) == 1  # as the user divided
    test = rows_file(tmp_path, [{"text": "text 7", "text_pair": "Pair 21", "label": "a"}], "test.jsonl")
    with pytest.raises(FtlabError, match="same prompt"):
        load_labelled(config(train=rows_file(tmp_path, rows), test=test))


def test_a_text_that_all_records_share_keeps_none_together(tmp_path: Path) -> None:
    rows = [{"text": "Is it so?", "text_pair": f"Fact {i}.", "label": "ab"[i % 2]} for i in range(60)]
    splits, _, _ = load_labelled(config(train=rows_file(tmp_path, rows)))
    assert len(splits.train) > 40
    assert splits.validation
    assert splits.test


def test_the_text_alone_names_no_group(tmp_path: Path) -> None:
    """Else records without a text in common would change sides."""
    rows = [{"text": "One", "text_pair": "two", "label": "a"}, {"text": "Three", "label": "b"}]
    rows.append({"text": "Four", "label": "b", "group": "g"})
    fractions = {"validation_fraction": 0.0, "test_fraction": 0.0}
    splits, _, _ = load_labelled(config(train=rows_file(tmp_path, rows), **fractions))
    assert [record.group for record in splits.train] == ["prompt:one two", "prompt:three", "group:g"]


def test_the_labels_are_those_of_training_whatever_is_limited(tmp_path: Path) -> None:
    location = rows_file(tmp_path, many())
    splits, _, labels = load_labelled(config(train=location, limit_train=1))
    assert labels.names == ("a", "b", "c")
    assert len(splits.train) == 1
    test = rows_file(tmp_path, [{"id": "odd", "text": "new", "label": "d"}], "test.jsonl")
    splits, _, labels = load_labelled(config(train=location, test=test))
    with pytest.raises(FtlabError, match="odd: no training record has the label 'd'"):
        encode_labelled(splits.test, labels, byte_tokenizer(), config())


# --- shots -----------------------------------------------------------------------------------------------------------


def test_shots_are_drawn_by_label_and_seed() -> None:
    records: list[Record] = [labelled_record(str(i), f"text {i}", None, "abc"[i % 3]) for i in range(90)]
    records += [labelled_record("rare", "rare", None, "d")]
    labels = LabelSet.of("single", labels_of(records))
    chosen, notes = few_shots(records, labels, 4, seed=0)
    assert Counter(labels_of(chosen)) == {"a": 4, "b": 4, "c": 4, "d": 1}
    assert notes == ("labels with fewer than data.shots=4 training records: d (1)",)
    assert [r for r in records if r in chosen] == chosen  # in their old order
    more, _ = few_shots(records, labels, 8, seed=0)
    assert {r.id for r in chosen} < {r.id for r in more}
    assert {r.id for r in few_shots(records, labels, 4, seed=1)[0]} != {r.id for r in chosen}
    assert few_shots(list(reversed(records)), labels, 4, seed=0)[0] == list(reversed(chosen))


def test_shots_of_several_labels() -> None:
    both = [labelled_record(str(i), f"{i}", None, ("a", "b") if i % 2 else ("a",)) for i in range(40)]
    labels = LabelSet.of("multi", labels_of([*both]))
    chosen, notes = few_shots([*both], labels, 3, seed=0)
    have = Counter(name for label in labels_of(chosen) for name in label)
    assert have["b"] == 3
    assert have["a"] >= 3
    assert not notes


def test_texts_without_a_label_are_one_more_kind() -> None:
    records: list[Record] = [labelled_record(str(i), f"{i}", None, [("a",), ("b",), ()][i % 3]) for i in range(60)]
    labels = LabelSet.of("multi", labels_of(records))
    chosen, notes = few_shots(records, labels, 4, seed=0)
    assert Counter(labels_of(chosen)) == {("a",): 4, ("b",): 4, (): 4}
    assert not notes
    chosen, notes = few_shots(records[:5], labels, 2, seed=0)
    assert Counter(labels_of(chosen)) == {("a",): 2, ("b",): 2, (): 1}
    assert notes == ("labels with fewer than data.shots=2 training records: (none) (1)",)
    assert few_shots([r for r in records if r.reference != "(none)"], labels, 4, seed=0)[1] == ()


# --- tokens and batches ----------------------------------------------------------------------------------------------


def encoded(text: str, pair: str | None, max_length: int, too_long: str) -> list[LabelledExample]:
    record = labelled_record("r", text, pair, "kidney")
    settings = config(max_length=max_length, too_long=too_long)
    found = encode_labelled([record], LABELS, byte_tokenizer(), settings)
    return [example for example in found if isinstance(example, LabelledExample)]


def test_a_text_and_a_pair_as_tokens() -> None:
    (one,) = encoded("ab", None, 8, "error")
    end = byte_tokenizer().eos_id
    assert list(one.token_ids) == [97, 98, end]
    assert (one.token_types, one.target, one.num_supervised, one.reference) == ([0, 0, 0], 1, 1, "kidney")
    (two,) = encoded("ab", "c", 8, "error")
    assert list(two.token_ids) == [97, 98, end, 99, end]
    assert two.token_types == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "pair", "expected"),
    [("abcdefghijk", None, "abcdefg|"), ("abcdefgh", "12", "abcd|12|"), ("ab", "12345678", "ab|1234|"),
     ("abcdefgh", "12345678", "abc|123|")],
)  # fmt: skip
def test_what_is_too_long_is_cut_dropped_or_refused(text: str, pair: str | None, expected: str) -> None:
    (cut,) = encoded(text, pair, 8, "truncate")
    end = byte_tokenizer().eos_id
    assert "".join("|" if id == end else chr(id) for id in cut.token_ids) == expected
    assert cut.truncated
    assert len(cut.token_types) == len(cut.token_ids)
    assert encoded(text, pair, 8, "drop") == []
    with pytest.raises(FtlabError, match=r"r: 1\d|r: 18 tokens, over data.max_length=8"):
        encoded(text, pair, 8, "error")


def test_batches_are_padded_rows_with_their_targets() -> None:
    examples = texts()
    batch = batch_of(examples, multiple=8)
    assert batch.input_ids.shape[1] % 8 == 0
    for row, example in enumerate(examples):
        length = len(example.token_ids)
        assert batch.input_ids[row, :length].tolist() == list(example.token_ids)
        assert batch.token_types[row, :length].tolist() == list(example.token_types)
        assert batch.mask[row].tolist() == [position < length for position in range(batch.mask.shape[1])]
    assert batch.labels.tolist() == [example.target for example in examples]
    assert batch.num_supervised == 6
    assert batch.num_tokens == sum(len(example.token_ids) for example in examples)
    assert batch_of(texts(MULTI), MULTI).labels.shape == (6, 3)
    moved = batch.to("meta")
    assert {moved.mask.device.type, moved.token_types.device.type, moved.labels.device.type} == {"meta"}


def test_the_loader_gives_each_text_once_an_epoch_and_its_largest_batch() -> None:
    examples = texts(count=10)
    settings = config(batch_size=4, micro_batch_size=3)
    loader = LabelledLoader(examples, settings, seed=0, pad_id=0, labels=LABELS)
    steps = [loader.global_batch(0, index) for index in range(loader.steps_in_epoch(0))]
    assert sorted(index for rows in steps for row in rows for index in row) == list(range(10))
    batch = loader.collate(steps[0])
    assert batch.labels.tolist() == [examples[row[0]].target for row in steps[0]]
    lengths = sorted((len(example.token_ids) for example in examples), reverse=True)
    assert loader.largest_batch().num_tokens == sum(lengths[:3])
    fixed = LabelledLoader(examples, replace(settings, pad_rows=True, row_length=20), 0, 0, LABELS)
    assert fixed.collate(steps[0]).input_ids.shape == (4, 20)


def test_evaluation_has_each_text_once_over_the_ranks() -> None:
    examples = texts(count=7)
    seen: list[int] = []
    for rank in range(3):
        for places, batch in labelled_batches(examples, LABELS, 2, 0, rank=rank, world=3):
            seen += places
            assert batch.example_ids == tuple(examples[place].id for place in places)
    assert sorted(seen) == list(range(7))
    assert torch.is_tensor(batch.mask)
