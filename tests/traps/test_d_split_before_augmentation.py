"""No held-out record, duplicate or synonym was trained on: groups are made before sides are chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlab.config import DataConfig, FilesDataConfig
from ftlab.data.records import Record, Splits, load_records
from ftlab.data.sources import files
from ftlab.data.sources.hpo import Ontology, Synonym, Term, build_records
from ftlab.data.splits import normalize_phrase, split_of, split_records
from ftlab.errors import FtlabError

LAY = frozenset({"layperson"})


def ontology() -> Ontology:
    """300 terms of four lay phrases; some share a wording with the one before (its name, its definition)."""
    terms = []
    for number in range(300):
        synonyms = [Synonym(f"Phrase {number} {letter}", LAY) for letter in "abcd"]
        if number % 3 == 1:
            synonyms.append(Synonym(f"CLINICAL  name-{number - 1}", frozenset()))
        definition = f"Meaning {number - 1 if number % 9 == 2 else number}."
        terms.append(Term(f"HP:{number:07d}", f"Clinical name {number}", definition, synonyms))
    return Ontology("2099-01-01", terms)


def wordings(record: Record, terms: dict[str, Term]) -> set[str]:
    term = terms[record.id.split("/")[0]]
    return {normalize_phrase(text) for text in (term.name, term.definition, *(s.text for s in term.synonyms))}


def check(splits: Splits, keys_of: Callable[[Record], set[str]]) -> None:
    sides = [
        {key for record in side for key in keys_of(record)} for side in (splits.train, splits.validation, splits.test)
    ]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


def by_key(records: list[Record], key: Callable[[Record], str]) -> Splits:
    """The broken variants: sides chosen by something finer than the group."""
    splits = Splits([], [], [])
    for record in records:
        getattr(splits, split_of(key(record), seed=0, validation_fraction=0.1, test_fraction=0.1)).append(record)
    return splits


def test_no_wording_of_a_term_is_on_two_sides() -> None:
    source = ontology()
    terms = {term.id: term for term in source.terms}
    records = build_records(source, "lay_to_clinical")
    assert len(records) == 1200
    check(split_records(records, DataConfig()), lambda record: wordings(record, terms))
    for broken in (lambda record: record.id, lambda record: record.id.split("/")[0]):  # by phrase; by term alone
        with pytest.raises(AssertionError):
            check(by_key(records, broken), lambda record: wordings(record, terms))


def test_no_copy_of_a_record_is_on_two_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLAB_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Question {n % 100}{'?' * (n // 100)}", "completion": f"answer {n}"} for n in range(400)]
    rows += [{"prompt": f"Other {n}", "completion": "a", "group": f"patient {n // 4}"} for n in range(200)]
    file = tmp_path / "copies.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits, _ = load_records(FilesDataConfig(train=str(file)))

    def keys(record: Record) -> set[str]:
        number = int(record.id.split(":")[1]) - 1
        return {str(rows[number].get("group", normalize_phrase(record.messages[0].content)))}

    check(splits, keys)
    everything = [record for side in (splits.train, splits.validation, splits.test) for record in side]
    with pytest.raises(AssertionError):
        check(by_key(everything, lambda record: record.id), keys)


def test_named_files_that_overlap_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLAB_CACHE", str(tmp_path / "cache"))
    for name, prompt in (("train", "Large spleen"), ("test", "large spleen!")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": prompt, "completion": "x"}) + "\n")
    with pytest.raises(FtlabError, match=r"test:1 \(test\) has the same prompt as train:1 \(train\)"):
        load_records(named(tmp_path))


def named(folder: Path) -> FilesDataConfig:
    return FilesDataConfig(train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"), validation_fraction=0.0)


def write(file: Path, *rows: object) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def talk(*contents: str, **more: str) -> dict[str, object]:
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], **more}


def last_prompt_key(record: Record) -> list[str]:
    """The mistake: only the last answer's prompt counts, though every answer is learnt."""
    return ["prompt:" + normalize_phrase(" ".join(m.content for m in record.messages[:-1] if m.role != "system"))]


def test_a_conversation_and_its_beginning_are_never_on_two_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [
        [talk(f"Question {n}", f"answer {n}"), talk(f"question {n}?", f"answer {n}", f"and {n}", f"more {n}")]
        for n in range(200)
    ]
    write(tmp_path / "train.jsonl", *(row for pair in pairs for row in pair))
    config = FilesDataConfig(train=str(tmp_path / "train.jsonl"))

    def keys(record: Record) -> set[str]:
        return {normalize_phrase(record.messages[0].content)}

    check(load_records(config)[0], keys)
    monkeypatch.setattr(files, "leak_keys", last_prompt_key)
    with pytest.raises(AssertionError):
        check(load_records(config)[0], keys)


@pytest.mark.parametrize("long_side", ["train", "test"])
def test_named_files_with_a_conversation_and_its_beginning_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_side: str
) -> None:
    short_side = {"train": "test", "test": "train"}[long_side]
    write(tmp_path / f"{long_side}.jsonl", talk("other", "x"), talk("Large spleen", "a", "why?", "b"))
    write(tmp_path / f"{short_side}.jsonl", talk("large spleen!", "a"))
    with pytest.raises(FtlabError, match="has the same prompt as"):
        load_records(named(tmp_path))
    monkeypatch.setattr(files, "leak_keys", last_prompt_key)
    load_records(named(tmp_path))


def test_named_files_with_one_group_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", talk("one", "a", group="patient 3"))
    write(tmp_path / "test.jsonl", talk("two", "b", group="patient 3"))
    with pytest.raises(FtlabError, match=r"test:1 \(test\) has the same group as train:1 \(train\)"):
        load_records(named(tmp_path))
    write(tmp_path / "test.jsonl", talk("two", "b", group="patient 4"), talk("why", "a"), talk("else", "a", "why", "c"))
    assert len(load_records(named(tmp_path))[0].test) == 3  # a later question alone is another prompt
