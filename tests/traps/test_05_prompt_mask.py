"""The learnt text is the assistant's, byte for byte, whatever the tokenizer would merge; no example is without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.data.records import Message, Record
from ftlab.data.templates import ChatTemplate
from ftlab.data.tokenization import Example, encode
from ftlab.errors import FtlabError
from tests.data.tokenizers_for_tests import merging_tokenizer

TOKENIZER = merging_tokenizer()
TEMPLATE = ChatTemplate.load("chatml", TOKENIZER)
Encode = Callable[[Record], Example]
# Begins with a newline: the tokenizer merges it with the newline that the template writes before the answer.
MERGED = Record("merged", (Message("user", "q"), Message("assistant", "\nab")))


def record_of(question: str, answer: str) -> Record:
    return Record("r", (Message("user", question), Message("assistant", answer)))


def ours(record: Record) -> Example:
    example = encode(record, TEMPLATE, TOKENIZER, 10**6, "error")
    assert example is not None
    return example


def by_prompt_length(record: Record) -> Example:
    """The broken variant: tokenise the whole text and mask as many tokens as the prompt has alone."""
    whole = TOKENIZER.encode(TEMPLATE.render(record.messages).rstrip("\n"), allow_special=True)
    prompt = TEMPLATE.render(record.messages[:-1], add_generation_prompt=True)
    masked = len(TOKENIZER.encode(prompt, allow_special=True))
    return Example(record.id, whole, [index >= masked for index in range(len(whole))])


def everything(record: Record) -> Example:
    """The broken variant: a template without generation marks, every token learnt."""
    ids = ours(record).token_ids
    return Example(record.id, ids, [True] * len(ids))


def check(encode_record: Encode, record: Record) -> None:
    example = encode_record(record)
    learnt = [id for id, flag in zip(example.token_ids, example.supervised, strict=True) if flag]
    assert TOKENIZER.decode(learnt, skip_special=False) == record.reference + "<|im_end|>"


@given(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8) | st.sampled_from(["\n", "\n\nab", " :  "]))
@settings(max_examples=80, deadline=None)
def test_learnt_text_is_the_answer(question: str, answer: str) -> None:
    check(ours, record_of(question, answer))


def test_the_broken_masks_fail_the_same_check() -> None:
    check(ours, MERGED)
    check(by_prompt_length, record_of("q", "ab"))  # where nothing merges over the edge, it looks right
    with pytest.raises(AssertionError):
        check(by_prompt_length, MERGED)
    with pytest.raises(AssertionError):
        check(everything, MERGED)


def test_truncation_never_takes_the_answer() -> None:
    record = record_of("a long question " * 4, "ab")
    cut = encode(record, TEMPLATE, TOKENIZER, 24, "truncate")
    assert cut is not None
    check(lambda _: cut, record)

    whole = ours(record)
    labels = [id if flag else -100 for id, flag in zip(whole.token_ids, whole.supervised, strict=True)][:24]
    assert set(labels) == {-100}  # cut from the other end nothing is left to learn, and the mean over nothing is NaN
    logits = torch.zeros(24, TOKENIZER.vocab_size)
    assert F.cross_entropy(logits, torch.tensor(labels)).isnan()


def test_an_example_without_a_label_raises_with_its_id() -> None:
    bare = ChatTemplate("bare", "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", TOKENIZER)
    empty = Record("case-17", (Message("assistant", ""),))  # one token, with nothing before it to predict it from
    with pytest.raises(FtlabError, match="case-17: no token would be supervised"):
        encode(empty, bare, TOKENIZER, 100, "error")
    with pytest.raises(FtlabError, match="case-18: the answer alone is 3 tokens"):
        encode(Record("case-18", record_of("q", "xy").messages), TEMPLATE, TOKENIZER, 3, "truncate")
