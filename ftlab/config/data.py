"""What it learns from (group `data`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from ftlab.config.options import REQUIRED, option

__all__ = [
    "DataConfig",
    "FilesDataConfig",
    "HPODataConfig",
    "LabelledDataConfig",
    "makes_classifier",
]

LABELLED_SOURCES = ("hpo_organ", "privacy_policy", "spam_assassin", "icd10_chapter", "home_intents")  # besides files


@dataclass
class DataConfig:
    """What every data option has: how records become tokens, rows and batches."""

    name: str = option("data", "label used in reports and run names")
    template: str = option("model", "chat template: model, chatml, plain, or the path of a jinja file")
    system: str | None = option(None, "system message put before each conversation that has none")
    max_length: int = option(512, "longest example in tokens, template included", low=8)
    too_long: str = option("error", "an example over max_length", choices=("error", "drop", "truncate"))
    packing: bool = option(True, "lay several examples end to end in one row; they never see one another")
    row_length: int = option(512, "tokens in a packed row", low=8)
    pad_rows: bool = option(False, "pad each row to row_length, so that all batches have one shape")
    pad_to_multiple: int = option(
        64, "without pad_rows: fill a batch to a multiple of this many tokens, for few shapes; 1: no padding", low=1
    )
    share_prefix: bool = option(
        False, "compute the tokens that all examples of a micro-batch begin with once (with dropout: under one mask)"
    )
    batch_size: int = option(8, "rows (packing) or examples in one optimizer step, over all ranks", low=1)
    micro_batch_size: int = option(8, "rows or examples in one forward pass on one rank", low=1)
    shuffle: bool = option(True, "a new order each epoch, fixed by (seed, epoch)")
    limit_train: int | None = option(None, "use only the first N training records (after a fixed shuffle)", low=1)
    limit_validation: int | None = option(None, "use only the first N validation records", low=1)
    limit_test: int | None = option(None, "use only the first N test records", low=1)
    split_seed: int = option(0, "part of the hash that sends each group of records to a split", low=0)
    validation_fraction: float = option(0.1, "share of the groups held out for validation", low=0, below=1)
    test_fraction: float = option(0.1, "share of the groups held out for test", low=0, below=1)


@dataclass
class HPODataConfig(DataConfig):
    """Pairs from the Human Phenotype Ontology."""

    location: str = option(REQUIRED, "location of hp.obo")
    task: str = option("lay_to_clinical", "which pairs", choices=("lay_to_clinical", "define"))


@dataclass
class FilesDataConfig(DataConfig):
    """The user's own JSONL or JSON files."""

    train: str = option(REQUIRED, "location of the training records")
    validation: str | None = option(None, "location of the validation records; null: split off the training records")
    test: str | None = option(None, "location of the test records; null: split off the training records")


@dataclass
class LabelledDataConfig(DataConfig):
    """Texts with a label, for a classifier or, with an instruction, for a language model."""

    packing: bool = option(False, "several in one row (with data.instruction; a classifier has one text a row)")
    pad_to_multiple: int = option(
        8, "pad the rows of a batch to a multiple of this many tokens; 1: to the longest", low=1
    )
    labels: str = option(
        "single", "one label a text, a list of labels, or a number", choices=("single", "multi", "regression")
    )
    source: str = option(
        "files", "where they come from: files of your own, or a published source", choices=("files", *LABELLED_SOURCES)
    )
    instruction: str | None = option(
        None, "null: a classifier with a head; a text: a conversation that begins with it and answers with the label"
    )
    train: str = option(REQUIRED, "location of the training records; of the published file for another source")
    validation: str | None = option(None, "location of the validation records; null: split off the training records")
    test: str | None = option(None, "location of the test records; null: split off the training records")
    text_field: str = option("text", "field or column of the text")
    pair_field: str = option("text_pair", "field or column of a second text, where there is one")
    label_field: str = option("label", "field or column of the label")
    separator: str = option("|", "between the labels of one CSV cell, for labels=multi")
    min_per_label: int = option(1, "labels with fewer records are left out, with their records", low=1)
    shots: int | None = option(
        None, "k-shot: train on this many texts of each label, and of those without one; null: on all", low=1
    )
    shots_seed: int = option(0, "which texts those are", low=0)


def makes_classifier(data: DataConfig) -> TypeGuard[LabelledDataConfig]:
    """Whether these data make a classifier; all others make a language model. Nothing else decides it."""
    return isinstance(data, LabelledDataConfig) and data.instruction is None
