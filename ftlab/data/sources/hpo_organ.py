"""The Human Phenotype Ontology: definition to organ system.

The organ systems are the children of HP:0000118, Phenotypic abnormality. A term's labels are those it lies under, by
any chain of is_a; with labels=single only terms under exactly one are used.
"""

from __future__ import annotations

from functools import cache

from ftlab.assets import resolve
from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import labelled_record
from ftlab.data.records import Record, SourceInfo, Splits
from ftlab.data.sources.hpo import Ontology, Term, checked_release, parse_obo, release_info, term_groups
from ftlab.data.splits import split_records
from ftlab.errors import FtlabError

__all__ = ["EXPECTED_ORGAN_RECORDS", "ROOT", "load_hpo_organ", "organ_records", "organ_systems"]

ROOT = "HP:0000118"
EXPECTED_ORGAN_RECORDS = {"single": 10596, "multi": 15817}  # of the pinned release


def organ_systems(ontology: Ontology) -> dict[str, frozenset[str]]:
    """Term id -> names of the children of ROOT that it is or lies under."""
    terms: dict[str, Term] = {term.id: term for term in ontology.terms}
    if ROOT not in terms:
        raise FtlabError(f"the ontology has no term {ROOT} (Phenotypic abnormality), so there are no organ systems")

    @cache
    def branches(id: str) -> frozenset[str]:
        term = terms.get(id)
        if term is None:
            return frozenset()
        own = {term.name} if ROOT in term.parents else set()
        return frozenset(own.union(*(branches(parent) for parent in term.parents if parent != ROOT)))

    return {id: branches(id) for id in terms}


def organ_records(ontology: Ontology, kind: str) -> list[Record]:
    """The labelled definitions, in the file's order; kind is single or multi."""
    systems, groups = organ_systems(ontology), term_groups(ontology.terms)
    records: list[Record] = []
    for term in ontology.terms:
        names = systems[term.id]
        if not term.definition or not names or (kind == "single" and len(names) != 1):
            continue
        label = next(iter(names)) if kind == "single" else tuple(sorted(names))
        records.append(labelled_record(term.id, term.definition, None, label, groups[term.id]))
    return records


def load_hpo_organ(config: LabelledDataConfig) -> tuple[Splits, SourceInfo]:
    """Fetch, parse, label and split. Errors: FtlabError if the file is not what its release says."""
    path = resolve(config.train)
    ontology = parse_obo(path)
    records = organ_records(ontology, config.labels)
    what = f"definitions with organ systems (labels={config.labels})"
    checked_release(ontology, len(records), EXPECTED_ORGAN_RECORDS[config.labels], what, path)
    title = f"Human Phenotype Ontology, definition to organ system ({config.labels})"
    return split_records(records, config), release_info(ontology, config.name, title, config.train)
