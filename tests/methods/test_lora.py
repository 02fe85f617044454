from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ftlab.config import LoRAConfig
from ftlab.errors import ConfigError, FtlabError
from ftlab.methods.lora import LoRA, apply_lora, lora_leaves
from ftlab.methods.lora_linear import LoRALinear
from tests.helpers.models import random_ids, tiny_llama
from tests.losses.test_penalties import jiggle


def config(**changes: Any) -> LoRAConfig:
    return LoRAConfig(**({"rank": 4, "alpha": 8.0} | changes))


def linear(
    in_features: int = 12, out_features: int = 20, bias: bool = True, **changes: Any
) -> tuple[nn.Linear, LoRALinear]:
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias=bias)
    settings = {"rank": 4, "alpha": 8.0, "rslora": False, "dropout_p": 0.0} | changes
    leaf = LoRALinear(base, **settings, generator=torch.Generator().manual_seed(1))
    return base, leaf


def trained(**changes: Any) -> tuple[nn.Linear, LoRALinear]:
    base, leaf = linear(**changes)
    nn.init.normal_(leaf.lora_B)
    return base, leaf


def test_initial_values_are_those_of_peft() -> None:
    _, leaf = linear(in_features=400, rank=64)
    assert leaf.lora_A.shape == (64, 400)
    assert leaf.lora_B.shape == (20, 64)
    assert not leaf.lora_B.any()
    drawn = leaf.lora_A.detach()
    assert float(drawn.abs().max()) <= 1 / math.sqrt(400)
    assert float(drawn.std()) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 5, 12), (0, 12)])
def test_values_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], bias: bool) -> None:
    base, leaf = trained(bias=bias)
    x = torch.randn(*shape, requires_grad=True)
    parameters = [x, *leaf.parameters()]
    explicit = base(x) + leaf.scale * nn.functional.linear(nn.functional.linear(x, leaf.lora_A), leaf.lora_B)
    out = leaf(x)
    torch.testing.assert_close(out, explicit)
    upstream = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(value, parameters, upstream) for value in (out, explicit))
    torch.testing.assert_close(ours, theirs)


def test_adapters_train_although_the_input_and_the_base_do_not() -> None:
    _, leaf = trained()
    leaf.weight.requires_grad_(False)
    leaf.bias.requires_grad_(False)
    leaf(torch.randn(3, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in leaf.adapter_parameters())
    assert leaf.weight.grad is None


def test_bf16_without_and_with_autocast() -> None:
    base, leaf = trained()
    exact = leaf(torch.ones(3, 12)).detach()
    base.bfloat16()
    leaf.weight.data, leaf.bias.data = base.weight.data, base.bias.data
    assert leaf.lora_A.dtype == torch.float32
    plain = leaf(torch.ones(3, 12, dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = leaf(torch.ones(3, 12))
    for out in (plain, cast):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03)
    assert torch.equal(plain, cast)


def test_dropout_acts_on_the_adapter_in_training_only() -> None:
    base, leaf = trained(dropout_p=0.5)
    x = torch.randn(64, 12)
    leaf.eval()
    evaluated = leaf(x)
    torch.testing.assert_close(evaluated, leaf(x))
    leaf.train()
    torch.manual_seed(0)
    mean = torch.stack([leaf(x) for _ in range(2000)]).mean(0)
    assert not torch.equal(leaf(x), leaf(x))
    error = (mean - evaluated).detach().norm() / (evaluated - base(x)).detach().norm()
    assert float(error) < 0.05  # unbiased
    leaf.enabled = False
    assert torch.equal(leaf(x), base(x))


def test_targets_match_last_parts_or_whole_names() -> None:
    def matched(*targets: str) -> list[str]:
        return apply_lora(tiny_llama(), config(targets=list(targets)), seed=0)

    assert matched("q_proj") == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert matched("self_attn.q_proj") == matched("q_proj")
    assert matched(r"model\.layers\.1\..*_proj") == [
        f"model.layers.1.{name}"
        for name in (*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down")))
    ]
    assert matched("q_proj", "[qk]_proj") == matched("[qk]_proj")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", "'q_prj' matches no layer; the nearest are q_proj"),
        ("roj", "'roj' matches no layer"),
        ("mlp", r"matches model\.layers\.0\.mlp, which is a MLP and not a linear layer"),
        ("embed_tokens", "which is a Embedding"),
        ("lm_head", "LM head or shared"),
        ("(", "not a regular expression"),
    ],
)
def test_a_wrong_target_is_refused(target: str, message: str) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=message):
        apply_lora(model, config(targets=["v_proj", target]), seed=0)
    assert not lora_leaves(model)


def test_a_layer_used_twice_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ConfigError, match="shared with another layer"):
        apply_lora(model, config(targets=["q_proj"]), seed=0)


def test_the_seed_alone_draws_the_adapters() -> None:
    def drawn(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        model = tiny_llama()
        state = torch.get_rng_state()
        LoRA(config(), seed).apply(model)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}

    first, again, other = drawn(0, 0), drawn(0, 1), drawn(1, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    values = [tuple(t.flatten()[:4].tolist()) for t in first.values()]
    assert len(set(values)) == len(values)  # no two layers get the same draw


def test_base_weights_keep_their_names() -> None:
    before = set(tiny_llama().state_dict())
    model = tiny_llama()
    LoRA(config()).apply(model)
    assert {name for name in model.state_dict() if "lora_" not in name} == before


def saved(folder: Path, **changes: Any) -> LoRA:
    method = LoRA(config(**changes))
    model = tiny_llama()
    method.apply(model)
    jiggle(model)
    method.save(model, folder, "pypi:base")
    return method


def fresh(method: LoRA, **changes: Any) -> nn.Module:
    model = tiny_llama(**changes)
    method.apply(model)
    return model


def test_folder_holds_the_settings(tmp_path: Path) -> None:
    saved(tmp_path / "a", rslora=True, dropout=0.1, targets=["v_proj", "q_proj"])
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "pypi:base"
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"], settings["lora_dropout"]) == (
        4,
        8,
        True,
        0.1,
    )
    assert (settings["target_modules"], settings["task_type"]) == (["q_proj", "v_proj"], "CAUSAL_LM")
    saved(tmp_path / "b", alpha=2.5, targets=[r"layers\.1\..*[qv]_proj"])
    settings = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == 2.5
    assert settings["target_modules"] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b"}  # nothing half-written is left


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, "r is 4, here 8"),
        ({"alpha": 16.0}, "lora_alpha is 8, here 16"),
        ({"rslora": True}, "use_rslora is False, here True"),
        ({"targets": ["q_proj"]}, "unexpected base_model.model.model.layers.0"),
    ],
)
def test_other_settings_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    other = LoRA(config(**changes))
    with pytest.raises(FtlabError, match=message):
        other.load(fresh(other), tmp_path / "a")


def test_foreign_features_are_refused(tmp_path: Path) -> None:
    method = saved(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change in ({"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 8}}, {"peft_type": "LOHA"}):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(FtlabError, match=f"{next(iter(change))}"):
            method.load(fresh(method), tmp_path / "a")


def test_misshapen_and_unreadable_tensors_are_named(tmp_path: Path) -> None:
    method = saved(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file(tensors | {name: torch.zeros(4, 5)}, path)
    model = fresh(method)
    with pytest.raises(
        FtlabError, match=r"layers\.0\.mlp\.up_proj\.lora_A\.weight is \[4, 5\], the model has \[4, 32\]"
    ):
        method.load(model, tmp_path / "a")
    assert not any(leaf.lora_B.any() for leaf in lora_leaves(model).values())  # nothing was loaded in part
    path.write_bytes(b"not safetensors")
    with pytest.raises(FtlabError, match="cannot be read"):
        method.load(model, tmp_path / "a")
    path.unlink()
    with pytest.raises(FtlabError, match="cannot be read"):
        method.load(model, tmp_path / "a")


def test_calls_out_of_order_are_refused(tmp_path: Path) -> None:
    method = LoRA(config())
    for call in (method.merge, method.unmerge, method.merged, lambda m: method.save(m, tmp_path / "a", "base")):
        with pytest.raises(FtlabError, match="no LoRA adapters"):
            call(tiny_llama())
    model = fresh(method)
    method.save(model, tmp_path / "a", "base")
    with pytest.raises(FtlabError, match="not merged"):
        method.unmerge(model)
    with pytest.raises(FtlabError, match="not merged"):
        method.merged(model)
    method.merge(model)
    with pytest.raises(FtlabError, match="unmerge it before saving"):
        method.save(model, tmp_path / "b", "base")
    with pytest.raises(FtlabError, match="unmerge it before loading"):
        method.load(model, tmp_path / "a")
    with pytest.raises(FtlabError, match="unmerge it before disabling"), method.disabled(model):
        pass


def test_disabled_restores_after_an_error() -> None:
    method = LoRA(config())
    model = fresh(method)
    with pytest.raises(KeyError), method.disabled(model):
        raise KeyError
    assert all(leaf.enabled for leaf in lora_leaves(model).values())


def test_merged_is_a_plain_model(tmp_path: Path) -> None:
    method = LoRA(config())
    model = fresh(method).eval()
    jiggle(model)
    ids = random_ids(2, 6)
    expected = model(ids)
    method.merge(model)
    plain = method.merged(model)
    assert set(plain.state_dict()) == set(tiny_llama().state_dict())
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(plain(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiled_it_computes_the_same(dropout_p: float) -> None:
    """Without a code generator: what matters is that tracing follows the in-place product and the dropout."""
    _, leaf = trained(dropout_p=dropout_p)
    x = torch.randn(3, 12, requires_grad=True)
    compiled = torch.compile(leaf, backend="aot_eager", fullgraph=True)
    results = []
    for call in (leaf, compiled):
        for evaluate in (True, False):
            leaf.train(not evaluate)
            torch.manual_seed(0)
            out = call(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *leaf.adapter_parameters()])])
    torch.testing.assert_close(results[0], results[2])
    if dropout_p == 0:
        torch.testing.assert_close(results[1], results[3])
    else:
        assert not torch.equal(results[2][0], results[3][0])
