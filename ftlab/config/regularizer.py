"""What holds it back (group `regularizer`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftlab.config.options import option

__all__ = [
    "EWCConfig",
    "L1SPConfig",
    "L2Config",
    "L2SPConfig",
    "RegularizerConfig",
]


@dataclass
class L2SPConfig:
    """strength * ||theta - theta0||^2, the pull to the pretrained weights (arXiv 1802.01483)."""

    strength: float = option(0.0, "lambda; 0 is bitwise the run without it", low=0)


@dataclass
class L1SPConfig:
    """strength * ||theta - theta0||_1, which leaves most weights exactly pretrained (arXiv 1802.01483)."""

    strength: float = option(0.0, "lambda; 0 is bitwise the run without it", low=0)


@dataclass
class L2Config:
    """strength * ||theta||^2 over what trains, as a term of the loss."""

    strength: float = option(0.0, "lambda; 0 is bitwise the run without it", low=0)


@dataclass
class EWCConfig:
    """strength / 2 * sum F (theta - theta*)^2, the pull to earlier tasks (arXiv 1612.00796)."""

    strength: float = option(0.0, "lambda; 0 is bitwise the run without it", low=0)
    source: list[str] = option(
        list, "finished runs whose tasks are protected; each needs python -m ftlab.fisher run=DIR"
    )


@dataclass
class RegularizerConfig:
    """What holds the weights back; every entry with a positive strength is added to the loss."""

    l2_sp: L2SPConfig = option(L2SPConfig, "pull to the pretrained weights")
    l1_sp: L1SPConfig = option(L1SPConfig, "pull of equal force to the pretrained weights")
    l2: L2Config = option(L2Config, "pull to zero")
    ewc: EWCConfig = option(EWCConfig, "pull to the weights of earlier tasks")
    extra: dict[str, Any] = option(dict, "your own penalties: name -> {_target_: module.Class, ...arguments}")


# --- optimizer and schedule ----------------------------------------------------------------------------------------
