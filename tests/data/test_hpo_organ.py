from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import LabelledRecord, load_labelled, without_rare
from ftlab.data.records import Splits
from ftlab.data.sources.hpo import HPO_LOCATION, Ontology, parse_obo
from ftlab.data.sources.hpo_organ import organ_records, organ_systems
from ftlab.errors import FtlabError

TERMS = [
    ("HP:0000001", "All", [], ""),
    ("HP:0000118", "Phenotypic abnormality", ["HP:0000001"], "Any abnormality."),
    ("HP:1", "Heart", ["HP:0000118"], "Of the heart."),
    ("HP:2", "Skin", ["HP:0000118"], "Of the skin."),
    ("HP:3", "Big heart", ["HP:1"], "A heart that is big."),
    ("HP:4", "Blue skin", ["HP:2", "HP:3"], "A bad heart shows on the skin."),
    ("HP:5", "Rash", ["HP:2"], ""),
    ("HP:6", "Onset", ["HP:0000001"], "When it begins."),
]


def ontology(folder: Path, terms: list[tuple[str, str, list[str], str]] = TERMS) -> Ontology:
    lines = ["format-version: 1.2", "data-version: hp/releases/2000-01-01", ""]
    for id, name, parents, definition in terms:
        lines += ["[Term]", f"id: {id}", f"name: {name}"]
        lines += [f'def: "{definition}" [x]'] if definition else []
        lines += [f"is_a: {parent} ! its name" for parent in parents] + [""]
    path = folder / "hp.obo"
    path.write_text("\n".join(lines))
    return parse_obo(path)


def test_organ_systems_follow_every_chain_of_parents(tmp_path: Path) -> None:
    systems = organ_systems(ontology(tmp_path))
    assert {id: set(names) for id, names in systems.items()} == {
        "HP:0000001": set(),
        "HP:0000118": set(),
        "HP:1": {"Heart"},
        "HP:2": {"Skin"},
        "HP:3": {"Heart"},
        "HP:4": {"Heart", "Skin"},
        "HP:5": {"Skin"},
        "HP:6": set(),
    }


def test_records_have_a_definition_and_their_labels(tmp_path: Path) -> None:
    read = ontology(tmp_path)
    single, multi = organ_records(read, "single"), organ_records(read, "multi")
    assert [r.id for r in single] == ["HP:1", "HP:2", "HP:3"]
    assert [r.id for r in multi] == ["HP:1", "HP:2", "HP:3", "HP:4"]
    last = multi[-1]
    assert isinstance(last, LabelledRecord)
    assert (last.text, last.label) == ("A bad heart shows on the skin.", ("Heart", "Skin"))
    kept, notes = without_rare(Splits(multi[:2], multi[2:], []), 3)
    assert [[r.id for r in side] for side in (kept.train, kept.validation, kept.test)] == [["HP:1"], ["HP:3"], []]
    assert notes == ("left out, with fewer than data.min_per_label=3 records: Skin (2)",)
    assert without_rare(kept, 2) == (kept, ())


def test_an_ontology_without_the_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FtlabError, match="no term HP:0000118"):
        organ_systems(ontology(tmp_path, [("HP:1", "Heart", [], "x")]))


@pytest.mark.network
def test_the_published_release() -> None:
    config = LabelledDataConfig(name="hpo-organ", source="hpo_organ", train=HPO_LOCATION, min_per_label=20)
    splits, info, labels = load_labelled(config)
    records = [*splits.train, *splits.validation, *splits.test]
    assert len(records) == 10596 - 16  # without the voice (11) and the thoracic cavity (5)
    assert labels.size == 21
    assert "thoracic cavity (5)" in info.notes[0]
    count = Counter(r.label for r in records if isinstance(r, LabelledRecord))
    assert count["Abnormality of the nervous system"] == 1941
    splits, _, labels = load_labelled(replace(config, labels="multi"))
    assert labels.size == 22
    assert len(splits.train) + len(splits.validation) + len(splits.test) > 15_000
