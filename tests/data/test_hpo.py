from __future__ import annotations

from pathlib import Path

import pytest

from ftlab.config import HPODataConfig
from ftlab.data.records import Message, load_records, wording
from ftlab.data.sources import hpo
from ftlab.data.splits import normalize_phrase
from ftlab.errors import FtlabError

TERMS = r"""format-version: 1.2
data-version: hp/releases/2099-01-01

[Term]
id: HP:0000001
name: Splenomegaly
def: "A large \"spleen\".\nSee also." [https://orcid.org/0]
synonym: "Large spleen" EXACT layperson []
synonym: "SPLENOMEGALY" EXACT layperson []
synonym: "Increased spleen size" RELATED []

[Term]
id: HP:0000002
name: Enlarged organ
synonym: "Big organ" BROAD layperson [ORCID:1, ORCID:2]
synonym: "large  spleen!" EXACT abbreviation []

[Term]
id: HP:0000003
name: Old
is_obsolete: true

[Term]
id: HP:0000004
name: Tall stature
def: "Height above the norm." []

[Typedef]
id: has_part
name: has part
"""


@pytest.fixture
def ontology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTLAB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "hp.obo"
    path.write_text(TERMS, encoding="utf-8")
    return path


def test_terms_are_parsed(ontology: Path) -> None:
    parsed = hpo.parse_obo(ontology)
    assert parsed.release == "2099-01-01"
    assert [term.id for term in parsed.terms] == ["HP:0000001", "HP:0000002", "HP:0000004"]
    assert parsed.terms[0].definition == 'A large "spleen". See also.'
    assert parsed.terms[0].synonyms[0] == hpo.Synonym("Large spleen", frozenset({"layperson"}))
    assert parsed.terms[1].synonyms[0] == hpo.Synonym("Big organ", frozenset({"layperson"}))
    assert parsed.terms[0].synonyms[2].types == frozenset()


def test_pairs_of_both_tasks(ontology: Path) -> None:
    parsed = hpo.parse_obo(ontology)
    lay = hpo.build_records(parsed, "lay_to_clinical")
    assert [(record.id, record.messages[0].content, record.reference) for record in lay] == [
        ("HP:0000001/0", "Clinical term for: Large spleen", "Splenomegaly"),
        ("HP:0000002/0", "Clinical term for: Big organ", "Enlarged organ"),
    ]
    define = hpo.build_records(parsed, "define")
    assert [(record.messages[0], record.reference) for record in define] == [
        (Message("user", "Define: Splenomegaly"), 'A large "spleen". See also.'),
        (Message("user", "Define: Tall stature"), "Height above the norm."),
    ]
    config = HPODataConfig(location="x", task="lay_to_clinical")
    assert wording(config, "Large spleen") == lay[0].messages[0].content


def test_terms_that_share_a_phrase_are_one_group(ontology: Path) -> None:
    groups = hpo.term_groups(hpo.parse_obo(ontology).terms)
    assert groups["HP:0000001"] == groups["HP:0000002"] == "HP:0000001"  # "large  spleen!" is "Large spleen"
    assert groups["HP:0000004"] == "HP:0000004"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id: HP:0000004\n", "", "line 23: a term without id or name"),
        ("id: HP:0000004", "id: HP:0000001", "HP:0000001 was defined before, in line 4"),
        ('def: "Height above the norm." []', 'def: "Height', "line 26, field def: expected a quoted text"),
        ("data-version", "remark", "not an ontology"),
    ],
)
def test_damaged_files_are_refused(ontology: Path, old: str, new: str, message: str) -> None:
    assert TERMS.count(old) == 1
    ontology.write_text(TERMS.replace(old, new))
    with pytest.raises(FtlabError, match=message):
        hpo.parse_obo(ontology)


def test_a_shortened_copy_of_the_pinned_release_is_refused(ontology: Path) -> None:
    config = HPODataConfig(location=str(ontology), task="define", validation_fraction=0, test_fraction=0)
    splits, info = load_records(config)
    assert len(splits.train) == 2
    assert "2099-01-01" in info.notes[0]
    ontology.write_text(TERMS.replace("2099-01-01", hpo.RELEASE))
    with pytest.raises(FtlabError, match="has 16449 define pairs, this file has 2: it is not the published file"):
        load_records(config)


@pytest.mark.network
@pytest.mark.parametrize("task", ["lay_to_clinical", "define"])
def test_the_published_release(task: str) -> None:
    config = HPODataConfig(location=hpo.HPO_LOCATION, task=task)
    splits, info = load_records(config)
    sides = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    assert sum(map(len, sides.values())) == hpo.EXPECTED_RECORDS[task]
    assert info.version == hpo.RELEASE
    assert info.notes == ()
    everything = [record for side in sides.values() for record in side]
    assert len({record.id for record in everything}) == len(everything)
    assert min(len(splits.validation), len(splits.test)) > 0.09 * len(everything)

    # No wording of a term, in prompt or answer, is on two sides.
    terms = {term.id: term for term in hpo.parse_obo(hpo.resolve(hpo.HPO_LOCATION)).terms}
    phrases: dict[str, str] = {}
    for side, records in sides.items():
        for record in records:
            term = terms[record.id.split("/")[0]]
            for text in (term.id, term.name, *(synonym.text for synonym in term.synonyms)):
                assert phrases.setdefault(normalize_phrase(text), side) == side
