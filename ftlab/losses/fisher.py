"""The diagonal Fisher information of a trained model on its task, and the file that keeps it.

    F_i = mean over examples x of (d log p(y | x) / d theta_i)^2

where log p(y | x) is the sum over the supervised tokens of one example. With `true` each token y is drawn from the
model's own distribution, which is Fisher's expectation by one sample an example; with `empirical` y is the label of the
data, which is cheaper to explain and another quantity (Kunstner et al. 2019, arXiv 1905.12558).

One example goes through at a time: the square of a sum over examples is not the sum of squares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftlab.data.loader import IGNORE, Batch
from ftlab.errors import FtlabError
from ftlab.files import atomic_path
from ftlab.models.llama import LlamaForCausalLM

__all__ = ["FILE", "KINDS", "FisherFacts", "diagonal_fisher", "read_fisher", "save_fisher"]

FILE = "fisher.safetensors"  # in the folder of the run that it is of
KINDS = ("true", "empirical")
_FISHER, _ANCHOR, _FACTS = "fisher.", "anchor.", "ftlab"


@dataclass(frozen=True)
class FisherFacts:
    """How the numbers came about: kind, examples, seed of the drawn labels, and how many tasks are added up in them."""

    kind: str
    examples: int
    seed: int
    tasks: int = 1


def diagonal_fisher(
    model: LlamaForCausalLM,
    names: Sequence[str],
    batches: Iterable[Batch],
    *,
    kind: str = "true",
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """F of the parameters `names`, fp32 tensors of their shapes; each of `batches` holds one example.

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
            nats = _negative_log_likelihood(model, batch, generator if kind == "true" else None)
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


def _negative_log_likelihood(model: LlamaForCausalLM, batch: Batch, generator: torch.Generator | None) -> Tensor:
    """Of the labels, or with a generator (of the CPU) of labels drawn from the model, summed over supervised tokens."""
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
