"""What trains: the trainability table, full fine-tuning, LoRA."""

from __future__ import annotations

from ftlab.config import FullConfig, LoRAConfig, MethodConfig
from ftlab.errors import ConfigError
from ftlab.methods.base import Method
from ftlab.methods.full import Full
from ftlab.methods.lora import LoRA

__all__ = ["Method", "make_method"]


def make_method(config: MethodConfig, seed: int = 0) -> Method:
    """The method of a configuration; `seed` draws whatever the method initialises at random."""
    if isinstance(config, LoRAConfig):
        return LoRA(config, seed)
    if isinstance(config, FullConfig):
        return Full(config)
    raise ConfigError("method: choose an option, for example method=lora or method=full")
