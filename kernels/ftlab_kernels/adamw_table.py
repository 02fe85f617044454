"""The tables through which the kernels of `ftlab_kernels.adamw` find their tensors, and the launches over them.

Letters: T tensors with a gradient, C chunks of them.

A table is built once and serves as long as the same tensors lie at the same addresses, which every step checks (on the
host: 0.3 ms for 448 tensors on the machine this was written on, while the GPU still works on the backward pass).
Gradients are the exception: zero_grad sets them to None and the next backward pass may put them elsewhere. Then only
their column of addresses is copied, from pinned memory and without waiting.

CUDA graphs: a captured step reads the table when it is replayed, so it has a copy of the gradients' addresses captured
with it, and from then on every step outside of a graph copies its own. What a graph uses is kept alive.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ftlab_kernels import adamw_kernels as columns
from ftlab_kernels.adamw_kernels import BLOCK, finish, norm_partials, update
from ftlab_kernels.aot import ARCHITECTURES, Shipped
from ftlab_kernels.common import ceil_div, next_power_of_2, tl

__all__ = ["Layout", "Member", "Scales", "Table", "capturing", "chunk_size", "launches"]

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORM_OPTIONS = {"BLOCKS": 8, "num_warps": 8}  # 8 elements a thread: two reads of 16 bytes of fp32, one of bf16
FINISH_OPTIONS = {"WIDE": 1024, "num_warps": 8}


@dataclass(frozen=True)
class Layout:
    """What an update kernel is compiled for. kind: fp32, stochastic or split; dtypes are None where nothing is read."""

    kind: str
    eight: bool
    anchor: torch.dtype | None = None
    fisher: torch.dtype | None = None
    ewc: torch.dtype | None = None

    def constants(self, grad: torch.dtype, *, aligned: bool) -> dict[str, Any]:
        """The constant arguments of `update`, block sizes and warps included.

        Four elements a thread: fp32 is read 16 bytes at a time, and no thread writes more than that of anything, or
        the compiler would pass every result through shared memory. With 32 to 40 registers a multiprocessor then
        holds 2048 threads. 8-bit moments want eight a thread: a warp is then a block, and finds its scale alone.
        """
        return {
            "KIND": self.kind,
            "GRAD_DTYPE": _triton(grad),
            "ANCHOR_DTYPE": _triton(self.anchor),
            "FISHER_DTYPE": _triton(self.fisher),
            "EWC_DTYPE": _triton(self.ewc),
            "EIGHT": self.eight,
            "ALIGNED": aligned,
            "BLOCKS": 4,
            "num_warps": 4 if self.eight else 8,
        }


def _triton(dtype: torch.dtype | None) -> Any:
    return None if dtype is None else getattr(tl, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Member:
    """A tensor of a step. place: its number among all parameters. tensors: by column of the table, but the gradient.

    strengths: of the pull to the anchor and of EWC, 0 without. rates: ln of the betas.
    """

    group: int
    place: int
    seed: int
    layout: Layout
    tensors: Mapping[int, Tensor]
    strengths: tuple[float, float]
    rates: tuple[float, float]


@dataclass(frozen=True)
class Scales:
    """What undoes the scaling of the loss, and whether someone else has found an inf: tensors of one element."""

    inv_scale: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def check(self, device: torch.device) -> None:
        """Errors: ValueError unless each is one number on this device."""
        for name in ("inv_scale", "grad_scale", "found_inf"):
            x = getattr(self, name)
            if x is not None and (not isinstance(x, Tensor) or x.numel() != 1 or x.device != device):
                raise ValueError(f"{name} must be a tensor of one element on {device}")


@dataclass(frozen=True)
class _Launch:
    """A run of chunks that one launch takes."""

    first: int
    count: int
    grad: torch.dtype
    aligned: bool
    group: int = 0
    layout: Layout = field(default_factory=lambda: Layout("fp32", False))


def chunk_size(elements: int) -> int:
    """Elements a program takes: a power of two from 4096 to 65536, so that there are about 16,000 programs or fewer.

    132 multiprocessors hold 1056 programs at a time. A program begins with four reads that wait for one another, so it
    should be long; the last round of programs is partly empty, so there should be many rounds: 10 for LoRA's 42 M.
    """
    return min(max(next_power_of_2(ceil_div(elements, 16384)), 4096), 65536)


def capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(values: Sequence[int], device: torch.device) -> Tensor:
    return _filled(torch.empty(len(values), dtype=torch.int64, pin_memory=device.type == "cuda"), values)


def _filled(buffer: Tensor, values: Sequence[int]) -> Tensor:
    if values:
        buffer.copy_(torch.frombuffer(array("q", values), dtype=torch.int64))
    return buffer


def _moved(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class Table:
    """Addresses, sizes and chunks of the tensors of a step. Errors: ValueError for one that the kernels cannot read."""

    def __init__(self, members: Sequence[Member], grads: Sequence[Tensor], device: torch.device) -> None:
        self.device = device
        self.members = members
        self.tensors = [tensor for member in members for tensor in member.tensors.values()]
        self.addresses = _addresses(self.tensors)
        self.grad_addresses = _addresses(grads)
        self.grad_kinds = _kinds(grads)
        self.captured: list[Tensor] = []  # pinned addresses that graphs copy from
        self._for_capture: Tensor | None = _pinned(self.grad_addresses, device)
        for member, grad in zip(members, grads, strict=True):
            _check(member, grad)
        self._fill()
        self._cut([grad.numel() for grad in grads])

    def _fill(self) -> None:
        """The table itself, and what else is kept for each tensor."""
        count = len(self.members)
        rows = [[0] * count for _ in range(columns.COLUMNS)]
        rows[columns.GRAD] = self.grad_addresses
        for index, member in enumerate(self.members):
            for column, tensor in member.tensors.items():
                rows[column][index] = tensor.data_ptr()
            rows[columns.SIZE][index] = member.tensors[columns.PARAM].numel()
            rows[columns.SEED][index] = member.seed
            rows[columns.PLACE][index] = member.place
        strengths = torch.tensor([member.strengths for member in self.members], dtype=torch.float32)
        rates = torch.tensor([member.rates for member in self.members], dtype=torch.float64)
        self.rows = _moved(torch.tensor(rows, dtype=torch.int64), self.device)
        self.strengths = _moved(strengths.t().contiguous(), self.device)
        self.rates = _moved(rates.t().contiguous(), self.device)
        self.corrections = torch.zeros(2, count, dtype=torch.float32, device=self.device)

    def _cut(self, sizes: Sequence[int]) -> None:
        """Chunks, in runs that share a kernel; runs of one kind of gradient lie side by side, for the norm."""
        self.chunk = chunk_size(sum(sizes))
        kinds: dict[tuple[str, bool, int, Layout], list[int]] = {}
        for index, (member, kind) in enumerate(zip(self.members, self._aligned(), strict=True)):
            dtype, aligned = kind
            kinds.setdefault((str(dtype), aligned, member.group, member.layout), []).append(index)
        runs = sorted(kinds.items(), key=lambda item: item[0][:3])
        order = torch.tensor([index for _, indices in runs for index in indices], dtype=torch.int64)
        counts = torch.tensor([ceil_div(size, self.chunk) for size in sizes], dtype=torch.int64)[order]
        before = counts.cumsum(0) - counts
        number = torch.arange(sum(ceil_div(size, self.chunk) for size in sizes)) - before.repeat_interleave(counts)
        pairs = torch.stack((order.repeat_interleave(counts), number), 1)
        self.chunks = _moved(pairs.to(torch.int32), self.device)
        self.partials = torch.empty(len(pairs), dtype=torch.float32, device=self.device)
        self.updates: list[_Launch] = []
        self.norms: list[_Launch] = []
        first = 0
        for (_, aligned, group, layout), indices in runs:
            count = sum(ceil_div(sizes[index], self.chunk) for index in indices)
            grad = self.grad_kinds[indices[0]][0]
            if count:
                self.updates.append(_Launch(first, count, grad, aligned, group, layout))
                last = self.norms[-1] if self.norms else None
                if last is not None and (last.grad, last.aligned) == (grad, aligned):
                    self.norms[-1] = _Launch(last.first, last.count + count, grad, aligned)
                else:
                    self.norms.append(_Launch(first, count, grad, aligned))
            first += count

    def _aligned(self) -> list[tuple[torch.dtype, bool]]:
        """Of each tensor the dtype of its gradient, and whether everything of it lies at a multiple of 16 bytes."""
        found = []
        for member, (dtype, aligned) in zip(self.members, self.grad_kinds, strict=True):
            ours = all(
                tensor.data_ptr() % 16 == 0 for column, tensor in member.tensors.items() if column != columns.STEP
            )
            found.append((dtype, aligned and ours))
        return found

    def fits(self) -> bool:
        """Whether all tensors but the gradients are where they were."""
        return _addresses(self.tensors) == self.addresses

    def refresh(self, grads: Sequence[Tensor]) -> bool:
        """Note where the gradients are now; False if they are of another kind, so that a new table is needed."""
        addresses = _addresses(grads)
        in_graph = capturing(self.device)
        if addresses == self.grad_addresses and not self.captured and not in_graph:
            return True
        if addresses != self.grad_addresses and _kinds(grads) != self.grad_kinds:
            return False
        if in_graph:
            if self._for_capture is None:
                raise RuntimeError("take a step outside of CUDA graphs before the next one is captured")
            source, self._for_capture = _filled(self._for_capture, addresses), None
            self.captured.append(source)
        else:
            source = _pinned(addresses, self.device)
            if self._for_capture is None:
                self._for_capture = _pinned(addresses, self.device)
        self.rows[columns.GRAD].copy_(source, non_blocking=True)
        self.grad_addresses = addresses
        return True

    # --- launches ---

    def measure(self, scales: Scales) -> None:
        """The sums of squares of all chunks: one launch for each kind of gradient."""
        unscale = (self._or_rows(scales.inv_scale), self._or_rows(scales.grad_scale))
        flags = {"INV": scales.inv_scale is not None, "SCALED": scales.grad_scale is not None}
        for run in self.norms:
            norm_partials[(run.count,)](
                self.rows,
                self.chunks,
                self.partials,
                *unscale,
                run.first,
                len(self.members),
                self.chunk,
                GRAD_DTYPE=_triton(run.grad),
                ALIGNED=run.aligned,
                **flags,
                **NORM_OPTIONS,
            )

    def decide(self, results: Tensor, scales: Scales, max_norm: float | None, *, measured: bool) -> None:
        """The factor of the gradients, whether to step at all, and the steps counted: one launch."""
        finish[(1,)](
            self.rows,
            self.partials,
            self.rates,
            self.corrections,
            results,
            self._or_rows(scales.inv_scale),
            self._or_rows(scales.grad_scale),
            self._or_rows(scales.found_inf),
            math.inf if max_norm is None else float(max_norm),
            len(self.chunks),
            len(self.members),
            NORM=measured,
            INV=scales.inv_scale is not None,
            SCALED=scales.grad_scale is not None,
            FOUND=scales.found_inf is not None,
            **FINISH_OPTIONS,
        )

    def step(self, results: Tensor, groups: Sequence[Mapping[str, Any]]) -> None:
        """The steps: one launch for each group (and for each layout in it)."""
        for run in self.updates:
            group = groups[run.group]
            lr = group["lr"]
            on_device = isinstance(lr, Tensor)
            beta_1, beta_2 = group["betas"]
            update[(run.count,)](
                self.rows,
                self.chunks,
                self.strengths,
                self.corrections,
                results,
                lr if on_device else results,
                0.0 if on_device else float(lr),
                1 - beta_1,
                beta_2,
                1 - beta_2,
                group["eps"],
                group["weight_decay"],
                run.first,
                len(self.members),
                self.chunk,
                LR_TENSOR=on_device,
                **run.layout.constants(run.grad, aligned=run.aligned),
            )

    def _or_rows(self, x: Tensor | None) -> Tensor:
        """A tensor that a kernel reads, or one in its place that it does not."""
        return self.rows if x is None else x


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _kinds(grads: Sequence[Tensor]) -> list[tuple[torch.dtype, bool]]:
    return [(grad.dtype, grad.data_ptr() % 16 == 0) for grad in grads]


def _check(member: Member, grad: Tensor) -> None:
    param = member.tensors[columns.PARAM]
    where = f"parameter {member.place} of shape {tuple(param.shape)}"
    if grad.dtype not in GRAD_DTYPES:
        raise ValueError(f"{where}: gradients are fp32, bf16 or fp16, not {grad.dtype}")
    for tensor in (grad, *member.tensors.values()):
        if tensor.device != param.device or not tensor.is_contiguous():
            raise ValueError(f"{where}: it, its gradient and its states must be contiguous and on one device")
    scales = ceil_div(param.numel(), BLOCK)
    for column, tensor in member.tensors.items():
        scale = column in (columns.EXP_AVG_ABSMAX, columns.EXP_AVG_SQ_ABSMAX)
        size = 1 if column == columns.STEP else scales if scale else param.numel()
        if tensor.numel() != size:
            raise ValueError(f"{where}: a state or anchor of it has {tensor.numel()} elements instead of {size}")


# --- ahead of time ----------------------------------------------------------------------------------------------------


def launches() -> list[Shipped]:
    """The configurations that are compiled ahead of time, as `shipped` of `ftlab_kernels.adamw` gives them."""
    bf16 = torch.bfloat16
    steps = [
        ("fp32", Layout("fp32", False), torch.float32),
        ("fp32, bf16 anchor", Layout("fp32", False, bf16), torch.float32),
        ("fp32, fp32 anchor", Layout("fp32", False, torch.float32), torch.float32),
        ("fp32, anchor and EWC", Layout("fp32", False, bf16, bf16, bf16), torch.float32),
        ("stochastic", Layout("stochastic", False), bf16),
        ("stochastic, anchor and EWC", Layout("stochastic", False, bf16, bf16, bf16), bf16),
        ("split", Layout("split", False), bf16),
        ("stochastic, 8 bit", Layout("stochastic", True), bf16),
        ("stochastic, 8 bit, anchor and EWC", Layout("stochastic", True, bf16, bf16, bf16), bf16),
        ("split, 8 bit", Layout("split", True), bf16),
        ("fp32, 8 bit", Layout("fp32", True), torch.float32),
    ]
    memory = (("LDG",), ("STG",))
    found = [
        _entry(f"adamw {name}", update, {"LR_TENSOR": False, **layout.constants(grad, aligned=True)}, memory)
        for name, layout, grad in steps
    ]
    flags = {"INV": False, "SCALED": False}
    for name, grad in (("fp32", torch.float32), ("bf16", bf16)):
        constants = {"GRAD_DTYPE": _triton(grad), "ALIGNED": True, **flags, **NORM_OPTIONS}
        found.append(_entry(f"adamw norm, {name}", norm_partials, constants, memory))
    constants = {"NORM": True, "FOUND": False, **flags, **FINISH_OPTIONS}
    return [*found, _entry("adamw finish", finish, constants, (("DFMA",),))]  # the corrections are fp64


def _entry(name: str, kernel: Any, constants: Mapping[str, Any], expects: Sequence[tuple[str, ...]]) -> Shipped:
    pointers = {"table_ptr": "*i64", "chunks_ptr": "*i32", "rates_ptr": "*fp64"}
    integers = ("first", "tensors", "chunk", "count")
    types = {
        word: "i32" if word in integers else pointers.get(word, "*fp32") if word.endswith("_ptr") else "fp32"
        for word in kernel.arg_names
        if word not in constants
    }
    options = {word: value for word, value in constants.items() if word in ("BLOCKS", "WIDE", "num_warps")}
    rest = {word: value for word, value in constants.items() if word not in options}
    return Shipped(name, kernel, types, rest, options, ("chunk",), dict.fromkeys(ARCHITECTURES, expects))
