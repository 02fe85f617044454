"""AdamW (arXiv 1711.05101) with its parameter groups: torch's own implementation.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    theta <- theta - lr * wd * theta - lr * m_hat / (sqrt(v_hat) + eps)

The decay acts on matrices only: never on norms, biases or other vectors, and not on token embeddings either (nor on a
head tied to them), whose rows for rare tokens get no gradient for many steps and would only shrink. An untied head and
LoRA's A and B are matrices and decay.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ftlab.config import AdamWConfig, OptimizerConfig
from ftlab.errors import ConfigError, FtlabError

Pull = tuple[Tensor, float]

__all__ = ["AdamW", "LearningRates", "Pull", "build_optimizer", "decayed", "set_lr"]


class AdamW(torch.optim.AdamW):
    """torch's AdamW, bit for bit, without its import of torch's compiler.

    torch wraps these methods in notes to its compiler that import it when they are first called: a second of every
    start, for an optimizer that nothing here compiles. What is wrapped is called as it is.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class LearningRates(Protocol):
    """The part of the trainability table that the optimizer reads."""

    def lr_scales(self, model: nn.Module) -> dict[str, float]:
        """The factor of the learning rate of each parameter that trains, by name."""


def build_optimizer(
    config: OptimizerConfig,
    model: nn.Module,
    table: LearningRates,
    *,
    path: str = "torch",
    pulls: Mapping[Tensor, Pull] | None = None,
) -> torch.optim.Optimizer:
    """AdamW over the parameters that train, in groups of equal decay and equal share of the learning rate.

    A group holds `base_lr` (lr times its share), from which `set_lr` makes its rate, and `param_names`, by which a
    saved state is recognised. torch's fused kernel is used: deterministic, and on a CPU 3.5 times faster than its two
    other forms for a set of adapters. path: that of the run's operators. With "triton" it is ftlab_kernels' instead,
    which clips to max_grad_norm and leaves out a step that is not finite by itself. With state=8bit the moments take
    one byte each, by that optimizer, by compiled C with "native", or by its plain form. pulls: parameters that each
    step also moves by lr * strength of the way to a tensor, at most all of it, beside the decay; in the same pass
    where the optimizer is ftlab_kernels'. Errors: nothing trains, not AdamW's settings, or a pull to another device
    than that of ftlab_kernels' optimizer.
    """
    if not isinstance(config, AdamWConfig):
        raise ConfigError("optimizer: choose an option, for example optimizer=adamw")
    decays = decayed(model)
    members: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, lr_scale in table.lr_scales(model).items():
        weight_decay = config.weight_decay if name in decays else 0.0
        members.setdefault((lr_scale, weight_decay), []).append((name, model.get_parameter(name)))
    if not members:
        raise FtlabError("no parameter trains, so there is nothing to optimize; look at the method's rules")
    groups = [
        {"params": named, "lr": config.lr * lr_scale, "base_lr": config.lr * lr_scale, "weight_decay": weight_decay}
        for (lr_scale, weight_decay), named in members.items()
    ]
    constants: Any = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "weight_decay": 0.0}
    optimizer: torch.optim.Optimizer
    triton = path == "triton"
    if triton and any(target.device != p.device for p, (target, _) in (pulls or {}).items()):
        raise ConfigError(
            "regularizer.l2_sp.anchor: the fused optimizer of mode=decoupled reads theta0 on the device; give fp32 or "
            "bf16, or kernels=reference"
        )
    if triton:
        from ftlab_kernels.adamw import FusedAdamW

        limit = config.max_grad_norm or math.inf
        optimizer = FusedAdamW(groups, **constants, max_grad_norm=limit, states=config.state, anchors=pulls or None)
    elif config.state == "8bit":
        from ftlab.optim.eight_bit import AdamW8bit

        optimizer = AdamW8bit(groups, native=path == "native", **constants)
    else:
        optimizer = AdamW(groups, **constants, fused=True)
    if pulls and not triton:
        optimizer.register_step_pre_hook(functools.partial(_pull, pulls=pulls))
    optimizer.register_load_state_dict_pre_hook(_check_names)
    return optimizer


@torch.no_grad()
def _pull(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any, *, pulls: Mapping[Tensor, Pull]) -> None:
    """Before a step: p <- p - min(1, lr * strength) (p - target) / (1 - lr * wd), which the decay then multiplies."""
    found_inf = getattr(optimizer, "found_inf", None)  # fp16's scaler: this step will move nothing
    if found_inf is not None and float(found_inf) > 0:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None or (pull := pulls.get(parameter)) is None:
                continue
            target, strength = pull
            share = min(1.0, group["lr"] * strength) / (1 - group["lr"] * group["weight_decay"])
            parameter.sub_((parameter.float() - target.to(parameter.device)).mul_(share).to(parameter.dtype))


def decayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay may act on: two dimensions or more, and not an embedding's."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in embeddings}


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's rate to `factor` times its base_lr; returns the run's own, of a share of 1."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(optimizer.defaults["lr"]) * factor


def _check_names(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """torch matches a saved state by position; refuse one whose parameters are others or in another order."""
    ours = [group["param_names"] for group in optimizer.param_groups]
    theirs = [group.get("param_names") for group in state["param_groups"]]
    if ours != theirs:
        raise FtlabError(
            "the saved optimizer state belongs to other parameters than the ones that train now; "
            "use the method and the rules of the run that saved it"
        )
