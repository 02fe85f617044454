from __future__ import annotations

import pytest
import torch

from ftlab.errors import ConfigError, FtlabError
from ftlab.methods.trainable import ParameterRow, Rule, TrainableTable, trainable_parameters, trainable_state_dict
from tests.helpers.models import tiny_llama

NORMS = Rule(r".*norm\.weight", True, lr_scale=0.5)
REST = Rule(".*", False)


def test_first_match_decides() -> None:
    model = tiny_llama()
    rows = TrainableTable([NORMS, REST]).apply(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.endswith("norm.weight")
    }
    others = [p for name, p in model.named_parameters() if not name.endswith("norm.weight")]
    assert rows == [
        ParameterRow(NORMS.pattern, True, 5, 5 * 32, 0.5),
        ParameterRow(".*", False, len(others), sum(p.numel() for p in others), 1.0),
    ]
    everything = TrainableTable([Rule(".*", True)])
    everything.apply(model)
    assert all(p.requires_grad for p in model.parameters())


def test_rows_change_nothing() -> None:
    model = tiny_llama()
    table = TrainableTable([NORMS, REST])
    rows = table.rows(model)
    assert all(p.requires_grad for p in model.parameters())
    assert rows == table.apply(model)


def test_rates_and_checkpoint_follow_the_table() -> None:
    model = tiny_llama()
    table = TrainableTable([NORMS, REST])
    table.apply(model)
    state = trainable_state_dict(model)
    assert table.lr_scales(model) == dict.fromkeys(state, 0.5)
    assert list(state) == list(trainable_parameters(model))
    assert not any(tensor.requires_grad for tensor in state.values())
    assert state["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()


def test_patterns_match_whole_names() -> None:
    with pytest.raises(FtlabError, match=r"decides for no parameter"):
        TrainableTable([Rule("norm", True), REST]).apply(tiny_llama())


def test_uncovered_parameters_are_named() -> None:
    with pytest.raises(FtlabError, match=r"no trainable rule covers model\.embed_tokens\.weight.* and \d+ more"):
        TrainableTable([NORMS]).apply(tiny_llama())


@pytest.mark.parametrize("rules", [[Rule("nothing", True), REST], [REST, NORMS], [REST, REST]])
def test_a_rule_without_a_parameter_is_an_error(rules: list[Rule]) -> None:
    model = tiny_llama()
    with pytest.raises(FtlabError, match="decides for no parameter"):
        TrainableTable(rules).apply(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("rule", "message"), [(Rule("(", True), "regular expression"), (Rule(".*", True, 0), "lr_scale")]
)
def test_a_rule_that_makes_no_sense(rule: Rule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainableTable([rule])


def test_a_tied_head_counts_once() -> None:
    tied, untied = tiny_llama(), tiny_llama(tie_word_embeddings=False)
    table = TrainableTable([Rule(".*", True)])
    assert table.rows(untied)[0].count - table.rows(tied)[0].count == 259 * 32
    assert torch.equal(tied.head_weight, tied.model.embed_tokens.weight)
