"""Commands to a smart home and their intent, made from the sentence templates of Home Assistant.

A file of the package home-assistant-intents has the templates of one language. From each up to PER_TEMPLATE different
sentences are drawn, by a hash of the template and a number. Rooms, names of devices and free text, which Home Assistant
knows from the user's home, come from a table of ftlab's. Sentences of one template are one group, and so are templates
with a sentence in common (but for case and punctuation). Of equal sentences one stays; if they have two intents, none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ftlab.assets import resolve
from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import labelled_record
from ftlab.data.records import Record, SourceInfo, Splits
from ftlab.data.sources.files import decode_utf8, parse_json
from ftlab.data.sources.home_words import LISTS, NAMES
from ftlab.data.sources.published import Published, pinned_location
from ftlab.data.sources.sentence_templates import Choice, Draw, Node, draw_sentence, parse_template
from ftlab.data.splits import connect_groups, normalize_phrase
from ftlab.errors import FtlabError

__all__ = [
    "SOURCE",
    "load_home_intents",
    "read_home_intents",
    "template_sentences",
]

PACKAGE = "pypi:home-assistant-intents==2026.10.27/home_assistant_intents/data"
ENGLISH = "0b9d606a216b1712409a3d822a8edfb9ff4458e51e421792882ea24e0ce1d456"
CHINESE = "aaf4fcca09b3878b56652396275ea69e0d0f44508e06378434538a7a2c0c7054"
SOURCE = Published(
    title="Home Assistant intents: command to intent (English or Chinese)",
    about="Commands to a smart home with their intent, drawn from the sentence templates of Home Assistant: 4,271 in "
    "English, 3,273 in Chinese.",
    licence="CC-BY-4.0 (the templates, https://github.com/OHF-Voice/intents); the package home-assistant-intents that "
    "carries them is Apache-2.0.",
    citation="Home Assistant Intents, release 2026.10.27, the Home Assistant authors",
    version="2026.10.27",
    url="https://github.com/OHF-Voice/intents",
    locations={
        "home_intents": pinned_location(f"{PACKAGE}/en.json", ENGLISH),
        "home_intents_zh": pinned_location(f"{PACKAGE}/zh-CN.json", CHINESE),
    },
    records={ENGLISH: 4271, CHINESE: 3273},
)
PER_TEMPLATE = 5
TRIES = 8  # draws for each sentence that is wanted, before a template counts as having no more
Kind = TypeVar("Kind")


@dataclass
class _Sentence:
    """A sentence, and every intent and template that it was drawn for."""

    text: str
    intents: set[str] = field(default_factory=set)
    templates: list[str] = field(default_factory=list)


def read_home_intents(path: Path) -> tuple[list[Record], int]:
    """The records in the file's order, and how many sentences two intents have. Errors: FtlabError with the place."""
    content = parse_json(decode_utf8(path), str(path))
    try:
        sentences = _sentences(content)
    except FtlabError as error:
        raise FtlabError(f"{path}: {error}") from None
    groups = connect_groups([sentence.templates for sentence in sentences])
    records: list[Record] = []
    number: Counter[str] = Counter()
    for sentence, group in zip(sentences, groups, strict=True):
        if len(sentence.intents) == 1:
            (intent,) = sentence.intents
            number[intent] += 1
            records.append(labelled_record(f"{intent}:{number[intent]}", sentence.text, None, intent, group))
    return records, len(sentences) - len(records)


def template_sentences(template: str, named: Mapping[str, Node], apart: str = " ") -> list[str]:
    """Up to PER_TEMPLATE sentences that differ in more than case and punctuation, with `apart` between words."""
    node = parse_template(template)
    found: dict[str, str] = {}
    for number in range(PER_TEMPLATE * TRIES):
        try:
            text = draw_sentence(node, named, Draw(f"{template}\0{number}"))
        except FtlabError as error:
            raise FtlabError(f"template {template!r}: {error}") from None
        text = apart.join(text.split())
        if text:
            found.setdefault(normalize_phrase(text), text)
        if len(found) == PER_TEMPLATE:
            break
    return list(found.values())


# --- the file --------------------------------------------------------------------------------------------------------


def _sentences(content: Any) -> list[_Sentence]:
    """The different sentences of all templates."""
    language = _member(content, "language", str, "the file")
    if language not in LISTS:
        raise FtlabError(f"there are no words for a home in the language {language}; choose from {', '.join(LISTS)}")
    apart = "" if (content.get("settings") or {}).get("ignore_whitespace") else " "
    named = _named(content, language)
    found: dict[str, _Sentence] = {}
    for intent, template, domains in _templates(content):
        names = [name for domain in domains for name in NAMES[language].get(domain, "").split(", ") if name]
        known = {**named, "{name}": Choice(tuple(dict.fromkeys(names)))} if names else named
        for text in template_sentences(template, known, apart):
            sentence = found.setdefault(normalize_phrase(text), _Sentence(text))
            sentence.intents.add(intent)
            sentence.templates.append(template)
    if not found:
        raise FtlabError("no sentence; expected intents with data with sentences")
    return list(found.values())


def _templates(content: Any) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Intent, template, and the kinds of device that its {name} may be; all kinds where the file says nothing of it."""
    for intent, entry in _member(content, "intents", dict, "the file").items():
        for block in _member(entry, "data", list, intent):
            templates = _member(block, "sentences", list, intent)
            said = [block.get(key) or {} for key in ("requires_context", "slots")]
            domains = next((part["domain"] for part in said if "domain" in part), list(NAMES["en"]))
            domains = domains.get("value", []) if isinstance(domains, dict) else domains
            for template in templates:
                yield intent, template, [domains] if isinstance(domains, str) else domains


def _named(content: Any, language: str) -> dict[str, Node]:
    """Rules and lists by name, with their brackets."""
    named: dict[str, Node] = {f"{{{name}}}": Choice(tuple(text.split(", "))) for name, text in LISTS[language].items()}
    for name, template in _member(content, "expansion_rules", dict, "the file").items():
        named[f"<{name}>"] = parse_template(template)
    for name, entry in _member(content, "lists", dict, "the file").items():
        if "values" in entry:
            values = _member(entry, "values", list, name)
            texts = [_member(value, "in", str, name) if isinstance(value, dict) else str(value) for value in values]
            named[f"{{{name}}}"] = Choice(tuple(parse_template(text) for text in texts))
        elif "range" in entry:
            ends = _member(entry, "range", dict, name)
            numbers = range(_member(ends, "from", int, name), _member(ends, "to", int, name) + 1, ends.get("step", 1))
            named[f"{{{name}}}"] = Choice(tuple(str(number) for number in numbers))
    return named


def _member(holder: Any, key: str, kind: type[Kind], where: str) -> Kind:
    """A member of a JSON object, of the kind that it must have."""
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, kind):
        raise FtlabError(f"{where}: expected {key}, a {kind.__name__}")
    return value


# --- the source ------------------------------------------------------------------------------------------------------


def load_home_intents(config: LabelledDataConfig) -> tuple[Splits, SourceInfo]:
    """Fetch, draw and split. Errors: FtlabError if a pinned file gives another number of records."""
    records, shared = read_home_intents(resolve(config.train))
    return SOURCE.split(config, records, {f"{shared} sentences that two intents have were left out": shared})
