"""data.share_prefix: the same loss and gradients with the common beginning computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftlab.config import LoRAConfig
from ftlab.data.loader import IGNORE, Batch, RowLoader, collate_rows, common_prefix
from ftlab.data.tokenization import Example
from ftlab.errors import ConfigError
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.methods import make_method
from ftlab.models.llama import LlamaForCausalLM
from ftlab.operators import select
from ftlab.training.loop import fit
from ftlab.training.parallel import Ranks
from tests.helpers.training import data_config, gradients, lora_fit, run_ranks, tiny_llama

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
    rows = [[example] for example in examples(count)]
    prefix = common_prefix(examples(count)) if share else 0
    return collate_rows(rows, 1, multiple=8, prefix=prefix)


def adapted(dropout: float = 0.0) -> LlamaForCausalLM:
    model = tiny_llama()
    make_method(LoRAConfig(rank=4, alpha=8.0, dropout=dropout), seed=0).apply(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
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


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_a_nan_stays_in_its_document(kernels: str) -> None:
    model = adapted().eval()
    model.use(select(kernels, torch.device("cpu"))[0])
    base = batch(True)
    start = sum(base.documents.lengths[:2])
    end = start + base.documents.lengths[2]
    poisoned = base.input_ids.clone()
    poisoned[0, start:end] = 60  # which no other document has
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
        hidden = model.hidden_states(poisoned, base.position_ids, base.documents)[0]
    assert hidden[start:end].isnan().all()
    assert hidden[:start].isfinite().all()
    assert hidden[end:].isfinite().all()


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_checkpointed_blocks_draw_the_same_masks(kernels: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(dropout=0.3)
        model.use(select(kernels, torch.device("cpu"))[0])
        model.checkpoint_blocks = checkpointing
        torch.manual_seed(5)
        supervised_cross_entropy(model, batch(True), 16).backward()
        found.append((gradients(model), torch.get_rng_state()))
    (plain, state), (again, state_again) = found
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert torch.equal(state, state_again)


@given(
    prefix=st.integers(0, 12),
    tails=st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=9), min_size=1, max_size=6),
    learnt=st.integers(0, 20),
    multiple=st.sampled_from([1, 8]),
)
def test_every_example_can_be_read_back(prefix: int, tails: list[list[int]], learnt: int, multiple: int) -> None:
    """Whatever is shared: the tokens, positions and labels of each example are those it has alone."""
    known = [
        Example(str(number), [*range(10, 10 + prefix), *tail], [at >= learnt for at in range(prefix + len(tail))])
        for number, tail in enumerate(tails)
    ]
    made = collate_rows([[example] for example in known], 1, multiple=multiple, prefix=common_prefix(known))
    lengths = list(made.documents.lengths)
    parts = [torch.split(x.flatten(), lengths) for x in (made.input_ids, made.position_ids, made.labels)]
    front = parts[0][0].tolist() if made.documents.shared_prefix else []
    first = 1 if made.documents.shared_prefix else 0
    assert len(front) == common_prefix(known)
    for number, example in enumerate(known, first):
        alone = collate_rows([[example]], 1)
        ids, positions, labels = (part[number].tolist() for part in parts)
        assert front + ids == alone.input_ids[0].tolist()
        assert positions == alone.position_ids[0].tolist()[len(front) :]
        assert labels == alone.labels[0].tolist()[len(front) :]
        assert set(alone.labels[0].tolist()[: len(front)]) <= {IGNORE}


# --- runs -------------------------------------------------------------------------------------------------------------


def losses_and_weights(folder: Path, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A run over eight examples with one beginning, two of which go into a micro-batch."""
    micro = changes.pop("micro", 2)
    share = changes.pop("share", True)
    data = data_config(batch_size=4, micro_batch_size=micro, share_prefix=share)
    changes = {"dropout": 0.0, "examples": examples(8), "total_steps": 6, **changes}
    losses: list[float] = []
    state, run = lora_fit(folder, data=data, on_step=lambda step, result, *_: losses.append(result.nats), **changes)
    fit(state, run)
    return losses, {name: p.detach().clone() for name, p in state.model.named_parameters() if p.requires_grad}


def test_micro_batches_of_any_size_train_alike(tmp_path: Path) -> None:
    losses, weights = losses_and_weights(tmp_path / "whole", share=False)
    for micro in (1, 2, 3, 4):
        others, moved = losses_and_weights(tmp_path / str(micro), micro=micro)
        assert others == pytest.approx(losses, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(moved[name], weight, rtol=1e-3, atol=2e-5, msg=name)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    _, whole = losses_and_weights(tmp_path / "whole", dropout=0.3)
    losses_and_weights(tmp_path / "parts", dropout=0.3, total_steps=3)
    data = data_config(batch_size=4, micro_batch_size=2, share_prefix=True)
    state, run = lora_fit(tmp_path / "parts", dropout=0.3, examples=examples(8), total_steps=6, data=data)
    saved = run.checkpoints.newest()
    assert saved is not None
    state.load_state_dict(saved, 0, 1)
    fit(state, run)
    assert state.counters.step == 6
    for name, parameter in state.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, whole[name]), name


def on_two_ranks(ranks: Ranks, folder: Path) -> None:
    _, weights = losses_and_weights(folder / f"rank-{ranks.rank}", ranks=ranks)
    torch.save(weights, folder / f"weights-{ranks.rank}.pt")


def test_two_ranks_end_at_the_weights_of_one(tmp_path: Path) -> None:
    _, alone = losses_and_weights(tmp_path / "alone")
    run_ranks(on_two_ranks, tmp_path, tmp_path)
    for rank in (0, 1):
        weights = torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True)
        for name, weight in alone.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_no_micro_batch_is_larger_than_the_one_that_is_tried_first(packing: bool) -> None:
    """The longest examples may have more in common than what all have."""
    known = [Example(f"long-{n}", [*range(10, 30), 40 + n], [False] * 20 + [True]) for n in range(3)]
    known += [Example(f"short-{n}", [10, 11, 12, 13, 50, 51 + n], [False] * 5 + [True]) for n in range(6)]
    rows = {"packing": packing, "batch_size": 2, "micro_batch_size": 2, "row_length": 21, "pad_to_multiple": 1}
    config = data_config(**rows, share_prefix=True)
    loader = RowLoader(known, config, seed=0, pad_id=1)
    largest = loader.largest_batch().input_ids.numel()
    seen = [
        loader.collate(loader.rows(epoch)[start : start + 2]).input_ids.numel()
        for epoch in range(40)
        for start in range(0, len(loader.rows(epoch)), 2)
    ]
    assert max(seen) <= largest


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
