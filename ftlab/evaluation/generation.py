"""Greedy answers to a list of records, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from ftlab.config import EvaluationConfig
from ftlab.data.records import Message, Record
from ftlab.errors import FtlabError
from ftlab.models.generation import generate
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.tokenizer import Tokenizer

__all__ = ["Prediction", "predict", "prompt_text"]


@dataclass(frozen=True)
class Prediction:
    """What a model answered to a record, next to what it should have answered."""

    id: str
    prompt: str
    reference: str
    prediction: str

    def as_dict(self) -> dict[str, Any]:
        """A line of predictions/*.jsonl."""
        return asdict(self)


def prompt_text(messages: Sequence[Message]) -> str:
    """The conversation before the answer as a person would read it; the system message is left out.

    A single message is its text; several are one `role: text` line each.
    """
    shown = [message for message in messages if message.role != "system"]
    if len(shown) == 1:
        return shown[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in shown)


def _share(order: Sequence[int], batch_size: int, rank: int, world: int) -> list[list[int]]:
    """The batches of one rank. Together the ranks have each index exactly once: none is repeated to even them out."""
    batches = [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    return batches[rank::world]


def predict(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    prompts: Mapping[str, Sequence[int]],
    config: EvaluationConfig,
    *,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Answer every record greedily, each exactly once over all ranks.

    Records of like prompt length are generated together, because the shorter prompts of a batch are padded to the
    longest. Longest first: a batch that does not fit in memory fails at once. With `world` > 1 every rank must call
    this with the same records; all of them get the whole result, and an error on one rank is raised on all, so that
    none waits for the others in vain.

    Args:
        model: the bare model, on the device it is to run on; the mode of its submodules is as before afterwards.
        prompts: for the id of each record the token ids to go on from (`Example.prompt_ids`, so that a prompt which
            was cut to data.max_length is the same here as under the loss).
        config: `generate_batch_size` (prompts generated together) and `max_new_tokens` are read.
        progress: called as progress(done, total) after each batch, in records of this rank.

    Returns:
        One prediction a record, in the order of `records`. `prediction` is the generated text up to the first stop
        token, without special tokens and otherwise untouched.
    """
    device = model.head_weight.device
    mine: dict[int, str] = {}
    failure: Exception | None = None
    try:
        asked = [prompts[record.id] for record in records]
        order = sorted(range(len(records)), key=lambda index: (-len(asked[index]), index))
        batches = _share(order, config.generate_batch_size, rank, world)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for batch in batches:
                mine.update(_answer(model, tokenizer, {index: asked[index] for index in batch}, config))
                if progress is not None:
                    progress(len(mine), sum(map(len, batches)))
    except Exception as error:
        if world == 1:
            raise
        failure = error
    texts = _gather(mine, failure, rank, world)
    return [
        Prediction(record.id, prompt_text(record.messages[:-1]), record.messages[-1].content, texts[index])
        for index, record in enumerate(records)
    ]


def _answer(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: Mapping[int, Sequence[int]], config: EvaluationConfig
) -> dict[int, str]:
    """Texts generated for one batch of prompts, under the prompts' own keys."""
    generated = generate(
        model,
        list(prompts.values()),
        max_new_tokens=config.max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
    )
    return {index: tokenizer.decode(ids) for index, ids in zip(prompts, generated, strict=True)}


def _gather(mine: dict[int, str], failure: Exception | None, rank: int, world: int) -> dict[int, str]:
    """The texts of all ranks on all ranks."""
    if world == 1:
        return mine
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    shares: list[tuple[dict[int, str], str | None]] = [({}, None)] * world
    dist.all_gather_object(shares, (mine, message))
    for other, (_, problem) in enumerate(shares):
        if problem is not None:
            raise FtlabError(f"generation failed on rank {other}: {problem}") from (failure if other == rank else None)
    return {index: text for share, _ in shares for index, text in share.items()}
