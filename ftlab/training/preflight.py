"""What is measured before step 1: one forward and backward on the largest batch, and the memory it takes."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftlab.data.loader import Batch
from ftlab.errors import FtlabError
from ftlab.models.noise import whole_depth
from ftlab.training.parallel import Replica
from ftlab.training.precision import Precision
from ftlab.training.record import peak_device_bytes, peak_rss_bytes
from ftlab.training.state import capture_rng, restore_rng

__all__ = ["Preflight", "SavedTensors", "check_gradients", "preflight", "static_memory"]


@dataclass(frozen=True)
class Preflight:
    """Measured on one micro-batch with the most tokens."""

    tokens: int
    seconds: float
    peak_rss: int
    peak_device: int
    activations: int  # bytes that the forward pass keeps for the backward pass
    silent: tuple[str, ...]  # modules that train but got no gradient at all from this batch

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "peak_rss": self.peak_rss,
            "peak_device": self.peak_device,
            "activations": self.activations,
            "silent_modules": list(self.silent),
        }


def static_memory(
    parameters: Iterable[nn.Parameter], buffers: Iterable[Tensor] = (), *, state: str = "fp32"
) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW's two moments; activations come on top and are measured.

    buffers: what a model holds besides its parameters, such as quantised weights; they count as weights. state: of the
    moments, fp32, or 8bit with one byte each and a scale for 256.
    """
    moments = 0
    weights, gradients = sum(buffer.numel() * buffer.element_size() for buffer in buffers), 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        weights += size
        if parameter.requires_grad:
            gradients += size
            moments += 2 * size if state == "fp32" else 2 * (parameter.numel() + 4 * -(-parameter.numel() // 256))
    return {"weights": weights, "gradients": gradients, "optimizer": moments}


class SavedTensors:
    """Bytes that a forward pass keeps for the backward pass: each storage once, without the model's own tensors.

    With activation checkpointing a block keeps its inputs only; the rest of one block at a time comes back in the
    backward pass and is not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self._alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def _save(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._alive.add(saved)
        return saved

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the forward pass inside keeps; its graph must still be there at the end of the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda saved: saved.tensor):
            yield
        # Not as it is saved: a checkpointed block in which nothing trains lets its inputs go again.
        storages = [saved.tensor.untyped_storage() for saved in self._alive]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.bytes = sum(size for place, size in sizes.items() if place not in self._own)


class _Saved:
    """A tensor in autograd's keeping; gone as soon as autograd lets it go."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def check_gradients(model: nn.Module) -> tuple[str, ...]:
    """Names of modules whose every trainable tensor has a gradient of zeros.

    Raises:
        FtlabError: a tensor that should train is not connected to the loss.
    """
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise FtlabError(
            f"{len(missing)} trainable tensors get no gradient, the first is {missing[0]}; the method trains something "
            "that the loss does not depend on"
        )
    silent = []
    for name, module in model.named_modules():
        gradients = [p.grad for p in module.parameters(recurse=False) if p.requires_grad]
        if gradients and not any(bool((g != 0).any()) for g in gradients if g is not None):
            silent.append(name)
    return tuple(silent)


def preflight(replica: Replica, batch: Batch, precision: Precision) -> Preflight:
    """Run `batch` forward and backward twice, change nothing, and say what it took.

    The second time is timed: the first one also compiles, picks kernels and fills caches. What the forward pass keeps
    is counted in the first. No block is left out (stochastic depth): it would be missing in the memory, and look as if
    nothing reached it.

    Raises:
        FtlabError: out of memory, or a trainable tensor without gradient.
    """
    rng = capture_rng()
    device = replica.ranks.device
    replica.model.train()
    saved = SavedTensors(replica.model)
    try:
        for counted in (True, False):
            begin = time.monotonic()
            count = saved.counting() if counted else contextlib.nullcontext()
            with replica.sync(False), precision.autocast(), whole_depth(replica.model), count:
                loss = replica(batch.to(device)) / max(batch.num_supervised, 1)
            precision.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.monotonic() - begin
    except torch.OutOfMemoryError as error:
        raise FtlabError(
            f"the largest micro-batch ({batch.num_tokens} tokens) does not fit in memory "
            f"({str(error).splitlines()[0]}); "
            "lower data.micro_batch_size or data.row_length, or set training.activation_checkpointing=true"
        ) from None
    silent = check_gradients(replica.model)
    for parameter in replica.model.parameters():
        parameter.grad = None
    restore_rng(rng)
    peaks = peak_rss_bytes(), peak_device_bytes(device)
    return Preflight(batch.num_tokens, seconds, *peaks, saved.bytes, silent)
