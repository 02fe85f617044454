from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftlab.config import FilesDataConfig, LabelledDataConfig, makes_classifier
from ftlab.data.labelled import LabelledRecord, load_labelled
from ftlab.data.records import load_records, wording
from ftlab.data.sources.privacy_policy import SOURCE, read_privacy_policy
from ftlab.errors import FtlabError


def file(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    path = folder / "test.jsonl"
    named = [{"context": clause, "question": question, "answer": answer} for clause, question, answer in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    return path


def test_duplicates_stay_once_and_contradictions_not_at_all(tmp_path: Path) -> None:
    rows = [
        ("We sell data.", "Do you sell?", "True"),
        ("we sell data", "do you sell", "True"),
        ("We sell data.", "Do you keep it?", "False"),
        ("No cookies.", "Cookies?", "False"),
        ("No cookies.", "Cookies?", "True"),
    ]
    records, left_out = read_privacy_policy(file(tmp_path, rows))
    assert [(r.id, r.group) for r in records] == [("privacy:1", "we sell data"), ("privacy:3", "we sell data")]
    assert left_out == 3
    assert isinstance(records[1], LabelledRecord)
    assert (records[1].text, records[1].pair, records[1].label) == ("We sell data.", "Do you keep it?", "False")


def test_other_answers_are_refused_with_the_line(tmp_path: Path) -> None:
    with pytest.raises(FtlabError, match=r"line 1: .*True or False"):
        read_privacy_policy(file(tmp_path, [("We sell.", "Do you?", "Maybe")]))


def test_with_an_instruction_a_record_is_a_conversation(tmp_path: Path) -> None:
    rows = [(f"Clause {i}.", "Is it?", "True" if i % 2 else "False") for i in range(40)]
    config = LabelledDataConfig(source="privacy_policy", train=str(file(tmp_path, rows)), shots=3)
    assert makes_classifier(config)
    plain = load_records(config)[0].train
    config.instruction, config.system = "True or false?", "Be short."
    assert not makes_classifier(config)
    assert not makes_classifier(FilesDataConfig())
    asked = load_records(config)[0].train
    assert [r.id for r in asked] == [r.id for r in plain]
    assert [m.role for m in asked[0].messages] == ["system", "user", "assistant"]
    assert asked[0].messages[1].content == "True or false?\n\n" + plain[0].messages[0].content
    assert asked[0].reference == plain[0].reference
    assert wording(config, "A clause.") == "True or false?\n\nA clause."


@pytest.mark.network
def test_the_pinned_file() -> None:
    config = LabelledDataConfig(source="privacy_policy", train=SOURCE.locations["privacy_policy"])
    splits, info, labels = load_labelled(config)
    sides = [splits.train, splits.validation, splits.test]
    assert sum(map(len, sides)) == 10919
    assert labels.names == ("False", "True")
    assert info.notes[0].startswith("4 rows")
    groups = [{record.group for record in side} for side in sides]
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert [len(side) for side in sides] == [8564, 1278, 1077]


def test_a_long_text_is_cut_in_the_users_message_also_behind_a_system_message(tmp_path: Path) -> None:
    rows = [(f"Clause {i} of many words.", "Is it?", "True" if i % 2 else "False") for i in range(40)]
    config = LabelledDataConfig(source="privacy_policy", train=str(file(tmp_path, rows)))
    config.instruction, config.system = "True or false?", "Be short."
    record = load_records(config)[0].train[0]
    shorter = record.shortened(lambda text: text[:6])
    assert shorter is not None
    assert [message.content for message in shorter.messages[:2]] == ["Be short.", "True or false?\n\nClause\nIs it?"]
    assert shorter.reference == record.reference
