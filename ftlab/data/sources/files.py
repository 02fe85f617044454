"""The user's own JSONL and JSON files.

A row is one conversation, in one of four forms::

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"human": "...", "ai": "..."}
    {"conversations": [{"human": "...", "ai": "..."}, ...]}      turns of one conversation, in order

with optional `system` (text; not with messages), `id` and `group` fields. A ``.json`` file is a list of rows, or an
object whose one list (`conversations`, `data`, `records`, `rows`, `examples` or `train`) holds rows. Every other file
is JSONL: one row a line, blank lines skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlab.assets import describe, resolve
from ftlab.config import FilesDataConfig
from ftlab.data.records import ROLES, Message, Record, SourceInfo, Splits
from ftlab.data.splits import connect_groups, normalize_phrase, split_records
from ftlab.errors import FtlabError
from ftlab.files import sha256_bytes

__all__ = ["load_files", "parse_row", "read_records"]

CONTAINERS = ("conversations", "data", "records", "rows", "examples", "train")
FORMS = "messages, prompt and completion, human and ai, or conversations"


class RowError(Exception):
    """A broken row: the field and what was expected there."""

    def __init__(self, field: str, expected: str) -> None:
        super().__init__(f"field {field}: {expected}")


def load_files(config: FilesDataConfig) -> tuple[Splits, SourceInfo]:
    """Records of the named files; sides without a file are split off the training records by group."""
    locations = {"train": config.train, "validation": config.validation, "test": config.test}
    named = {side: location for side, location in locations.items() if location is not None}
    seen: dict[str, str] = {}
    read = {side: read_records(resolve(location), side, seen) for side, location in named.items()}
    refuse_overlap(read, named)
    divided = split_records(
        grouped(read["train"]), config, validation="validation" not in read, test="test" not in read
    )
    splits = Splits(
        train=divided.train,
        validation=read.get("validation", divided.validation),
        test=read.get("test", divided.test),
    )
    hashes = {side: str(describe(location)["sha256"]) for side, location in named.items()}
    return splits, source_info(config.name, named, hashes)


def source_info(name: str, named: Mapping[str, str], hashes: Mapping[str, str]) -> SourceInfo:
    """What is known of the user's own files: location and hash of each side that has one."""
    combined = sha256_bytes(json.dumps(hashes, sort_keys=True).encode())
    return SourceInfo(
        name=name,
        title=", ".join(Path(location).name for location in named.values()),
        licence="not stated (your own files)",
        citation="",
        version=f"sha256 {combined[:12]}",
        url="",
        location=", ".join(named.values()),
        sha256=hashes["train"] if len(hashes) == 1 else combined,
    )


def leak_keys(record: Record) -> list[str]:
    """What must not be on two sides: the `group` field, and everything that an answer of this record was given to.

    Every assistant turn is learnt, so each beginning of the conversation that ends in a user's turn is a key: its
    normalised text without the system message.
    """
    keys = [f"group:{record.group}"] if record.group else []
    said: list[str] = []
    for message in record.messages:
        if message.role == "system":
            continue
        said.append(normalize_phrase(message.content))
        if message.role == "user":
            keys.append("prompt:" + "\n".join(said))
    return keys


def grouped(records: list[Record]) -> list[Record]:
    """Fill `group`: records with one `group` field or one prompt in common, directly or not, are together."""
    names = connect_groups([leak_keys(record) for record in records])
    return [Record(record.id, record.messages, name) for record, name in zip(records, names, strict=True)]


def refuse_overlap(read: Mapping[str, list[Record]], named: Mapping[str, str]) -> None:
    """Raise if two files that the user named for different sides have a prompt or a `group` in common."""
    sides: dict[str, tuple[str, str]] = {}
    for side, records in read.items():
        for record in records:
            for key in leak_keys(record):
                first_side, first_id = sides.setdefault(key, (side, record.id))
                if first_side != side:
                    raise FtlabError(
                        f"{named[side]}: {record.id} ({side}) has the same {key.partition(':')[0]} as {first_id} "
                        f"({first_side}): scores on it would be too good; remove it from one of the files"
                    )


def read_records(path: Path, side: str = "train", seen: dict[str, str] | None = None) -> list[Record]:
    """All records of one file, checked.

    Args:
        path: a ``.json`` or JSONL file in UTF-8; a byte order mark is ignored.
        side: prefix of the id of a record that has none: ``side:line``, or ``side:row`` in a ``.json`` file.
        seen: ids met so far and where; filled. An id that comes again is an error.

    Raises:
        FtlabError: names the file, the line and the field, and says what was expected.
    """
    seen = {} if seen is None else seen
    if path.is_dir():
        raise FtlabError(f"{path}: is a folder; name a JSONL or JSON file")
    text = decode_utf8(path)
    is_json = path.suffix.lower() == ".json"
    rows = json_rows(path, text) if is_json else jsonl_rows(path, text)
    records = []
    for number, row in rows:
        try:
            record = parse_row(row, f"{side}:{number}")
            if record.id in seen:
                raise RowError("id", f"{record.id!r} was used before, in {seen[record.id]}; ids must differ")
        except RowError as error:
            where = f"line {row_line(text, number)} (row {number})" if is_json else f"line {number}"
            raise FtlabError(f"{path}, {where}, {error}") from None
        seen[record.id] = f"{path}, {'row' if is_json else 'line'} {number}"
        records.append(record)
    if not records:
        raise FtlabError(f"{path}: holds no record; expected rows with {FORMS}")
    return records


def decode_utf8(path: Path) -> str:
    """The file's text; bytes that are not UTF-8 are named by line."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FtlabError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def parse_json(text: str, where: str) -> Any:
    """A JSON value; `where` opens the error message."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FtlabError(f"{where}: not JSON: {error}") from None


def jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank. Lines end at newlines only, not at U+2028."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number}")


def json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(row number, value) of each row of a JSON file: a list, or an object that holds one."""
    value = parse_json(text, str(path))
    if isinstance(value, dict):
        names = [name for name in CONTAINERS if isinstance(value.get(name), list)]
        value = value[names[0]] if len(names) == 1 else None
    if not isinstance(value, list):
        raise FtlabError(f"{path}: expected a list of rows, or an object with one list among {', '.join(CONTAINERS)}")
    return enumerate(value, start=1)


def row_line(text: str, number: int) -> int:
    """The line on which a row of a JSON file begins (the file is known to parse)."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[\s,]*")
    rows = re.search(r"\[", text) if text.lstrip().startswith("[") else container(text)
    if rows is None:
        return 1
    position = rows.end()
    for _ in range(number - 1):
        position = decoder.raw_decode(text, skip(space, text, position))[1]
    return text.count("\n", 0, skip(space, text, position)) + 1


def skip(space: re.Pattern[str], text: str, position: int) -> int:
    """The end of the white space and commas at `position`."""
    match = space.match(text, position)
    return match.end() if match else position


def container(text: str) -> re.Match[str] | None:
    """The opening bracket of the list of rows in a JSON object: the first that a container's name precedes."""
    return re.search(rf'"(?:{"|".join(CONTAINERS)})"\s*:\s*\[', text)


# --- one row -------------------------------------------------------------------------------------------------------


def parse_row(row: Any, default_id: str) -> Record:
    """One row as a record. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError("(row)", f"expected an object with {FORMS}, got {kind(row)}")
    fields = {name for name, value in row.items() if value is not None}
    if "messages" in fields:
        messages = parse_messages(row["messages"])
        if "system" in fields:
            raise RowError("system", "goes into messages, as a message with the role system")
    elif fields & {"prompt", "completion"}:
        messages = parse_pair(row, "prompt", "completion", "")
    elif "conversations" in fields:
        messages = parse_turns(row["conversations"])
    elif fields & {"human", "ai"}:
        messages = parse_pair(row, "human", "ai", "")
    else:
        raise RowError(", ".join(sorted(row)) or "(none)", f"expected {FORMS}")
    if "system" in fields:
        messages.insert(0, Message("system", text_of(row, "system", "")))
    check_order(messages)
    return Record(id_of(row, "id") or default_id, tuple(messages), id_of(row, "group"))


def kind(value: Any) -> str:
    """A JSON value's type in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def id_of(row: Mapping[str, Any], name: str) -> str:
    """An optional name: a text or a whole number; empty if there is none."""
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
        raise RowError(name, f"expected a text or a whole number, got {kind(value)}")
    return str(value)


def text_of(row: Mapping[str, Any], name: str, prefix: str) -> str:
    """A text field; white space alone counts as empty."""
    label = prefix + name
    if row.get(name) is None:
        raise RowError(label, "is missing; expected a text")
    value = row[name]
    if not isinstance(value, str):
        raise RowError(label, f"expected a text, got {kind(value)}")
    if not value.strip():
        raise RowError(label, "is empty; expected a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(label, "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    return value


def parse_pair(row: Mapping[str, Any], user: str, assistant: str, prefix: str) -> list[Message]:
    """A question and its answer."""
    return [Message("user", text_of(row, user, prefix)), Message("assistant", text_of(row, assistant, prefix))]


def parse_turns(value: Any) -> list[Message]:
    """The turns of one conversation, each with a human and an ai part."""
    if not isinstance(value, list) or not value:
        raise RowError("conversations", f"expected a list of objects with human and ai, got {kind(value)}")
    messages = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise RowError(f"conversations[{index}]", f"expected an object with human and ai, got {kind(turn)}")
        messages += parse_pair(turn, "human", "ai", f"conversations[{index}].")
    return messages


def parse_messages(value: Any) -> list[Message]:
    """A list of objects with role and content."""
    if not isinstance(value, list) or not value:
        raise RowError("messages", f"expected a list of objects with role and content, got {kind(value)}")
    messages = []
    for index, item in enumerate(value):
        label = f"messages[{index}]"
        if not isinstance(item, dict):
            raise RowError(label, f"expected an object with role and content, got {kind(item)}")
        role = text_of(item, "role", f"{label}.")
        if role not in ROLES:
            raise RowError(f"{label}.role", f"{role!r} is unknown; expected {', '.join(ROLES)}")
        messages.append(Message(role, text_of(item, "content", f"{label}.")))
    return messages


def check_order(messages: list[Message]) -> None:
    """[system,] then user and assistant in turn, the assistant last."""
    turns = messages[1:] if messages[0].role == "system" else messages
    offset = len(messages) - len(turns)
    for index, message in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if message.role != expected:
            raise RowError(f"messages[{index + offset}].role", f"expected {expected} here, got {message.role}")
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise RowError("messages", "the last message must be the assistant's: it is what is learnt")
