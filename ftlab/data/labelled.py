"""Labelled texts: records, few shots of each label, tokens, and batches of padded rows.

Shapes: E texts of a batch, T positions, C labels.
"""

from __future__ import annotations

import hashlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ftlab.config import LabelledDataConfig
from ftlab.data.loader import Batch, Replay, RowLoader, collate_rows
from ftlab.data.records import Message, Record, SourceInfo, Splits
from ftlab.data.splits import limit_splits
from ftlab.data.tokenization import Example
from ftlab.errors import FtlabError
from ftlab.models.labels import Label, LabelSet, Target, label_text
from ftlab.models.tokenizer import Tokenizer

__all__ = [
    "LabelledBatch",
    "LabelledExample",
    "LabelledLoader",
    "LabelledRecord",
    "collate_labelled",
    "encode_labelled",
    "few_shots",
    "labelled_batches",
    "labelled_record",
    "load_labelled",
    "without_rare",
    "without_unlearnt",
]


@dataclass(frozen=True, slots=True)
class LabelledRecord(Record):
    """A text, perhaps with a second one, and its label. As a conversation the label is the answer."""

    text: str = ""
    pair: str | None = None
    label: Label = ""

    def shortened(self, shorten: Callable[[str], str]) -> LabelledRecord | None:
        """As a conversation the text loses its end, not the instruction before it or the second text after it."""
        *system, question, answer = self.messages
        after = "" if self.pair is None else f"\n{self.pair}"
        before = question.content.removesuffix(f"{self.text}{after}")
        text = shorten(self.text)
        if len(text) >= len(self.text):
            return None
        asked = Message(question.role, f"{before}{text}{after}")
        return replace(self, text=text, messages=(*system, asked, answer))


def without_unlearnt(splits: Splits) -> tuple[Splits, tuple[str, ...]]:
    """Validation and test without the labels that training lacks, and a remark: a label may have few groups."""
    known = {name for record in splits.train for name in names_of(record)}
    held_out = [*splits.validation, *splits.test]
    unlearnt = sorted({name for record in held_out for name in names_of(record)} - known)
    validation, test = ([r for r in side if names_of(r) <= known] for side in (splits.validation, splits.test))
    notes = (f"left out, as no record of them is in training: {', '.join(unlearnt)}",) if unlearnt else ()
    return Splits(splits.train, validation, test), notes


def labelled_record(id: str, text: str, pair: str | None, label: Label, group: str = "") -> LabelledRecord:
    """A record with its messages filled in."""
    prompt = text if pair is None else f"{text}\n{pair}"
    messages = (Message("user", prompt), Message("assistant", label_text(label)))
    return LabelledRecord(id, messages, group, text, pair, label)


def load_labelled(config: LabelledDataConfig) -> tuple[Splits, SourceInfo, LabelSet]:
    """Read, split, take few shots, and limit. The labels are those of all training records, before shots and limits."""
    # The sources build the types above, so one is imported when it is needed.
    name = "labelled_files" if config.source == "files" else config.source
    load = getattr(importlib.import_module(f"ftlab.data.sources.{name}"), f"load_{name}")
    splits: Splits
    info: SourceInfo
    splits, info = load(config)
    splits, notes = without_rare(splits, config.min_per_label)
    info = replace(info, notes=(*info.notes, *notes))
    labels = LabelSet.of(config.labels, [_labelled(record).label for record in splits.train])
    if config.shots is not None:
        chosen, notes = few_shots(splits.train, labels, config.shots, config.shots_seed)
        splits, info = replace(splits, train=chosen), replace(info, notes=(*info.notes, *notes))
    if config.instruction is not None:
        sides = (splits.train, splits.validation, splits.test)
        splits = Splits(*([_asked(record, config.instruction) for record in side] for side in sides))
    return limit_splits(splits, config), info, labels


def _asked(record: Record, instruction: str) -> Record:
    """The record as a conversation: the instruction, an empty line, its text or texts; the label is the answer."""
    question, answer = record.messages
    return replace(record, messages=(Message("user", f"{instruction}\n\n{question.content}"), answer))


def _labelled(record: Record) -> LabelledRecord:
    assert isinstance(record, LabelledRecord)
    return record


def names_of(record: Record) -> frozenset[str]:
    """The labels of a record, one or several."""
    label = _labelled(record).label
    return frozenset(label if isinstance(label, tuple) else [str(label)])


def without_rare(splits: Splits, minimum: int) -> tuple[Splits, tuple[str, ...]]:
    """The records without those that have a label of fewer than `minimum` records, and a remark about it."""
    if minimum == 1:
        return splits, ()
    sides = (splits.train, splits.validation, splits.test)
    count = Counter(name for side in sides for record in side for name in names_of(record))
    rare = {name for name, number in count.items() if number < minimum}
    kept = Splits(*([record for record in side if not names_of(record) & rare] for side in sides))
    listed = ", ".join(f"{name} ({count[name]})" for name in sorted(rare))
    return kept, (f"left out, with fewer than data.min_per_label={minimum} records: {listed}",) if rare else ()


def few_shots(
    records: Sequence[Record], labels: LabelSet, shots: int, seed: int
) -> tuple[list[Record], tuple[str, ...]]:
    """`shots` records of each label, drawn by a hash of seed and id, in their old order; and remarks.

    A record with several labels is taken while any of them lacks records, so that a frequent label may have more; those
    without any are one more kind. More shots with the same seed give a superset.
    """

    def key(record: Record) -> bytes:
        return hashlib.sha256(f"shots\0{seed}\0{record.id}".encode("utf-8", "surrogatepass")).digest()

    have: Counter[str | None] = Counter()  # None: no label
    chosen: set[str] = set()
    for record in sorted(records, key=key):
        own: frozenset[str | None] = names_of(record) or frozenset({None})
        if any(have[name] < shots for name in own):
            chosen.add(record.id)
            have.update(own)
    short = [f"{name} ({have[name]})" for name in labels.names if have[name] < shots]
    if 0 < have[None] < shots:
        short.append(f"{label_text(())} ({have[None]})")
    notes = (f"labels with fewer than data.shots={shots} training records: {', '.join(short)}",) if short else ()
    return [record for record in records if record.id in chosen], notes


# --- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LabelledExample(Example):
    """A tokenised text. No token is learnt; `target` is. `token_types` are 0 in the first text and 1 in the second."""

    token_types: Sequence[int] = ()
    target: Target = 0
    text: str = ""
    reference: str = ""

    @property
    def num_supervised(self) -> int:
        """One decision."""
        return 1

    @property
    def content(self) -> tuple[object, ...]:
        """Everything that training depends on."""
        return (self.id, self.token_ids, self.token_types, self.target)


def encode_labelled(
    records: Sequence[Record], labels: LabelSet, tokenizer: Tokenizer, config: LabelledDataConfig
) -> list[Example]:
    """[BOS] text EOS [pair EOS], as BERT has it with [CLS] for BOS and [SEP] for EOS; without the dropped ones.

    Errors: FtlabError with the record's id: a label that training does not have, and a text over data.max_length
    (data.too_long=error). With truncate the longer of two texts is cut from its end until both fit.
    """
    examples: list[Example] = []
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for record in records:
        labelled = _labelled(record)
        first = tokenizer.encode(labelled.text)
        second = None if labelled.pair is None else tokenizer.encode(labelled.pair)
        room = config.max_length - len(start) - (1 if second is None else 2)
        over = len(first) + len(second or ()) - room
        if over > 0 and config.too_long == "drop":
            continue
        if over > 0 and config.too_long == "error":
            raise FtlabError(
                f"{record.id}: {over + config.max_length} tokens, over data.max_length={config.max_length}; raise it, "
                "or set data.too_long to drop or truncate"
            )
        if over > 0:
            first, second = _cut(first, second, room)
        ids = [*start, *first, tokenizer.eos_id]
        types = [0] * len(ids)
        if second is not None:
            ids += [*second, tokenizer.eos_id]
            types += [1] * (len(second) + 1)
        target = labels.target(labelled.label, record.id)
        text = labelled.messages[0].content
        unlearnt = [False] * len(ids)
        examples.append(
            LabelledExample(record.id, ids, unlearnt, over > 0, types, target, text, label_text(labelled.label))
        )
    return examples


def _cut(first: list[int], second: list[int] | None, room: int) -> tuple[list[int], list[int] | None]:
    """Both together no longer than `room`; the longer one loses first, in a tie the second."""
    if second is None:
        return first[:room], None
    shorter = min(len(first), len(second))
    if shorter <= room // 2:
        keep = room - shorter
        return (first[:keep], second) if len(first) > len(second) else (first, second[:keep])
    return first[: room - room // 2], second[: room // 2]


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """Rows of one text each, padded on the right.

    input_ids: int64 [E, T]. mask: bool [E, T], True at real tokens. token_types: int64 [E, T].
    labels: what each text is learnt as: int64 [E], or fp32 [E, C] (multi) or [E] (regression); [0, ...] for nothing.
    """

    mask: Tensor = None  # type: ignore[assignment]  # dataclasses want a default after none; collate gives it
    token_types: Tensor = None  # type: ignore[assignment]  # as mask

    def unsupervised(self) -> LabelledBatch:
        """The same texts with nothing to learn."""
        return replace(self, labels=self.labels[:0], num_supervised=0, num_tokens=0)


def collate_labelled(
    examples: Sequence[Example], labels: LabelSet, pad_id: int, multiple: int = 1, row_length: int | None = None
) -> LabelledBatch:
    """One row a text, as long as the longest rounded up to `multiple`, or `row_length`."""
    chosen = [example for example in examples if isinstance(example, LabelledExample)]
    assert len(chosen) == len(examples)
    longest = max(len(example.token_ids) for example in chosen)
    width = -(-longest // multiple) * multiple if row_length is None else row_length
    plain = collate_rows([[example] for example in chosen], pad_id, width)
    mask = torch.arange(width)[None] < torch.tensor([len(example.token_ids) for example in chosen])[:, None]
    types = torch.zeros_like(plain.input_ids)
    types[mask] = torch.tensor([kind for example in chosen for kind in example.token_types])
    dtype = torch.int64 if labels.kind == "single" else torch.float32
    targets = torch.tensor([example.target for example in chosen], dtype=dtype)
    own: dict[str, Any] = {item.name: getattr(plain, item.name) for item in fields(plain)}
    own |= {"labels": targets, "num_supervised": len(chosen)}
    return LabelledBatch(**own, mask=mask, token_types=types)


class LabelledLoader(RowLoader):
    """The training rows of a classifier."""

    def __init__(
        self,
        examples: Sequence[Example],
        config: LabelledDataConfig,
        seed: int,
        pad_id: int,
        labels: LabelSet,
        replay: Replay | None = None,
    ) -> None:
        super().__init__(examples, config, seed, pad_id, replay)
        self.labels = labels

    def collate(self, rows: Sequence[Sequence[int]], most_shared: int | None = None) -> LabelledBatch:
        """A micro-batch of rows; nothing is shared between texts."""
        chosen = [self.examples[index] for row in rows for index in row]
        length = self.config.row_length if self.config.pad_rows else None
        return collate_labelled(chosen, self.labels, self.pad_id, self.config.pad_to_multiple, length)


def labelled_batches(
    examples: Sequence[Example],
    labels: LabelSet,
    batch_size: int,
    pad_id: int,
    multiple: int = 8,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[list[int], LabelledBatch]]:
    """Batches of one rank with the places of their texts; over all ranks each text comes exactly once.

    Texts of like length are together, so that little is padded.
    """
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].token_ids))[rank::world]
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        yield places, collate_labelled([examples[index] for index in places], labels, pad_id, multiple)
