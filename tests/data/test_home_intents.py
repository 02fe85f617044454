from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import labelled_record, load_labelled, without_unlearnt
from ftlab.data.records import Record, Splits
from ftlab.data.sources.home_intents import (
    PER_TEMPLATE,
    SOURCE,
    load_home_intents,
    read_home_intents,
)
from ftlab.data.sources.home_words import LISTS, NAMES
from ftlab.errors import FtlabError


def block(*sentences: str, **more: Any) -> dict[str, Any]:
    return {"sentences": list(sentences), **more}


def file(folder: Path, intents: dict[str, list[dict[str, Any]]], **changes: Any) -> Path:
    lists = {
        "state": {"values": ["open", {"in": "(closed|shut)", "out": "off"}]},
        "level": {"range": {"from": 10, "to": 20, "step": 5}},
        "item": {"wildcard": True},
    }
    content = {
        "language": "en",
        "intents": {name: {"data": data} for name, data in intents.items()},
        "lists": lists,
        "expansion_rules": {"the": "(the|my)"},
    }
    (folder / "en.json").write_text(json.dumps({**content, **changes}))
    return folder / "en.json"


def texts(records: list[Record]) -> set[str]:
    return {record.messages[0].content for record in records}


def test_rules_lists_and_ranges_become_sentences(tmp_path: Path) -> None:
    intents = {"HassOpen": [block("is <the> door {state:what}", "never mind")], "HassSet": [block("to {level}[%]")]}
    records, shared = read_home_intents(file(tmp_path, intents))
    doors = {f"is {the} door {state}" for the in ("the", "my") for state in ("open", "closed", "shut")}
    opened = texts([record for record in records if record.reference == "HassOpen"])
    assert len(opened & doors) == PER_TEMPLATE
    assert opened - doors == {"never mind"}
    levels = texts([record for record in records if record.reference == "HassSet"])
    assert len(levels) == 3, "with and without % they are equal"
    assert {text.removesuffix("%") for text in levels} == {"to 10", "to 15", "to 20"}
    assert shared == 0
    assert [record.id for record in records][:2] == ["HassOpen:1", "HassOpen:2"]
    assert {record.group for record in records} == {"is <the> door {state:what}", "never mind", "to {level}[%]"}
    assert records == read_home_intents(tmp_path / "en.json")[0]


def test_names_are_those_of_the_devices_that_the_template_is_for(tmp_path: Path) -> None:
    locks = block("lock {name}", requires_context={"domain": ["lock", "unheard of"]})
    lamps = block("dim {name} in {area}", slots={"domain": "light"})
    anything = block("what about {name}", requires_context={"area": {"slot": True}})
    intents = {"HassLock": [locks], "HassDim": [lamps], "HassAsk": [anything]}
    records, _ = read_home_intents(file(tmp_path, intents))
    said = {name: texts([r for r in records if r.reference == name]) for name in intents}
    assert said["HassLock"] == {f"lock {name}" for name in NAMES["en"]["lock"].split(", ")}
    areas = LISTS["en"]["area"].split(", ")
    assert said["HassDim"] <= {f"dim {name} in {area}" for name in NAMES["en"]["light"].split(", ") for area in areas}
    every = {f"what about {name}" for names in NAMES["en"].values() for name in names.split(", ")}
    assert len(said["HassAsk"]) == PER_TEMPLATE
    assert said["HassAsk"] <= every


def test_equal_sentences_join_templates_and_those_of_two_intents_are_left_out(tmp_path: Path) -> None:
    intents = {
        "HassStop": [block("stop", "halt", "(stop|end)")],
        "HassPause": [block("(pause|Halt!)", "wait")],
    }
    records, shared = read_home_intents(file(tmp_path, intents))
    assert shared == 1
    assert {(r.messages[0].content, r.reference, r.group) for r in records} == {
        ("stop", "HassStop", "(stop|end)"),
        ("end", "HassStop", "(stop|end)"),
        ("pause", "HassPause", "(pause|Halt!)"),
        ("wait", "HassPause", "wait"),
    }


def test_a_language_may_have_no_spaces(tmp_path: Path) -> None:
    path = file(
        tmp_path, {"HassOn": [block("打开 {area}[的] 灯")]}, language="zh-CN", settings={"ignore_whitespace": True}
    )
    areas = LISTS["zh-CN"]["area"].split(", ")
    assert texts(read_home_intents(path)[0]) <= {f"打开{area}{of}灯" for area in areas for of in ("", "的")}


def test_the_words_are_those_of_both_languages() -> None:
    assert LISTS["en"].keys() == LISTS["zh-CN"].keys()
    assert NAMES["en"].keys() == NAMES["zh-CN"].keys()
    for table in (*LISTS.values(), *NAMES.values()):
        for text in table.values():
            words = text.split(", ")
            assert len(words) == len(set(words)) > 2
            assert all(words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "fr"}, "there are no words for a home in the language fr; choose from en, zh-CN"),
        ({"language": None}, "the file: expected language, a str"),
        ({"intents": {}}, "no sentence; expected intents"),
        ({"intents": {"HassOn": {"data": [{}]}}}, "HassOn: expected sentences, a list"),
        ({"intents": {"HassOn": {"data": [block("on {where}")]}}}, r"template 'on \{where\}': \{where\} is not known"),
        ({"expansion_rules": {"the": "(the"}}, r"template '\(the': a \) is missing"),
        ({"lists": {"level": {"range": {"from": 1}}}}, "level: expected to, a int"),
    ],
)
def test_broken_files_are_refused_with_their_path(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = file(tmp_path, {"HassOn": [block("on")]})
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(FtlabError, match=rf"en\.json: {message}"):
        read_home_intents(path)


def test_intents_that_training_lacks_are_left_out() -> None:
    def records(*labels: str) -> list[Record]:
        return [labelled_record(label, "text", None, label) for label in labels]

    splits, unlearnt = without_unlearnt(Splits(records("on", "off"), records("on", "dock"), records("off", "mow")))
    assert unlearnt == ("left out, as no record of them is in training: dock, mow",)
    assert [[record.id for record in side] for side in (splits.train, splits.validation, splits.test)] == [
        ["on", "off"], ["on"], ["off"],
    ]  # fmt: skip


def test_another_file_is_said_to_be_one(tmp_path: Path) -> None:
    intents = {"HassOn": [block(*(f"on {i} {{area}}" for i in range(60)))]}
    splits, info = load_home_intents(LabelledDataConfig(train=str(file(tmp_path, intents))))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 60 * PER_TEMPLATE
    assert info.version == "unknown"
    assert info.notes == ("this is not the pinned file: scores are not comparable with published ones",)


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "sizes", "intents", "note"),
    [
        ("home_intents", [3473, 388, 405], 41, "no record of them is in training: HassVacuumReturnToBase"),
        ("home_intents_zh", [2640, 337, 296], 40, "3 sentences that two intents have were left out"),
    ],
)
def test_the_pinned_files(name: str, sizes: list[int], intents: int, note: str) -> None:
    splits, info, labels = load_labelled(LabelledDataConfig(source="home_intents", train=SOURCE.locations[name]))
    sides = [splits.train, splits.validation, splits.test]
    assert [len(side) for side in sides] == sizes
    assert {"home_intents": 4271, "home_intents_zh": 3273}[name] == sum(sizes) + (5 if name == "home_intents" else 0)
    assert len(labels.names) == intents
    assert any(note in given for given in info.notes)
    assert info.version == "2026.10.27"
    groups = [{record.group for record in side} for side in sides]
    assert len(set.union(*groups)) == sum(map(len, groups))
    for side in sides:
        assert not any(set(record.messages[0].content) & set("()[]<>{}|;") for record in side)
