"""Convex problems whose optimum is known: the library's own penalties, losses and gradients lead there.

    linear regression     ||X W^T - Y||^2 + sum_k a_k (W - C_k)^2             a linear system for each row of W
    softmax regression    -sum_n q_n . log softmax(W x_n) + the same sum      Newton's method, in fp64

The sum runs over elements. L2-SP has a = strength and C = W0; EWC, for each task, a = strength F / 2 and C = the
weights that the task ended with. q is one-hot, or with label smoothing e (1 - e) one-hot + e / classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlab.config import EWCConfig, L2SPConfig, LoRAConfig, RegularizerConfig
from ftlab.losses.classification import logits_loss
from ftlab.losses.fisher import FILE, FisherFacts, save_fisher
from ftlab.losses.penalties import Penalty, build_penalties
from ftlab.methods.lora import apply_lora, lora_leaves
from ftlab.operators import TORCH

INPUTS, OUTPUTS, EXAMPLES = 4, 3, 40
Pull = tuple[Tensor, Tensor]  # a and C, fp64, as the weight
PENALTIES = [("l2_sp", 0.1), ("l2_sp", 30.0), ("ewc", 1.0), ("ewc", 30.0)]


def pulled(kind: str, strength: float, folder: Path, adapter: bool = False) -> tuple[nn.Module, Penalty, list[Pull]]:
    """A linear model W0, perhaps under an adapter of full rank, what holds it, and the same in numbers."""
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False))
    start = model[0].weight.detach().double().clone()
    if adapter:
        apply_lora(model, LoRAConfig(rank=OUTPUTS, alpha=2.0 * OUTPUTS, targets=["0"]), seed=1)
        model.requires_grad_(False)
        for parameter in lora_leaves(model)["0"].adapter_parameters():
            parameter.requires_grad_(True)
    if kind == "l2_sp":
        config = RegularizerConfig(l2_sp=L2SPConfig(strength))
        pulls = [(torch.full_like(start, strength), start)]
    else:
        pulls, sources = [], [folder / "first", folder / "second"]
        for source in sources:
            source.mkdir()
            fisher, ended = torch.rand(start.shape).bfloat16().float() + 0.5, torch.randn(start.shape)
            save_fisher(source / FILE, {"0.weight": fisher}, {"0.weight": ended}, FisherFacts("true", 1, 0))
            pulls.append((strength * fisher.bfloat16().double() / 2, ended.double()))
        config = RegularizerConfig(ewc=EWCConfig(strength, [str(source) for source in sources]))
    (penalty,) = build_penalties(config, model)
    return model, penalty, pulls


def linear_optimum(x: Tensor, y: Tensor, pulls: list[Pull]) -> Tensor:
    x, y = x.double(), y.double()
    rows = []
    for row in range(OUTPUTS):
        system = x.t() @ x + sum(torch.diag(a[row]) for a, _ in pulls)
        rows.append(torch.linalg.solve(system, x.t() @ y[:, row] + sum(a[row] * centre[row] for a, centre in pulls)))
    return torch.stack(rows)


def softmax_optimum(x: Tensor, targets: Tensor, pulls: list[Pull]) -> Tensor:
    """Newton's method from zero, its gradient and curvature written out."""
    x, q = x.double(), targets.double()
    weight = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    curvature = torch.diag(2 * sum((a for a, _ in pulls), torch.zeros_like(weight)).reshape(-1))
    for _ in range(30):
        p = (x @ weight.t()).softmax(-1)
        gradient = (p - q).t() @ x + sum(2 * a * (weight - centre) for a, centre in pulls)
        of_logits = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("ncd,ni,nj->cidj", of_logits, x, x).reshape(curvature.shape) + curvature
        weight = weight - torch.linalg.solve(hessian, gradient.reshape(-1)).reshape(weight.shape)
    assert float(gradient.norm()) < 1e-9
    return weight


def descend(model: nn.Module, objective: Callable[[], Tensor], curvature: float, steps: int = 200) -> None:
    """Gradient descent at the rate that fits the curvature."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / curvature)
    for _ in range(steps):
        optimizer.zero_grad()
        objective().backward()
        optimizer.step()


def effective(model: nn.Module) -> Tensor:
    leaf = lora_leaves(model).get("0")
    return model.get_parameter("0.weight") if leaf is None else leaf.pretrained_weight() + leaf.delta_weight()


def put(model: nn.Module, weight: Tensor) -> None:
    """Give the model this effective weight."""
    leaf = lora_leaves(model).get("0")
    with torch.no_grad():
        if leaf is None:
            model.get_parameter("0.weight").copy_(weight)
            return
        left, values, right = torch.linalg.svd((weight - leaf.pretrained_weight()) / leaf.scale, full_matrices=False)
        leaf.lora_B.copy_(left * values.sqrt())
        leaf.lora_A.copy_(values.sqrt()[:, None] * right)
        torch.testing.assert_close(effective(model), weight)


def gradient_norm(model: nn.Module, loss: Tensor) -> float:
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return float(torch.cat([gradient.reshape(-1) for gradient in found]).norm())


def assert_optimum(model: nn.Module, data: Callable[[], Tensor], penalty: Penalty, expected: Tensor) -> None:
    """At `expected` the two gradients, none of which is zero, cancel."""
    put(model, expected.float())
    alone = gradient_norm(model, data())
    assert alone > 0.01
    assert gradient_norm(model, data() + penalty.value(model)) < 1e-3 * alone


def curvature_of(pulls: list[Pull]) -> float:
    return 2 * float(sum(a for a, _ in pulls).max())  # type: ignore[union-attr]  # a sum of tensors is one


@pytest.mark.parametrize(("kind", "strength"), PENALTIES)
@pytest.mark.parametrize("adapter", [False, True])
def test_linear_regression(tmp_path: Path, kind: str, strength: float, adapter: bool) -> None:
    x, y = torch.randn(EXAMPLES, INPUTS), torch.randn(EXAMPLES, OUTPUTS)
    model, penalty, pulls = pulled(kind, strength, tmp_path, adapter)
    expected = linear_optimum(x, y, pulls)

    def data() -> Tensor:
        return (model(x) - y).square().sum()

    if not adapter:
        largest = 2 * float(torch.linalg.matrix_norm(x.t() @ x, 2)) + curvature_of(pulls)
        descend(model, lambda: data() + penalty.value(model), largest)
        torch.testing.assert_close(effective(model).double(), expected, rtol=1e-4, atol=1e-5)
    assert_optimum(model, data, penalty, expected)


@pytest.mark.parametrize(("kind", "strength"), PENALTIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("adapter", [False, True])
def test_softmax_regression(tmp_path: Path, kind: str, strength: float, smoothing: float, adapter: bool) -> None:
    x, y = torch.randn(EXAMPLES, INPUTS), torch.randint(OUTPUTS, (EXAMPLES,))
    model, penalty, pulls = pulled(kind, strength, tmp_path, adapter)
    expected = softmax_optimum(x, smoothed(y, smoothing), pulls)

    def data() -> Tensor:
        return logits_loss(model(x), y, "single", smoothing)

    if not adapter:
        largest = float(torch.linalg.matrix_norm(x.t() @ x, 2)) / 2 + curvature_of(pulls)
        descend(model, lambda: data() + penalty.value(model), largest)
        torch.testing.assert_close(effective(model).double(), expected, rtol=1e-3, atol=1e-4)
    assert_optimum(model, data, penalty, expected)


# --- label smoothing alone -------------------------------------------------------------------------------------------


def smoothed(labels: Tensor, e: float, classes: int = OUTPUTS) -> Tensor:
    return (1 - e) * F.one_hot(labels, classes).float() + e / classes


def single(weight: Tensor, x: Tensor, labels: Tensor, e: float) -> Tensor:
    return logits_loss(x @ weight.t(), labels, "single", e)


def language_model(weight: Tensor, x: Tensor, labels: Tensor, e: float) -> Tensor:
    return TORCH.linear_cross_entropy(x, weight, labels, 2, e)


LOSSES = {"single": single, "language model": language_model}
SATURATED = torch.eye(6)  # an input of its own for each example, so that W can give it any logits
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


def fitted(loss: Callable[..., Tensor], labels: Tensor, e: float, steps: int) -> Tensor:
    """Logits [examples, classes] after gradient descent from zero."""
    weight = nn.Parameter(torch.zeros(OUTPUTS, len(SATURATED)))
    optimizer = torch.optim.SGD([weight], lr=2.0)  # the curvature of softmax is at most 1/2
    for _ in range(steps):
        optimizer.zero_grad()
        loss(weight, SATURATED, labels, e).backward()
        optimizer.step()
    return weight.detach().t()


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("e", [0.1, 0.5])
def test_the_smoothed_cross_entropy_is_lowest_at_the_smoothed_target(name: str, e: float) -> None:
    """softmax(z) = 1 - e + e / C at the label, e / C elsewhere; the gap in z is log((1 - e + e / C) / (e / C))."""
    logits = fitted(LOSSES[name], LABELS, e, 400)
    torch.testing.assert_close(logits.softmax(-1), smoothed(LABELS, e), rtol=1e-4, atol=1e-5)
    here, elsewhere = logits[torch.arange(6), LABELS], logits[torch.arange(6), (LABELS + 1) % OUTPUTS]
    gap = torch.tensor((1 - e + e / OUTPUTS) / (e / OUTPUTS)).log()
    torch.testing.assert_close(here - elsewhere, gap.expand(6), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", list(LOSSES))
def test_without_smoothing_the_logits_grow_on(name: str) -> None:
    assert float(fitted(LOSSES[name], LABELS, 0.0, 400).max()) > 1.2 * float(
        fitted(LOSSES[name], LABELS, 0.0, 50).max()
    )


@pytest.mark.parametrize("e", [0.1, 0.5])
def test_each_of_several_labels_is_smoothed_towards_one_half(e: float) -> None:
    """sigmoid(z) = 1 - e / 2 for a label that is there, e / 2 for one that is not."""
    targets = F.one_hot(LABELS, OUTPUTS).float()
    logits = fitted(lambda weight, x, labels, e: logits_loss(x @ weight.t(), labels, "multi", e), targets, e, 400)
    torch.testing.assert_close(logits.sigmoid(), targets * (1 - e) + e / 2, rtol=1e-4, atol=1e-5)
