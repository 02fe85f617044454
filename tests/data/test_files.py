from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlab.config import FilesDataConfig
from ftlab.data.records import Message, load_records
from ftlab.data.sources.files import read_records
from ftlab.errors import FtlabError

PAIR = (Message("user", "q"), Message("assistant", "a"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLAB_CACHE", str(tmp_path / "cache"))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_form_is_read(tmp_path: Path) -> None:
    file = write(
        tmp_path / "all.jsonl",
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "q", "completion": "a", "system": "s", "id": "mine", "group": 7},
        {"human": "q", "ai": "a"},
        {"conversations": [{"human": "q", "ai": "a"}, {"human": "还有？", "ai": "有\u2028。"}]},
    )
    first, second, third, fourth = read_records(file)
    assert first.messages == third.messages == PAIR
    assert (first.id, third.id) == ("train:1", "train:3")
    assert second.messages == (Message("system", "s"), *PAIR)
    assert (second.id, second.group) == ("mine", "7")
    assert fourth.messages == (*PAIR, Message("user", "还有？"), Message("assistant", "有\u2028。"))
    assert fourth.reference == "有\u2028。"


@pytest.mark.parametrize(
    "value",
    [
        [{"human": "q", "ai": "a"}, {"prompt": "q", "completion": "a"}],
        {"conversations": [{"human": "q", "ai": "a"}, {"human": "q", "ai": "a"}]},
        {"version": 2, "data": [{"conversations": [{"human": "q", "ai": "a"}]}] * 2},
    ],
)
def test_json_files_are_lists_or_objects_with_a_list(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(value, indent=1))
    records = read_records(file)
    assert [record.messages for record in records] == [PAIR, PAIR]
    assert [record.id for record in records] == ["train:1", "train:2"]


GOOD = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"field \(row\): expected an object .* got a list"),
        ({}, "expected messages, prompt and completion"),
        ({"text": "x"}, "field text: expected messages"),
        ({"prompt": "q"}, "field completion: is missing"),
        ({"prompt": "q", "completion": " \n"}, "field completion: is empty"),
        ({"prompt": 3, "completion": "a"}, "field prompt: expected a text, got a number"),
        ({"human": "q", "ai": None}, "field ai: is missing"),
        ({"conversations": []}, "field conversations: expected a list"),
        ({"conversations": [{"human": "q", "ai": "a"}, {"human": "q"}]}, r"field conversations\[1\]\.ai: is missing"),
        ({"messages": "x"}, "field messages: expected a list .* got a text"),
        ({"messages": [{"role": "user"}]}, r"field messages\[0\]\.content: is missing"),
        ({"messages": [{"role": "human", "content": "q"}]}, r"field messages\[0\]\.role: 'human' is unknown"),
        ({"messages": [{"role": "user", "content": "q"}]}, "the last message must be the assistant's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, r"messages\[0\]\.role: expected user here"),
        ({"messages": [{"role": "system", "content": "s"}]}, "the last message must be the assistant's"),
        (
            {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "assistant")]},
            r"field messages\[2\]\.role: expected user here, got assistant",
        ),
        ({"messages": [{"role": "user", "content": "q"}], "system": "s"}, "field system: goes into messages"),
        ({**GOOD, "id": True}, "field id: expected a text or a whole number"),
        ({**GOOD, "id": "one"}, "field id: 'one' was used before, in .*line 1"),
        ({"prompt": "\ud800", "completion": "a"}, "field prompt: holds half of a surrogate pair"),
    ],
)
def test_a_broken_row_names_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**GOOD, "id": "one"}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(FtlabError, match=message) as caught:
        read_records(file)
    assert str(caught.value).startswith(f"{file}, line 3, field ")
    assert "\n" not in str(caught.value)


def test_a_broken_row_of_a_json_file_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"note": ["x"],\n "conversations": [\n  {"human": "q",\n   "ai": "a"},\n  {"human": "q"}\n]}')
    with pytest.raises(FtlabError, match=r"rows\.json, line 5 \(row 2\), field ai: is missing"):
        read_records(file)
    file.write_text('[\n{"human": "q" "ai": "a"}]')
    with pytest.raises(FtlabError, match=r"rows\.json: not JSON: .*line 2"):
        read_records(file)
    file.write_text('{"text": "x"}')
    with pytest.raises(FtlabError, match="expected a list of rows, or an object with one list"):
        read_records(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "q", "completion": "a"}\r\n')  # a byte order mark is no fault
    assert read_records(file)[0].messages == PAIR
    file.write_bytes(b'{"prompt": "q", "completion": "a"}\n{"prompt": "\xff", "completion": "a"}\n')
    with pytest.raises(FtlabError, match="line 2: byte 0xff is not UTF-8"):
        read_records(file)
    file.write_text('{"prompt": NaN, "completion": "a"}\n')
    with pytest.raises(FtlabError, match="line 1: not JSON: NaN"):
        read_records(file)
    file.write_text("\n\n")
    with pytest.raises(FtlabError, match="holds no record"):
        read_records(file)
    with pytest.raises(FtlabError, match="is a folder"):
        read_records(tmp_path)


def test_sides_are_split_off_or_named(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {index}", "completion": "a"} for index in range(60)]
    train = write(tmp_path / "train.jsonl", *rows)
    splits, info = load_records(FilesDataConfig(name="own", train=str(train), system="s"))
    sides = [splits.train, splits.validation, splits.test]
    assert sum(map(len, sides)) == 60
    assert all(sides)
    assert all(record.messages[0] == Message("system", "s") for side in sides for record in side)
    assert len(info.sha256) == 64
    assert info.as_dict()["name"] == "own"

    test = write(tmp_path / "test.jsonl", {"prompt": "another", "completion": "a"})
    splits, _ = load_records(FilesDataConfig(train=str(train), test=str(test)))
    assert [record.id for record in splits.test] == ["test:1"]
    assert len(splits.train) + len(splits.validation) == 60


def test_the_example_file_is_sound() -> None:
    splits, _ = load_records(FilesDataConfig(train="builtin:capitals.jsonl"))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 124
    assert min(len(splits.validation), len(splits.test)) >= 5
