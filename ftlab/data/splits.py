"""Which records belong together, and which side they are on."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from ftlab.config import DataConfig
from ftlab.data.records import Record, Splits
from ftlab.errors import ConfigError, FtlabError

__all__ = ["connect_groups", "limit_splits", "normalize_phrase", "split_of", "split_records"]

NO_LETTER_OR_DIGIT = re.compile(r"[\W_]+")  # \w is str.isalnum and the underscore


def normalize_phrase(text: str) -> str:
    """Letters and digits in lower case with single spaces between; what two spellings of one phrase share.

    Text without any letter or digit is kept as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return NO_LETTER_OR_DIGIT.sub(" ", folded).strip() or folded.strip()


def connect_groups(keys: Sequence[Iterable[str]]) -> list[str]:
    """Join items that share a key, directly or through others: union-find over the keys.

    Args:
        keys: for each item the keys it has; at least one each.

    Returns:
        For each item the name of its component: the smallest key in it. Items without common keys do not influence
        one another's names, so adding records does not move others between splits.
    """
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        root = key
        while parent.setdefault(root, root) != root:
            root = parent[root]
        while parent[key] != root:
            parent[key], key = root, parent[key]
        return root

    firsts: list[str] = []
    for own in keys:
        first, *others = own
        firsts.append(first)
        root = find(first)
        for other in others:
            low, high = sorted((root, find(other)))  # the smaller key becomes the root
            parent[high] = low
            root = low
    return [find(first) for first in firsts]


def split_of(group: str, *, seed: int, validation_fraction: float, test_fraction: float) -> str:
    """The side of a group: a fixed function of its name and the seed, so it is the same on every machine.

    The group's hash is a number in [0, 1): the lowest `test_fraction` is test, the next `validation_fraction` is
    validation, the rest is train.
    """
    digest = hashlib.sha256(f"{seed}\0{group}".encode("utf-8", "surrogatepass")).digest()
    point = int.from_bytes(digest[:8], "big") / 2.0**64
    if point < test_fraction:
        return "test"
    return "validation" if point < test_fraction + validation_fraction else "train"


def split_records(
    records: Iterable[Record], config: DataConfig, *, validation: bool = True, test: bool = True
) -> Splits:
    """Divide records by the hash of their group; `validation` and `test` say which sides are split off."""
    validation_fraction = config.validation_fraction if validation else 0.0
    test_fraction = config.test_fraction if test else 0.0
    if validation_fraction + test_fraction >= 1:
        raise ConfigError(
            f"data.validation_fraction + data.test_fraction is {validation_fraction + test_fraction:g}: nothing is "
            "left to train on; their sum must be under 1"
        )
    splits = Splits([], [], [])
    for record in records:
        side = split_of(
            record.group,
            seed=config.split_seed,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
        )
        getattr(splits, side).append(record)
    wanted = {"train": 1.0, "validation": validation_fraction, "test": test_fraction}
    for side, fraction in wanted.items():
        if fraction > 0 and not getattr(splits, side):
            raise FtlabError(
                f"data {config.name}: no record falls into the {side} split; give more records, name a file for it, or "
                "change data.validation_fraction and data.test_fraction (0: no such split)"
            )
    return splits


def limit_splits(splits: Splits, config: DataConfig) -> Splits:
    """Apply `limit_*`: the first N after a shuffle that depends on each record's id alone.

    A smaller limit gives a subset of a larger one. Train keeps the source's order (it matters with shuffle=false);
    validation and test keep the shuffled order, so that their first N are a fair sample too.
    """

    def key(record: Record) -> bytes:
        return hashlib.sha256(f"{config.split_seed}\0{record.id}".encode("utf-8", "surrogatepass")).digest()

    train = splits.train
    if config.limit_train is not None and config.limit_train < len(train):
        kept = {record.id for record in sorted(train, key=key)[: config.limit_train]}
        train = [record for record in train if record.id in kept]
    return Splits(
        train=train,
        validation=sorted(splits.validation, key=key)[: config.limit_validation],
        test=sorted(splits.test, key=key)[: config.limit_test],
    )
