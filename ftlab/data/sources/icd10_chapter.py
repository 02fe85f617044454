"""ICD-10-CM, the classification of diseases: description of a code to its chapter.

The file is a tree: chapter > section > category (three characters) > further codes. All codes of a category are one
group, and so are categories with a description in common (but for case and punctuation). Of equal descriptions one
stays; if they stand in two chapters, none does.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from ftlab.assets import resolve
from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import labelled_record
from ftlab.data.records import Record, SourceInfo, Splits
from ftlab.data.sources.published import Published, pinned_location
from ftlab.data.splits import connect_groups, normalize_phrase
from ftlab.errors import FtlabError

__all__ = ["SOURCE", "load_icd10_chapter", "read_icd10_chapter"]

SHA256 = "f161f8182aff3ce3a2a78e202f8259c08eaee2c670a9e45b0072445c52302935"
FILE = "pypi:simple-icd-10-cm==1.5.0/simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"  # 9.7 MB
SOURCE = Published(
    title="ICD-10-CM: description of a code to its chapter",
    about="Descriptions of the codes of ICD-10-CM with the chapter they stand in: 46,138 records, 22 chapters.",
    licence="A publication of the US government (NCHS, CDC) after the ICD-10 of the World Health Organization, which "
    "holds the copyright of that; the package simple-icd-10-cm that carries the file is MIT.",
    citation="ICD-10-CM, release of April 2026, National Center for Health Statistics, https://www.cdc.gov/nchs/icd",
    version="April 2026",
    url="https://www.cdc.gov/nchs/icd/icd-10-cm/files.html",
    locations={"icd10_chapter": pinned_location(FILE, SHA256)},
    records={SHA256: 46138},
)
CODES = re.compile(r"\s*\([A-Z]\w\w-[A-Z]\w\w\)$")  # the range that ends a chapter's title: (A00-B99)


@dataclass
class _Phrase:
    """A description: where it came first, and everything it stands in."""

    code: str
    text: str
    chapters: set[str] = field(default_factory=set)
    categories: list[str] = field(default_factory=list)


def read_icd10_chapter(path: Path) -> tuple[list[Record], int, int]:
    """The records in the file's order; how many codes repeat a description, and how many have one of two chapters.

    Errors: FtlabError if the file is no such tree, with the code that lacks something.
    """
    try:
        chapters = ElementTree.parse(path).getroot().findall("chapter")
    except ElementTree.ParseError as error:
        raise FtlabError(f"{path}: not XML: {error}") from None
    phrases: dict[str, _Phrase] = {}
    codes = contradicted = 0
    for chapter in chapters:
        title = CODES.sub("", _child(chapter, "desc", path))
        for category in chapter.findall("section/diag"):
            name = _child(category, "name", path)
            for diag in category.iter("diag"):
                code, text = _child(diag, "name", path), _child(diag, "desc", path)
                codes += 1
                phrase = phrases.setdefault(normalize_phrase(text), _Phrase(code, text))
                phrase.chapters.add(title)
                phrase.categories.append(name)
    if not phrases:
        raise FtlabError(f"{path}: no code; expected chapter > section > diag, as in the tabular list of ICD-10-CM")
    groups = connect_groups([phrase.categories for phrase in phrases.values()])
    records: list[Record] = []
    for phrase, group in zip(phrases.values(), groups, strict=True):
        if len(phrase.chapters) > 1:
            contradicted += len(phrase.categories)
            continue
        records.append(labelled_record(phrase.code, phrase.text, None, next(iter(phrase.chapters)), group))
    return records, codes - contradicted - len(records), contradicted


def _child(element: ElementTree.Element, tag: str, path: Path) -> str:
    """The text of a child."""
    text = " ".join((element.findtext(tag) or "").split())
    if not text:
        where = element.findtext("name") or element.findtext("desc") or "?"
        raise FtlabError(f"{path}: {element.tag} {where.strip()}: expected a {tag}")
    return text


def load_icd10_chapter(config: LabelledDataConfig) -> tuple[Splits, SourceInfo]:
    """Fetch, read and split. Errors: FtlabError if the pinned file gives another number of records."""
    records, repeated, contradicted = read_icd10_chapter(resolve(config.train))
    left_out = {
        f"{repeated} codes repeat the description of another one of their chapter and were left out": repeated,
        f"{contradicted} codes with a description that stands in two chapters were left out": contradicted,
    }
    return SOURCE.split(config, records, left_out)
