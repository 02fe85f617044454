"""Which path a run takes, what is said of it, and what a path does with tensors that it has no code for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ftlab_kernels import native
from ftlab_kernels.adapted import Adapted
from torch import Tensor

from ftlab.config import Config, LoRAConfig
from ftlab.errors import ConfigError, FtlabError
from ftlab.methods import make_method
from ftlab.methods.lora import lora_leaves
from ftlab.models.llama import LlamaForCausalLM
from ftlab.operators import KERNELS, NAMES, TORCH, Operators, describe, select
from ftlab.validate import check_kernels, validate
from tests.helpers.models import random_ids, tiny_llama

CPU = torch.device("cpu")


def operators_of(kernels: str) -> Operators:
    return select(kernels, CPU)[0]


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernels, path, line",
    [
        ("auto", "native", "kernels: native"),
        ("native", "native", "kernels: native"),
        ("reference", "torch", "kernels: torch, as asked for"),
        ("check", "native", "kernels: native, each call compared with its reference (slow)"),
    ],
)
def test_on_a_cpu(kernels: str, path: str, line: str) -> None:
    operators, said = select(kernels, CPU)
    assert (operators.path, said) == (path, line)
    assert (operators is TORCH) == (path == "torch")
    assert (operators.log is not None) == (kernels == "check")
    assert not describe(operators)


def test_every_value_is_known() -> None:
    assert set(KERNELS) == {"auto", "triton", "native", "reference", "check"}


def test_triton_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kernels=triton: .* not on cpu; use kernels=auto, .* or kernels=reference"):
        select("triton", CPU)


def test_native_on_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="kernels=native: the native kernels run on a CPU, not on cuda"):
        select("native", torch.device("cuda"))


def test_compiled_the_choice_is_torch() -> None:
    operators, line = select("auto", CPU, compiled=True)
    assert operators is TORCH
    assert line == "kernels: torch, because torch.compile fuses torch's own operations"
    assert select("reference", CPU, compiled=True)[0] is TORCH
    for kernels in ("native", "triton", "check"):
        with pytest.raises(ConfigError, match=f"kernels={kernels}: torch.compile fuses"):
            select(kernels, CPU, compiled=True)


def test_without_the_library_auto_says_why_and_check_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(folder: Any) -> None:
        raise native.NativeError("no C compiler was found (cc, gcc, clang)")

    monkeypatch.setattr(native, "_library", missing)
    assert select("auto", CPU) == (TORCH, "kernels: torch, because no C compiler was found (cc, gcc, clang)")
    for kernels in ("native", "check"):
        with pytest.raises(ConfigError, match=rf"kernels={kernels}: no C compiler .* use kernels=auto, which takes"):
            select(kernels, CPU)


@pytest.mark.parametrize("kernels", ["triton", "native", "check"])
def test_with_torch_compile_a_path_cannot_be_asked_for(kernels: str, plain: Config) -> None:
    plain.kernels, plain.training.compile = kernels, True
    with pytest.raises(ConfigError, match=rf"^kernels: {kernels} and training\.compile=true both fuse .*kernels=auto"):
        check_kernels(plain)
    with pytest.raises(ConfigError, match="both fuse"):
        validate(plain)
    plain.training.compile = False
    check_kernels(plain)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_with_torch_compile_torch_can_be_asked_for(kernels: str, plain: Config) -> None:
    plain.kernels, plain.training.compile = kernels, True
    validate(plain)


def test_native_and_a_gpu_contradict_one_another(plain: Config) -> None:
    plain.kernels, plain.parallel.device = "native", "cuda"
    with pytest.raises(ConfigError, match=r"^kernels: native is for a CPU .*parallel\.device=cuda; use kernels=auto"):
        check_kernels(plain)
    for kernels, device in (("native", "cpu"), ("native", "auto"), ("auto", "cuda"), ("reference", "cuda")):
        plain.kernels, plain.parallel.device = kernels, device
        check_kernels(plain)


def test_an_unknown_value_is_refused(plain: Config) -> None:
    plain.kernels = "nativ"
    with pytest.raises(ConfigError, match="kernels: 'nativ' is none of auto, triton, native, reference, check"):
        validate(plain)


@pytest.fixture
def plain() -> Config:
    from ftlab.compose import compose

    return compose(["+experiment=full_tiny"])[0]


# --- what a path has no code for --------------------------------------------------------------------------------------


def calls(dtype: torch.dtype) -> dict[str, Callable[[Operators], Any]]:
    """Each operation on small tensors of `dtype`."""

    def x(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    weight, angles, labels = torch.ones(8), torch.ones(1, 3, 1, 4), torch.tensor([1, 0, 4])
    adapted = [Adapted(x(5, 8), None, torch.ones(2, 8), torch.ones(5, 2), 0.5)]
    q, k = x(2, 3, 4, 8), x(2, 3, 2, 8)
    return {
        "rms_norm": lambda operators: operators.rms_norm(x(3, 8), weight, 1e-5),
        "add_rms_norm": lambda operators: operators.add_rms_norm(x(3, 8), x(3, 8, seed=1), weight, 1e-5),
        "rope": lambda operators: operators.rope(q, k, angles.cos(), angles.sin()),
        "swiglu": lambda operators: operators.swiglu(x(3, 8), x(3, 8, seed=1)),
        "lora_linears": lambda operators: operators.lora_linears(x(3, 8), adapted, 0.0),
        "linear_cross_entropy": lambda operators: operators.linear_cross_entropy(x(3, 8), x(5, 8), labels, 2),
        "causal_attention": lambda operators: operators.causal_attention(q.transpose(1, 2), *[k.transpose(1, 2)] * 2),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_library_is_used_where_it_can_be(name: str, dtype: torch.dtype) -> None:
    for kernels in ("auto", "native"):
        operators = operators_of(kernels)
        found = calls(dtype)[name](operators)
        torch.testing.assert_close(found, calls(dtype)[name](TORCH))
        times = 2 if name == "linear_cross_entropy" else 1  # two chunks
        assert describe(operators) == {name: {"native": times}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_what_it_has_no_code_for_is_left_to_torch_and_counted(name: str, dtype: torch.dtype) -> None:
    kind = str(dtype).removeprefix("torch.")
    operators = operators_of("auto")
    found = calls(dtype)[name](operators)
    torch.testing.assert_close(found, calls(dtype)[name](TORCH), rtol=0, atol=0)
    assert list(describe(operators)) == [name]
    assert list(describe(operators)[name]) == [f"torch, for {kind} on cpu"]
    with pytest.raises(FtlabError, match=f"kernels=native: {name} has no C for {kind} on cpu; use kernels=auto"):
        calls(dtype)[name](operators_of("native"))


def test_two_dtypes_are_named() -> None:
    operators = operators_of("auto")
    operators.swiglu(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16))
    assert describe(operators) == {"swiglu": {"torch, for bfloat16 on cpu and float32 on cpu": 1}}


def test_a_stream_in_fp32_takes_an_update_in_bf16() -> None:
    """Under autocast a full model's residual stream is fp32 while what is added to it is bf16."""
    stream, update = torch.randn(3, 8), torch.randn(3, 8).bfloat16()
    operators = operators_of("native")
    found = operators.add_rms_norm(update, stream, torch.ones(8), 1e-5)
    torch.testing.assert_close(found, TORCH.add_rms_norm(update, stream, torch.ones(8), 1e-5))
    assert describe(operators) == {"add_rms_norm": {"native": 1}}


def test_adapters_are_counted_one_by_one() -> None:
    operators = operators_of("auto")
    layer = Adapted(torch.ones(5, 8), None, torch.ones(2, 8), torch.ones(5, 2), 0.5)
    operators.lora_linears(torch.ones(3, 8), [layer] * 3, 0.0)
    operators.rms_norm(torch.ones(3, 8), torch.ones(8), 1e-5)
    operators.rms_norm(torch.ones(3, 8).double(), torch.ones(8), 1e-5)
    assert describe(operators) == {
        "lora_linears": {"native": 3},
        "rms_norm": {"native": 1, "torch, for float64 on cpu": 1},
    }
    assert not describe(operators_of("auto")), "every run counts anew"


# --- in a model -------------------------------------------------------------------------------------------------------


def holders(model: LlamaForCausalLM) -> list[Operators]:
    return [module.operators for module in model.modules() if hasattr(module, "operators")]


def test_adapters_made_before_and_after_use_the_same() -> None:
    operators = operators_of("auto")
    before, after = tiny_llama(), tiny_llama()
    make_method(LoRAConfig(rank=2), seed=0).apply(before)
    before.use(operators)
    after.use(operators)
    make_method(LoRAConfig(rank=2), seed=0).apply(after)
    for model in (before, after):
        assert len(lora_leaves(model)) == 14
        assert all(leaf.operators is operators for leaf in lora_leaves(model).values())
        assert all(held is operators for held in holders(model))
    assert len(holders(before)) == len(holders(after)) > 14
    assert torch.equal(before(random_ids(1, 5)), after(random_ids(1, 5)))
    before.use(TORCH)
    assert all(held is TORCH for held in holders(before))


def test_a_copied_model_has_the_same_operators() -> None:
    model = tiny_llama()
    make_method(LoRAConfig(rank=2), seed=0).apply(model)
    operators = operators_of("auto")
    model.use(operators)
    other = copy.deepcopy(model)
    assert all(held is operators for held in holders(other))
    assert torch.equal(other(random_ids(1, 5)), model(random_ids(1, 5)))


def test_operators_are_no_part_of_the_weights() -> None:
    model = tiny_llama()
    names = set(model.state_dict())
    model.use(operators_of("auto"))
    assert set(model.state_dict()) == names
