from __future__ import annotations

from pathlib import Path

import pytest

from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import LabelledRecord, load_labelled
from ftlab.data.sources.icd10_chapter import SOURCE, read_icd10_chapter
from ftlab.errors import FtlabError


def diag(code: str, description: str, *inner: str) -> str:
    return f"<diag><name>{code}</name><desc>{description}</desc>{''.join(inner)}</diag>"


def file(folder: Path, chapters: dict[str, list[str]]) -> Path:
    """A tabular list: the title of each chapter with its categories, each in a section of its own."""
    path = folder / "tabular.xml"
    text = "".join(
        f"<chapter><name>1</name><desc>{title}</desc>"
        + "".join(f'<section id="X"><desc>Section</desc>{category}</section>' for category in categories)
        + "</chapter>"
        for title, categories in chapters.items()
    )
    path.write_text(f"<ICD10CM.tabular><introduction/>{text}</ICD10CM.tabular>")
    return path


def test_descriptions_get_the_title_of_their_chapter(tmp_path: Path) -> None:
    note = "<inclusionTerm><note>classical cholera</note></inclusionTerm>"
    cholera = diag("A00", "Cholera", note, diag("A00.0", "Cholera due\n to vibrio", diag("A00.01", "Mild cholera")))
    records, repeated, contradicted = read_icd10_chapter(
        file(tmp_path, {"Infectious diseases (A00-B99)": [cholera], "Pregnancy (O00-O9A)": [diag("O9A", "Labor")]})
    )
    assert (repeated, contradicted) == (0, 0)
    assert all(isinstance(record, LabelledRecord) for record in records)
    assert [(r.id, r.text, r.label, r.group) for r in records] == [  # type: ignore[attr-defined]
        ("A00", "Cholera", "Infectious diseases", "A00"),
        ("A00.0", "Cholera due to vibrio", "Infectious diseases", "A00"),
        ("A00.01", "Mild cholera", "Infectious diseases", "A00"),
        ("O9A", "Labor", "Pregnancy", "O9A"),
    ]


def test_equal_descriptions_join_categories_and_those_of_two_chapters_are_left_out(tmp_path: Path) -> None:
    first = [diag("A00", "Cholera", diag("A00.1", "Fever")), diag("A01", "Typhoid", diag("A01.1", "FEVER."))]
    second = [diag("B00", "Herpes", diag("B00.1", "Pain")), diag("B01", "Pox")]
    third = [diag("C00", "Lips", diag("C00.1", "pain"), diag("C00.2", "Pain"))]
    path = file(tmp_path, {"One (A00-A99)": first, "Two (B00-B99)": second, "Three (C00-C99)": third})
    records, repeated, contradicted = read_icd10_chapter(path)
    assert (repeated, contradicted) == (1, 3)
    assert {record.id: record.group for record in records} == {
        "A00": "A00", "A00.1": "A00", "A01": "A00", "B00": "B00", "B01": "B01", "C00": "B00",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([diag("A00", "Cholera", diag("A00.1", " "))], r"diag A00\.1: expected a desc"),
        ([diag("", "Cholera")], r"diag Cholera: expected a name"),
        ([], r"no code; expected chapter > section > diag"),
    ],
)
def test_what_is_no_tabular_list_is_refused(tmp_path: Path, categories: list[str], message: str) -> None:
    with pytest.raises(FtlabError, match=message):
        read_icd10_chapter(file(tmp_path, {"One (A00-A99)": categories}))


def test_what_is_no_xml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tabular.xml").write_text("A00 Cholera")
    with pytest.raises(FtlabError, match="not XML"):
        read_icd10_chapter(tmp_path / "tabular.xml")


@pytest.mark.network
def test_the_pinned_file() -> None:
    splits, info, labels = load_labelled(
        LabelledDataConfig(source="icd10_chapter", train=SOURCE.locations["icd10_chapter"])
    )
    sides = [splits.train, splits.validation, splits.test]
    assert sum(map(len, sides)) == 46138
    assert [len(side) for side in sides] == [35668, 5066, 5404]
    assert len(labels.names) == 22
    assert "Neoplasms" in labels.names
    assert info.notes == ("743 codes repeat the description of another one of their chapter and were left out",)
    groups = [{record.group for record in side} for side in sides]
    assert len(set.union(*groups)) == sum(map(len, groups))
