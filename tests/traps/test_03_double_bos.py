"""Exactly one BOS in what is trained on, and a model is asked exactly as it was trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlab.data.records import Message, Record
from ftlab.data.templates import ChatTemplate
from ftlab.data.tokenization import encode
from ftlab.errors import FtlabError
from ftlab.models.tokenizer import Tokenizer
from tests.data.tokenizers_for_tests import merging_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECORD = Record("r", (Message("user", "<s>q"), Message("assistant", "a")))


def template_of(source: str, tmp_path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    path = tmp_path / "template.jinja"
    path.write_text(source)
    return ChatTemplate.load(str(path), tokenizer)


def ids_of(template: ChatTemplate) -> list[int]:
    example = encode(RECORD, template, template.tokenizer, 1000, "error")
    assert example is not None
    return list(example.token_ids)


def check(ids: list[int], expected: int, tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id is not None
    assert ids.count(tokenizer.bos_id) == expected
    assert expected == 0 or ids[0] == tokenizer.bos_id


@pytest.mark.parametrize(("source", "expected"), [("{{ bos_token }}" + CHATML, 1), (CHATML, 0)])
def test_one_bos_if_the_template_writes_one(source: str, expected: int, tmp_path: Path) -> None:
    tokenizer = merging_tokenizer()
    template = template_of(source, tmp_path, tokenizer)
    ids = ids_of(template)
    check(ids, expected, tokenizer)  # the user's own "<s>" is text
    prompt = template.prompt_ids(RECORD.messages)
    assert ids[: len(prompt)] == prompt


def test_the_broken_ways_fail_the_same_check(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer()
    ids = ids_of(template_of("{{ bos_token }}" + CHATML, tmp_path, tokenizer))
    with pytest.raises(AssertionError):
        check([tokenizer.bos_id or 0, *ids], 1, tokenizer)  # a tokenizer that adds its own
    with pytest.raises(AssertionError):
        check(ids[1:], 1, tokenizer)  # a fix that takes too much away


def test_a_template_that_writes_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FtlabError, match=r"^r: .*begins with two BOS tokens"):
        ids_of(template_of("{{ bos_token }}<s>" + CHATML, tmp_path, merging_tokenizer()))
