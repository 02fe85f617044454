"""The diagonal Fisher information of a trained model on its task, and the file that keeps it.

    F_i = mean over examples x of (d log p(y | x) / d theta_i)^2

where log p(y | x) is the sum over the supervised tokens of one example. Of a classifier y is the label of the text, and

    single:      log p = log softmax(z)[y]
    multi:       log p = sum_c y_c log sigmoid(z_c) + (1 - y_c) log(1 - sigmoid(z_c))
    regression:  log p = -1/2 (z - y)^2 + constant, a Gaussian of variance 1

With `true` each y is drawn from the model's own distribution, which is Fisher's expectation by one sample an example;
with `empirical` y is the label of the data, which is cheaper to explain and another quantity (Kunstner et al. 2019,
arXiv 1905.12558).

One example goes through at a time: the square of a sum over examples is not the sum of squares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftlab.data.loader import IGNORE, Batch
from ftlab.errors import FtlabError
from ftlab.files import atomic_path
from ftlab.losses.classification import logits_loss
from ftlab.models.heads import AnyModel, Classifier
from ftlab.models.llama import LlamaForCausalLM

__all__ = ["FILE", "KINDS", "FisherFacts", "diagonal_fisher", "read_fisher", "save_fisher"]

FILE = "fisher.safetensors"  # in the folder of the run that it is of
KINDS = ("true", "empirical")
_FISHER, _ANCHOR, _FACTS = "fisher.", "anchor.", "ftlab"


@dataclass(frozen=True)
class FisherFacts:
    """How the numbers came about: kind, examples, seed of the drawn labels, and how many tasks are added up in them.

    head: what the weights of a classifier's head mean (`Head.facts`), for whom reads them; None: a causal model.
    """

    kind: str
    examples: int
    seed: int
    tasks: int = 1
    head: dict[str, Any] | None = None


def diagonal_fisher(
    model: AnyModel,
    names: Sequence[str],
    batches: Iterable[Batch],
    *,
    kind: str = "true",
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """F of the parameters `names`, fp32 tensors of their shapes; each of `batches` holds one example.

    batches: of `collate_rows`, of a classifier of `collate_labelled`.

    The model is put in evaluation mode (no dropout) and left so; which parameters have `requires_grad` is restored.
    Errors: FtlabError if there is no batch, or one without a supervised token.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    chosen = {name: model.get_parameter(name) for name in names}
    generator = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in chosen.items()}
    model.eval().requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    count = 0
    try:
        for batch in batches:
            source = generator if kind == "true" else None
            if isinstance(model, Classifier):
                nats = _of_labels(model, batch, source)
            else:
                nats = _of_tokens(model, batch, source)
            for name, gradient in zip(chosen, torch.autograd.grad(nats, list(chosen.values())), strict=True):
                sums[name].addcmul_(gradient.float(), gradient.float())
            count += 1
            progress(count)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
    if count == 0:
        raise FtlabError("the Fisher information needs at least one example")
    return {name: total / count for name, total in sums.items()}


def _of_tokens(model: LlamaForCausalLM, batch: Batch, generator: torch.Generator | None) -> Tensor:
    """-log p of the labels, or with a generator (of the CPU) of drawn ones, summed over supervised tokens."""
    hidden_BTD = model.hidden_states(batch.input_ids, batch.position_ids, batch.documents)
    labels = batch.labels.reshape(-1)
    supervised_N = torch.nonzero(labels != IGNORE).squeeze(1)
    if len(supervised_N) == 0:
        raise FtlabError(f"the example {batch.example_ids[0]} has no supervised token")
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[supervised_N]
    logits_NV = F.linear(hidden_ND, model.head_weight).float()
    targets_N = labels[supervised_N]
    if generator is not None:
        drawn = torch.multinomial(logits_NV.detach().softmax(-1).cpu(), 1, generator=generator)
        targets_N = drawn.squeeze(1).to(labels.device)
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")


def _of_labels(model: Classifier, batch: Batch, generator: torch.Generator | None) -> Tensor:
    """The same of a classifier's text, without the constant of a Gaussian."""
    kind, logits_EC = model.head.labels.kind, model(batch)
    targets = batch.labels
    if generator is not None:
        targets = _drawn_labels(logits_EC.detach().cpu(), kind, generator).to(targets.device)
    nats = logits_loss(logits_EC, targets, kind)
    return nats / 2 if kind == "regression" else nats


def _drawn_labels(logits_EC: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Targets from the model's own distribution: int64 [E] (single), fp32 [E, C] (multi) or [E] (regression)."""
    if kind == "single":
        return torch.multinomial(logits_EC.softmax(-1), 1, generator=generator).squeeze(1)
    if kind == "multi":
        return torch.bernoulli(logits_EC.sigmoid(), generator=generator)
    return logits_EC[:, 0] + torch.randn(len(logits_EC), generator=generator)


def save_fisher(path: Path, fisher: Mapping[str, Tensor], anchors: Mapping[str, Tensor], facts: FisherFacts) -> None:
    """Write F in bf16 (its square root is what acts, to 3 digits) and the weights it was measured at in fp32."""
    tensors = {f"{_FISHER}{name}": value.to(torch.bfloat16).cpu().contiguous() for name, value in fisher.items()}
    tensors |= {f"{_ANCHOR}{name}": anchors[name].detach().float().cpu().contiguous() for name in fisher}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_FACTS: json.dumps(asdict(facts))})


def read_fisher(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], FisherFacts]:
    """F in bf16, anchors in fp32, both by parameter name on the CPU, and how they came about.

    Errors: FtlabError if there is no such file or it is another.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            facts = FisherFacts(**json.loads((opened.metadata() or {})[_FACTS]))
            keys = list(opened.keys())
            fisher = {key.removeprefix(_FISHER): opened.get_tensor(key) for key in keys if key.startswith(_FISHER)}
            anchors = {key.removeprefix(_ANCHOR): opened.get_tensor(key) for key in keys if key.startswith(_ANCHOR)}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FtlabError(
            f"{path} holds no Fisher information ({error}); make it by python -m ftlab.fisher run={path.parent}"
        ) from error
    return fisher, anchors, facts
