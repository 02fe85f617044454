"""Labelled files that others published, pinned by hash: what is known of one, and records split as its source says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ftlab.assets import describe
from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import without_unlearnt
from ftlab.data.records import Record, SourceInfo, Splits
from ftlab.data.splits import split_records
from ftlab.errors import FtlabError

__all__ = ["Published", "pinned_location"]


def pinned_location(location: str, sha256: str) -> str:
    """A location that holds for the file with this hash alone."""
    return f"{location}#sha256={sha256}"


@dataclass(frozen=True)
class Published:
    """A published source.

    about: what a record is, one sentence. licence, citation: as a report shall show them. records: how many records
    are made of each pinned file, by its sha256. locations: where the files lie, by data option.
    """

    title: str
    about: str
    licence: str
    citation: str
    version: str
    url: str
    locations: Mapping[str, str]
    records: Mapping[str, int]

    def card(self) -> str:
        """What `python -m ftlab.data card` prints."""
        lines = [f"# {self.title}", "", self.about, ""]
        lines += [f"- Data option `{option}`: `{location}`" for option, location in self.locations.items()]
        facts = {"Home": self.url, "Version": self.version, "Licence": self.licence, "Citation": self.citation}
        lines += [f"- {key}: {value}" for key, value in facts.items()]
        return "\n".join(lines) + "\n"

    def split(
        self, config: LabelledDataConfig, records: list[Record], left_out: Mapping[str, int]
    ) -> tuple[Splits, SourceInfo]:
        """The records on their sides, without those whose label training lacks, and where they come from.

        left_out: what a remark says was left out, with how often it was.

        Errors: FtlabError if a pinned file gave another number of records.
        """
        sha256 = str(describe(config.train)["sha256"])
        expected = self.records.get(sha256)
        if expected not in (None, len(records)):
            raise FtlabError(f"{config.train}: expected {expected} records of the pinned file, got {len(records)}")
        splits, unlearnt = without_unlearnt(split_records(records, config))
        other = "this is not the pinned file: scores are not comparable with published ones"
        notes = [*(note for note, count in left_out.items() if count), *unlearnt]
        info = SourceInfo(
            name=config.name,
            title=self.title,
            licence=self.licence,
            citation=self.citation,
            version="unknown" if expected is None else self.version,
            url=self.url,
            location=config.train,
            sha256=sha256,
            notes=tuple([*notes, other] if expected is None else notes),
        )
        return splits, info
