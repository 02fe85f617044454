"""Records to examples: token ids and a label flag for each."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ftlab.config import DataConfig
from ftlab.data.records import Record
from ftlab.data.templates import ChatTemplate
from ftlab.errors import ConfigError, FtlabError
from ftlab.models.tokenizer import Tokenizer

__all__ = ["Example", "encode", "encode_all"]


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised conversation.

    supervised[i] says whether token i is learnt, that is, predicted from the tokens before it: a flag by position, so
    it holds whatever ids pad, end a text or occur twice. The first token is never learnt: nothing precedes it.
    `truncated`: the beginning, or the end of a labelled text, was cut off to fit.
    """

    id: str
    token_ids: Sequence[int]
    supervised: Sequence[bool]
    truncated: bool = False

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The tokens before the last answer: what a model is asked to give it. Cut where the example was cut."""
        return self.token_ids[: last_answer(self.supervised)]

    @property
    def num_supervised(self) -> int:
        """How many decisions are learnt."""
        return sum(self.supervised)

    @property
    def content(self) -> tuple[object, ...]:
        """Everything that training depends on."""
        return (self.id, self.token_ids, self.supervised)


def last_answer(supervised: Sequence[bool]) -> int:
    """Where the run of label flags at the end begins."""
    start = len(supervised)
    while start > 0 and supervised[start - 1]:
        start -= 1
    return start


def encode(
    record: Record, template: ChatTemplate, tokenizer: Tokenizer, max_length: int, too_long: str
) -> Example | None:
    """Tokenise one record. Every assistant turn is supervised, with the token that ends it.

    What the template writes after the last supervised token is left out: no loss depends on it.

    Args:
        tokenizer: the one that `template` was loaded with.
        max_length: longest example in tokens.
        too_long: what to do with a longer one. ``error`` raises; ``drop`` returns None; ``truncate`` takes tokens away
            from its beginning (a BOS token stays), never from the last answer; a labelled text instead loses its end,
            so that its instruction stays. If even that answer with one token before it is too long, ``truncate``
            raises too.

    Raises:
        FtlabError: with the record's id; also if no token would be supervised.
    """
    if tokenizer is not template.tokenizer:
        raise ConfigError("the chat template was loaded with another tokenizer")
    try:
        ids, supervised = template.token_ids(template.segments(record.messages))
    except FtlabError as error:
        raise FtlabError(f"{record.id}: {error}") from None
    if True not in supervised[1:]:
        raise FtlabError(f"{record.id}: no token would be supervised: the answer is empty once the template wrote it")
    end = len(supervised)
    while not supervised[end - 1]:
        end -= 1
    ids, supervised = ids[:end], supervised[:end]
    if end <= max_length:
        return Example(record.id, ids, supervised)
    if too_long == "drop":
        return None
    if too_long == "error":
        raise FtlabError(
            f"{record.id}: {end} tokens, over data.max_length={max_length}; raise it, or set data.too_long to drop or "
            "truncate"
        )
    shorter = record.shortened(functools.partial(_without_end, tokenizer=tokenizer, tokens=end - max_length))
    if shorter is not None:
        # Tokens join anew where the text now ends, so it may take another round; each one takes at least a token.
        again = encode(shorter, template, tokenizer, max_length, too_long)
        return None if again is None else replace(again, truncated=True)
    return truncated(Example(record.id, ids, supervised), tokenizer.bos_id, max_length)


def _without_end(text: str, *, tokenizer: Tokenizer, tokens: int) -> str:
    """A text without its last tokens, and without a character that they cut in two."""
    ids = tokenizer.encode(text)
    return tokenizer.decode(ids[: max(len(ids) - tokens, 0)]).rstrip("\ufffd")


def truncated(example: Example, bos_id: int | None, max_length: int) -> Example:
    """The last `max_length` tokens, with the first one kept if it is BOS."""
    ids, supervised = list(example.token_ids), list(example.supervised)
    head = 1 if ids[0] == bos_id else 0
    answer = last_answer(supervised)
    needed = len(ids) - answer + max(head, 1)
    if needed > max_length:
        raise FtlabError(
            f"{example.id}: the answer alone is {len(ids) - answer} tokens, over data.max_length={max_length}; an "
            "answer is never cut: raise it, or set data.too_long=drop"
        )
    start = len(ids) - (max_length - head)
    return Example(example.id, ids[:head] + ids[start:], supervised[:head] + supervised[start:], truncated=True)


def encode_all(
    records: Iterable[Record], template: ChatTemplate, tokenizer: Tokenizer, config: DataConfig
) -> list[Example]:
    """All records in order, without those that `too_long=drop` drops."""
    encoded = (encode(record, template, tokenizer, config.max_length, config.too_long) for record in records)
    return [example for example in encoded if example is not None]
