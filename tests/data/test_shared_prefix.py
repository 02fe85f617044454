"""data.share_prefix: the same loss and gradients with the common beginning computed once."""

from __future__ import annotations

import pytest
import torch

from ftlab.config import LoRAConfig
from ftlab.data.loader import IGNORE, Batch, collate_rows, common_prefix
from ftlab.data.tokenization import Example
from ftlab.errors import ConfigError
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.methods import make_method
from ftlab.models.llama import LlamaForCausalLM
from ftlab.operators import select
from tests.helpers.training import gradients, tiny_llama

PREFIX = [5, 9, 17, 23, 31, 40]


def examples(count: int = 4) -> list[Example]:
    """Examples that begin alike and go on differently; the last half of each is learnt."""
    found = []
    for index in range(count):
        own = [2 + (7 * index + 3 * i) % 50 for i in range(3 + 2 * index)]
        own[0] = 2 + index
        learnt = [False] * (len(PREFIX) + 1) + [True] * (len(own) - 1)
        found.append(Example(f"example-{index}", [*PREFIX, *own], learnt))
    return found


def batch(share: bool, count: int = 4) -> Batch:
    return collate_rows([[example] for example in examples(count)], 1, multiple=8, share_prefix=share)


def adapted() -> LlamaForCausalLM:
    model = tiny_llama()
    make_method(LoRAConfig(rank=4, alpha=8.0), seed=0).apply(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_the_same_loss_and_gradients(kernels: str) -> None:
    model = adapted()
    model.use(select(kernels, torch.device("cpu"))[0])
    found = []
    for share in (False, True):
        model.zero_grad()
        loss = supervised_cross_entropy(model, batch(share), 16)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (whole, whole_gradients), (shared, shared_gradients) = found
    torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-5)
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_positions_tokens_and_labels() -> None:
    shared, whole = batch(True), batch(False)
    assert shared.documents.lengths[0] == len(PREFIX)
    assert shared.num_tokens == whole.num_tokens
    assert shared.num_supervised == whole.num_supervised
    assert shared.input_ids.numel() < whole.input_ids.numel()
    parts = torch.split(shared.input_ids.flatten(), list(shared.documents.lengths))
    positions = torch.split(shared.position_ids.flatten(), list(shared.documents.lengths))
    labels = torch.split(shared.labels.flatten(), list(shared.documents.lengths))
    assert labels[0].tolist() == [IGNORE] * len(PREFIX)
    for number, example in enumerate(examples(), 1):
        assert [*PREFIX, *parts[number].tolist()] == example.token_ids
        assert positions[number].tolist() == list(range(len(PREFIX), len(example.token_ids)))
        learnt = zip(example.token_ids[1:], example.supervised[1:], strict=True)
        wanted = [token if flag else IGNORE for token, flag in learnt][len(PREFIX) :]
        assert labels[number].tolist() == [*wanted, IGNORE]
    assert torch.equal(shared.documents.position_ids, shared.position_ids.flatten())


def test_documents_do_not_see_one_another() -> None:
    """Another document's tokens change nothing, bit for bit; the prefix's do."""
    model = adapted().eval()
    base = batch(True)
    start = sum(base.documents.lengths[:2])  # the second example's own tokens
    end = start + base.documents.lengths[2]
    changed = base.input_ids.clone()
    changed[0, start:end] = 3
    with torch.no_grad():
        before = model.hidden_states(base.input_ids, base.position_ids, base.documents)[0]
        after = model.hidden_states(changed, base.position_ids, base.documents)[0]
        assert torch.equal(before[:start], after[:start])
        assert torch.equal(before[end:], after[end:])
        assert not torch.equal(before[start:end], after[start:end])
        changed[0, 0] = 4
        prefix = model.hidden_states(changed, base.position_ids, base.documents)[0]
    assert not torch.allclose(prefix[end:], before[end:])


def test_what_is_shared() -> None:
    assert common_prefix(examples()) == len(PREFIX)
    assert common_prefix(examples(1)) == 0
    same = Example("a", [*PREFIX, 7], [False] * 6 + [True])
    assert common_prefix([same, same]) == len(PREFIX) - 1, "the last of the prefix predicts what is learnt"
    early = Example("b", [*PREFIX, 8], [False] * 4 + [True] * 3)
    assert common_prefix([same, early]) == 0, "three tokens are too few"
    assert not batch(False).documents.shared_prefix


def test_rows_of_one_length_are_refused() -> None:
    from ftlab.compose import compose

    with pytest.raises(ConfigError, match="share_prefix"):
        compose(["model=tiny_random", "data=capitals", "data.share_prefix=true", "data.pad_rows=true"])
