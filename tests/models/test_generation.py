from __future__ import annotations

import pytest
import torch
from torch import nn

from ftlab.models.generation import generate
from ftlab.models.llama import LlamaForCausalLM
from tests.helpers.models import tiny_llama

PROMPTS = [[3, 7, 11, 200, 9], [42], [5, 5, 5, 8], [100, 101, 102, 103, 104, 105, 106, 107], [9, 8], [1]]


def by_hand(model: LlamaForCausalLM, prompt: list[int], count: int, stop_ids: set[int]) -> list[int]:
    """One token at a time, no padding, no cache."""
    ids = list(prompt)
    while len(ids) - len(prompt) < count:
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def stops_of(model: LlamaForCausalLM) -> set[int]:
    """Ids that end some rows early and others late: the token some rows reach after a few steps."""
    plain = [by_hand(model, prompt, 12, set()) for prompt in PROMPTS]
    return {plain[0][2], plain[1][5], plain[3][0]}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_equals_one_prompt_at_a_time_by_hand(tied: bool, use_cache: bool) -> None:
    model = tiny_llama(seed=4, tie_word_embeddings=tied, initializer_range=0.4)
    stop_ids = stops_of(model)
    expected = [by_hand(model, prompt, 12, stop_ids) for prompt in PROMPTS]
    assert len({len(ids) for ids in expected}) >= 3, "the rows should end at different steps"
    options = {"max_new_tokens": 12, "stop_ids": stop_ids, "use_cache": use_cache}
    assert generate(model, PROMPTS, pad_id=0, **options) == expected
    assert generate(model, PROMPTS, pad_id=258, **options) == expected  # padding is by position, not by id
    assert [generate(model, [prompt], pad_id=0, **options)[0] for prompt in PROMPTS] == expected
    assert generate(model, PROMPTS[::-1], pad_id=0, **options) == expected[::-1]


def test_padding_without_positions_from_the_mask_would_differ() -> None:
    """The broken variant: a left-padded row whose positions count its padding."""
    model = tiny_llama(seed=4)
    padded = torch.tensor([[0, 0, 0, *PROMPTS[0]]])
    mask = torch.tensor([[False] * 3 + [True] * 5])
    right = model(padded, mask_BS=mask)[0, -1]
    torch.testing.assert_close(right, model(torch.tensor([PROMPTS[0]]))[0, -1])
    gapped = torch.tensor([[0, 0, 0, 0, 2, 4, 6, 8]])
    assert not torch.allclose(model(padded, gapped, mask_BS=mask)[0, -1], right, atol=1e-3)
    assert not torch.allclose(model(padded)[0, -1], right, atol=1e-3)


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(seed=4, initializer_range=0.4)
    stop_ids = stops_of(model)
    rows = []
    real = LlamaForCausalLM.hidden_states

    def spy(self: LlamaForCausalLM, ids: torch.Tensor, **options: object) -> torch.Tensor:
        rows.append(ids.shape[0])
        return real(self, ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "hidden_states", spy)
    generate(model, PROMPTS, max_new_tokens=12, stop_ids=stop_ids, pad_id=0)
    assert rows[0] == 6
    assert rows[-1] < 4
    assert rows == sorted(rows, reverse=True)


def test_train_mode_comes_back_for_each_submodule() -> None:
    model = tiny_llama()
    for block in model.blocks:
        block.mlp.down_proj = nn.Sequential(block.mlp.down_proj, nn.Dropout(0.9))
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    a, b = (generate(model, PROMPTS, max_new_tokens=4, stop_ids=(), pad_id=0) for _ in range(2))
    assert a == b  # dropout is off inside
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes
    with pytest.raises(IndexError):
        generate(model, [[10_000]], max_new_tokens=4, stop_ids=(), pad_id=0)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())


def test_runs_under_the_callers_autocast() -> None:
    model = tiny_llama(seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        cached = generate(model, PROMPTS, max_new_tokens=6, stop_ids=(), pad_id=0)
    assert [len(ids) for ids in cached] == [6] * len(PROMPTS)


def test_edges() -> None:
    model = tiny_llama()
    assert generate(model, [], max_new_tokens=4, stop_ids=(), pad_id=0) == []
    assert generate(model, [[1], [2]], max_new_tokens=0, stop_ids=(), pad_id=0) == [[], []]
    assert len(generate(model, [[1]], max_new_tokens=1, stop_ids=(), pad_id=0)[0]) == 1
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(model, [[1], []], max_new_tokens=4, stop_ids=(), pad_id=0)
