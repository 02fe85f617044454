"""What a model will see of a source: tokens with their label flags, counts and lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from ftlab.config import DataConfig, LabelledDataConfig
from ftlab.data.labelled import LabelledRecord, encode_labelled
from ftlab.data.records import Record
from ftlab.data.templates import ChatTemplate
from ftlab.data.tokenization import Example, encode_all
from ftlab.models.labels import LabelSet, label_text
from ftlab.models.tokenizer import Tokenizer

__all__ = ["histogram", "inspect_labelled", "inspect_records", "token_lines", "token_text"]

BAR_WIDTH = 40
UNBOUNDED = 1 << 60


def spelling(tokenizer: Tokenizer, id: int) -> str:
    """One token as readable text; the vocabulary's own spelling if it is a part of a character."""
    text = tokenizer.decode([id], skip_special=False)
    return tokenizer.token(id) if "\ufffd" in text or not text else text


def token_lines(example: Example, tokenizer: Tokenizer) -> Iterator[str]:
    """One line a token: position, id, `learnt` or a dash, and its text as a Python literal."""
    for position, (id, learnt) in enumerate(zip(example.token_ids, example.supervised, strict=True)):
        yield f"{position:5d} {id:7d}  {'learnt' if learnt else '-':6s}  {spelling(tokenizer, id)!r}"


def token_text(example: Example, tokenizer: Tokenizer) -> Text:
    """The tokens side by side for a terminal: learnt ones green, the others dim, every second one underlined."""
    text = Text()
    for position, (id, learnt) in enumerate(zip(example.token_ids, example.supervised, strict=True)):
        colour = "bold green" if learnt else "dim"
        shown = spelling(tokenizer, id).replace("\n", "⏎\n")
        text.append(shown, style=f"{colour} underline" if position % 2 else colour)
    return text


def histogram(lengths: Sequence[int], bins: int = 8) -> list[str]:
    """Lines with a range of lengths, how many fall into it, and a bar."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * -(-(high - low + 1) // width)
    for length in lengths:
        counts[(length - low) // width] += 1
    lines = []
    for number, count in enumerate(counts):
        start = low + number * width
        bar = "#" * -(-BAR_WIDTH * count // max(counts))
        lines.append(f"{start:7d} - {start + width - 1:<7d} {count:7d}  {bar}")
    return lines


def inspect_records(
    records: Sequence[Record], template: ChatTemplate, config: DataConfig, shown: int, console: Console
) -> None:
    """Print the first `shown` records token by token, then counts, lengths and how many are over `max_length`.

    Raises FtlabError, with the id, for the first record that could not be trained on for another reason than length.
    """
    tokenizer = template.tokenizer
    whole = replace(config, max_length=UNBOUNDED)
    examples = encode_all(records, template, tokenizer, whole)
    for example in examples[:shown]:
        learnt = sum(example.supervised)
        console.print(f"{example.id}: {len(example.token_ids)} tokens, {learnt} learnt", markup=False, highlight=False)
        if console.is_terminal:
            console.print(token_text(example, tokenizer))
        else:
            for line in token_lines(example, tokenizer):
                console.out(line, highlight=False)
    lengths = [len(example.token_ids) for example in examples]
    total, learnt = sum(lengths), sum(sum(example.supervised) for example in examples)
    over = sum(length > config.max_length for length in lengths)
    for line in (
        f"{len(examples)} records, {total} tokens, {learnt} learnt ({100 * learnt / total:.1f} %)",
        f"tokens a record: {min(lengths)} to {max(lengths)}, on average {total / len(lengths):.1f}",
        *histogram(lengths),
        f"over max_length={config.max_length}: {over}",
    ):
        console.out(line, highlight=False)


def inspect_labelled(
    records: Sequence[Record], tokenizer: Tokenizer, config: LabelledDataConfig, shown: int, console: Console
) -> None:
    """Print the first `shown` texts with their labels, then how often each label occurs, and lengths."""
    texts = [record for record in records if isinstance(record, LabelledRecord)]
    labels = LabelSet.of(config.labels, [record.label for record in texts])
    examples = encode_labelled(texts, labels, tokenizer, replace(config, max_length=UNBOUNDED))
    for record, example in zip(texts[:shown], examples, strict=False):
        text = record.messages[0].content
        console.out(f"{record.id}: {len(example.token_ids)} tokens, {record.reference}: {text!r}", highlight=False)
    count = Counter(name for record in texts for name in names_of(record))
    lengths = [len(example.token_ids) for example in examples]
    over = sum(length > config.max_length for length in lengths)
    for line in (
        f"{len(examples)} texts, {sum(lengths)} tokens, {len(labels.names) or 'no'} labels ({config.labels})",
        *(f"{number:7d}  {name}" for name, number in count.most_common()),
        f"tokens a text: {min(lengths)} to {max(lengths)}, on average {sum(lengths) / len(lengths):.1f}",
        *histogram(lengths),
        f"over max_length={config.max_length}: {over}",
    ):
        console.out(line, highlight=False)


def names_of(record: LabelledRecord) -> tuple[str, ...]:
    """The names of a record's labels; of a number none."""
    if isinstance(record.label, tuple):
        return record.label or (label_text(()),)
    return (record.label,) if isinstance(record.label, str) else ()
