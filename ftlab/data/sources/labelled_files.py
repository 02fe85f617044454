"""The user's own labelled files: JSONL, JSON, CSV or TSV.

A row has a text, perhaps a second one, and a label; the names of these fields are settings::

    {"text": "...", "label": "kidney"}                          labels=single; a number or true/false is its text
    {"text": "...", "text_pair": "...", "label": ["a", "b"]}    labels=multi; [] is none of them
    {"text": "...", "label": 3.5}                               labels=regression

with optional `id` and `group`. A ``.csv`` or ``.tsv`` file has a header line; the labels of a cell are separated by
``data.separator`` (labels=multi). Records with the same text, whatever their second one, or with one `group`, are
never on two sides of a split that is made here. Files that are named for sides may share a text whose second ones
differ, as published splits of pairs do, but no record's text and second text, and no `group`.
"""

from __future__ import annotations

import csv
import io
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlab.assets import describe, resolve
from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import LabelledRecord, labelled_record
from ftlab.data.records import Record, SourceInfo, Splits
from ftlab.data.sources.files import (
    RowError,
    decode_utf8,
    id_of,
    json_rows,
    jsonl_rows,
    kind,
    leak_keys,
    refuse_overlap,
    row_line,
    source_info,
    text_of,
)
from ftlab.data.splits import connect_groups, normalize_phrase, split_records
from ftlab.errors import FtlabError
from ftlab.models.labels import Label

__all__ = ["load_labelled_files", "read_labelled"]

TABLES = {".csv": ",", ".tsv": "\t"}


def load_labelled_files(config: LabelledDataConfig) -> tuple[Splits, SourceInfo]:
    """Records of the named files; sides without a file are split off the training records by group."""
    locations = {"train": config.train, "validation": config.validation, "test": config.test}
    named = {side: location for side, location in locations.items() if location is not None}
    seen: dict[str, str] = {}
    read = {side: read_labelled(resolve(location), config, side, seen) for side, location in named.items()}
    refuse_overlap(read, named)
    groups = connect_groups(keys_of(read["train"]))
    together = [replace(record, group=group) for record, group in zip(read["train"], groups, strict=True)]
    divided = split_records(together, config, validation="validation" not in read, test="test" not in read)
    splits = Splits(divided.train, read.get("validation", divided.validation), read.get("test", divided.test))
    hashes = {side: str(describe(location)["sha256"]) for side, location in named.items()}
    return splits, source_info(config.name, named, hashes)


def keys_of(records: Sequence[Record]) -> list[list[str]]:
    """What keeps each together with others: `leak_keys`, and the text alone, which may have another second text there.

    One text that all records share, such as a question, tells none apart and is no key. The text's key sorts behind the
    others, so it names no group (`connect_groups`).
    """
    texts = [normalize_phrase(record.text) for record in records if isinstance(record, LabelledRecord)]
    shared = len(set(texts)) == 1
    return [
        leak_keys(record) if shared else [*leak_keys(record), f"text:{text}"]
        for record, text in zip(records, texts, strict=True)
    ]


def read_labelled(
    path: Path, config: LabelledDataConfig, side: str = "train", seen: dict[str, str] | None = None
) -> list[Record]:
    """All records of one file, checked. Errors: FtlabError with the file, the line and the field."""
    seen = {} if seen is None else seen
    if path.is_dir():
        raise FtlabError(f"{path}: is a folder; name a JSONL, JSON, CSV or TSV file")
    text, suffix = decode_utf8(path), path.suffix.lower()
    rows = jsonl_rows(path, text)
    if suffix in TABLES:
        rows = table_rows(path, text, TABLES[suffix], config)
    elif suffix == ".json":
        rows = json_rows(path, text)
    records: list[Record] = []
    fields: dict[str, None] = {}  # an ordered set
    for number, row in rows:
        where = f"line {number}"
        if isinstance(row, dict):
            fields |= dict.fromkeys(row)
        try:
            record = parse_labelled(row, config, f"{side}:{number}", in_table=suffix in TABLES)
            if record.id in seen:
                raise RowError("id", f"{record.id!r} was used before, in {seen[record.id]}; ids must differ")
        except RowError as error:
            if suffix == ".json":
                where = f"line {row_line(text, number)} (row {number})"
            raise FtlabError(f"{path}, {where}, {error}") from None
        seen[record.id] = f"{path}, {where}"
        records.append(record)
    if not records:
        raise FtlabError(f"{path}: holds no record; expected rows with {config.text_field} and {config.label_field}")
    if _named_pair(config) and suffix not in TABLES and config.pair_field not in fields:
        raise FtlabError(
            f"{path}: no row has the field {config.pair_field} (data.pair_field); the fields are {', '.join(fields)}"
        )
    return records


def _named_pair(config: LabelledDataConfig) -> bool:
    """Whether the field of a second text was named; the default need not be there."""
    return config.pair_field != LabelledDataConfig.pair_field


def table_rows(path: Path, text: str, delimiter: str, config: LabelledDataConfig) -> Iterator[tuple[int, Any]]:
    """(line on which it ends, {column: cell}) of each row of a CSV or TSV file."""
    # The module's limit, for every reader, is 131,072 characters a cell; a mail or a report may be longer.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        needed = (config.text_field, config.label_field)
        for name in (*needed, *([config.pair_field] if _named_pair(config) else [])):
            if name not in header:
                raise FtlabError(
                    f"{path}, line 1: there is no column {name}; the columns are {', '.join(header) or '(none)'}"
                )
        if len(set(header)) < len(header):
            raise FtlabError(f"{path}, line 1: a column name comes twice: {', '.join(header)}")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise FtlabError(f"{path}, line {reader.line_num}: {len(cells)} cells, the header has {len(header)}")
            # A cell that is empty says nothing, except that a record has none of the labels.
            named = zip(header, cells, strict=True)
            yield reader.line_num, {k: v for k, v in named if v.strip() or k in needed}
    except csv.Error as error:
        raise FtlabError(f"{path}, line {reader.line_num}: not CSV: {error}") from None


def parse_labelled(row: Any, config: LabelledDataConfig, default_id: str, *, in_table: bool) -> Record:
    """One row as a record. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError("(row)", f"expected {config.text_field} and {config.label_field} in an object, got {kind(row)}")
    text = text_of(row, config.text_field, "")
    pair = None if row.get(config.pair_field) is None else text_of(row, config.pair_field, "")
    label = label_of(row, config, in_table)
    return labelled_record(id_of(row, "id") or default_id, text, pair, label, id_of(row, "group"))


def label_of(row: Mapping[str, Any], config: LabelledDataConfig, in_table: bool) -> Label:
    """The label as data.labels wants it."""
    field, value = config.label_field, row.get(config.label_field)
    if value is None:
        raise RowError(field, "is missing")
    if config.labels == "regression":
        return number_of(value, field, in_table)
    if config.labels == "multi":
        if in_table and isinstance(value, str):
            value = [part for part in value.split(config.separator) if part.strip()]
        if not isinstance(value, list):
            raise RowError(field, f"expected a list of labels (data.labels=multi), got {kind(value)}")
        return tuple(sorted({one_label(item, field) for item in value}))
    if isinstance(value, list | dict):
        raise RowError(field, f"expected one label, got {kind(value)}; data.labels=multi takes lists")
    return one_label(value, field)


def one_label(value: Any, field: str) -> str:
    """A label's name: a text, or the spelling of a whole number or of true and false."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise RowError(
            field, f"expected a text or a whole number, got {kind(value)}; data.labels=regression takes numbers"
        )
    if not value.strip():
        raise RowError(field, "is empty; expected a label")
    return value.strip()


def number_of(value: Any, field: str, in_table: bool) -> float:
    """A finite number."""
    try:
        number = float(value) if in_table or not isinstance(value, str | bool) else math.nan
    except (TypeError, ValueError, OverflowError):  # the last: an integer beyond every float
        number = math.nan
    if not math.isfinite(number):
        raise RowError(field, f"expected a finite number (data.labels=regression), got {reprlib.repr(value)}")
    return number
