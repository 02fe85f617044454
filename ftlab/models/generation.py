"""Greedy decoding of a batch of prompts.

Shapes: B rows, T query positions, S positions so far, padding included.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ftlab.models.llama import KVCache, LlamaForCausalLM

__all__ = ["evaluating", "generate"]

SHRINK_AT = 0.5  # finished rows leave the batch once at most this share of it is still running


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule has its own former mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids int64 [B, T], mask bool [B, T], True at real tokens)."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts])
    mask_BT = torch.arange(longest) >= longest - lengths_B1
    return ids_BT.to(device), mask_BT.to(device)


def generate(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
    use_cache: bool = True,
) -> list[list[int]]:
    """The most likely next token, again and again, for each prompt; returns the new ids without the stop token.

    Prompts are left-padded with `pad_id`, which may be any id: padding is known by position. A row ends at a token of
    `stop_ids` or after `max_new_tokens`. Runs in evaluation and inference mode, under the caller's autocast, and gives
    the train mode of every submodule back. An empty prompt raises ValueError.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty: greedy decoding needs at least one token to go on from")
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    device = model.model.embed_tokens.weight.device
    with evaluating(model), torch.inference_mode():
        ids_BS, mask_BS = left_pad(prompts, pad_id, device)
        capacity = ids_BS.shape[1] + max_new_tokens - 1  # the last new token is never fed back
        cache = KVCache(len(model.blocks), capacity) if use_cache else None
        return decode(model, ids_BS, mask_BS, cache, max_new_tokens, frozenset(stop_ids))


def decode(
    model: LlamaForCausalLM,
    ids_BS: Tensor,
    mask_BS: Tensor,
    cache: KVCache | None,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> list[list[int]]:
    """The loop of `generate`, on padded ids [B, S] and their mask."""
    padded = not bool(mask_BS.all())
    new_ids: list[list[int]] = [[] for _ in range(ids_BS.shape[0])]
    rows = list(range(ids_BS.shape[0]))  # which prompt each row of the batch belongs to
    running = set(rows)
    feed_BT = ids_BS
    for step in range(max_new_tokens):
        h_BTD = model.hidden_states(feed_BT, cache=cache, mask_BS=mask_BS if padded else None)
        next_B = model.logits(h_BTD[:, -1]).argmax(-1)
        for row, token in zip(rows, next_B.tolist(), strict=True):
            if row not in running:
                continue
            if token in stop_ids:
                running.remove(row)
            else:
                new_ids[row].append(token)
        if not running or step + 1 == max_new_tokens:
            break
        if len(running) <= SHRINK_AT * len(rows):
            keep = torch.tensor([place for place, row in enumerate(rows) if row in running], device=ids_BS.device)
            rows = [row for row in rows if row in running]
            ids_BS, mask_BS, next_B = ids_BS[keep], mask_BS[keep], next_B[keep]
            if cache is not None:
                cache.select(keep)
        mask_BS = torch.cat((mask_BS, mask_BS.new_ones(len(rows), 1)), 1)
        if cache is None:
            ids_BS = torch.cat((ids_BS, next_B[:, None]), 1)
        feed_BT = next_B[:, None] if cache is not None else ids_BS
    return new_ids
