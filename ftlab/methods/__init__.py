"""What trains: the trainability table, LoRA, and the methods that move pretrained weights themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftlab.config import (
    BitFitConfig,
    FreezeConfig,
    FullConfig,
    GradualUnfreezeConfig,
    LinearProbeConfig,
    LoRAConfig,
    MethodConfig,
)
from ftlab.errors import ConfigError
from ftlab.methods.base import Method
from ftlab.methods.bitfit import BitFit
from ftlab.methods.freeze import Freeze
from ftlab.methods.full import Full
from ftlab.methods.gradual_unfreeze import GradualUnfreeze
from ftlab.methods.linear_probe import LinearProbe
from ftlab.methods.lora import LoRA

__all__ = ["Method", "make_method"]

_METHODS: dict[type[MethodConfig], Callable[[Any], Method]] = {
    FullConfig: Full,
    FreezeConfig: Freeze,
    LinearProbeConfig: LinearProbe,
    BitFitConfig: BitFit,
    GradualUnfreezeConfig: GradualUnfreeze,
}


def make_method(config: MethodConfig, seed: int = 0) -> Method:
    """The method of a configuration; `seed` draws whatever the method initialises at random."""
    if isinstance(config, LoRAConfig):
        return LoRA(config, seed)
    make = _METHODS.get(type(config))
    if make is None:
        raise ConfigError("method: choose an option, for example method=lora or method=full")
    return make(config)
