"""How a kernel is judged: against fp64 truth, by the error torch itself makes in that dtype, inside guarded memory.

Nothing here is tuned by hand per kernel: an error is bounded by twice torch's own plus a small absolute term, and the
relative Frobenius error and the cosine are bounded too, so that no single lucky tolerance lets nonsense pass.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from ftlab_kernels.common import INTERPRETED
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ABSOLUTE = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
GUARD = 64  # elements on each side of a guarded tensor


def device() -> torch.device:
    """Where kernels run: the GPU; the CPU under the interpreter and where there is no GPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal values, rounded to `dtype`, the same on every device."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(n * 7919**i for i, n in enumerate(shape)) % 2**31)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device())


def strided(x: Tensor) -> Tensor:
    """The same values as a view whose rows do not touch: between them stand NaNs, which must not leak."""
    filler = math.nan if x.is_floating_point() else 0
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 24), filler, dtype=x.dtype, device=x.device)
    wide[..., 8 : 8 + x.shape[-1]] = x
    return wide[..., 8 : 8 + x.shape[-1]]


def run(
    function: Callable[..., Any], inputs: Mapping[str, Tensor], upstream: Sequence[Tensor], wanted: Sequence[str]
) -> dict[str, Tensor]:
    """Outputs of `function(**inputs)` as out0, out1, ... and the gradients of `wanted` inputs under `upstream`."""
    leaves = {n: x.detach().requires_grad_(n in wanted) if x.is_floating_point() else x for n, x in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    if wanted:
        pairs = [(out, up.to(out.dtype)) for out, up in zip(outputs, upstream, strict=True) if out.requires_grad]
        gradients = torch.autograd.grad(
            [out for out, _ in pairs], [leaves[name] for name in wanted], [up for _, up in pairs]
        )
        found |= {f"d_{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return found


def judge(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    upstream: Sequence[Tensor] = (),
    wanted: Sequence[str] = (),
    factor: float = 2.0,
    absolute: float | None = None,
) -> None:
    """Assert that every output and gradient of `kernel` is no worse than `factor` times torch's own in that dtype.

    `reference` runs twice: on the inputs widened to fp64 (the truth) and on the inputs as they are (torch's own error).
    """
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    truth = run(reference, wide, [up.double() for up in upstream], wanted)
    eager = run(reference, inputs, upstream, wanted)
    with guarded_memory():
        actual = run(kernel, inputs, upstream, wanted)
    assert actual.keys() == truth.keys()
    for name, exact in truth.items():
        dtype = next((x.dtype for n, x in inputs.items() if name == f"d_{n}"), eager[name].dtype)
        assert_close(actual[name], exact, eager[name], factor, ABSOLUTE[dtype] if absolute is None else absolute, name)


def assert_close(actual: Tensor, truth: Tensor, eager: Tensor, factor: float, absolute: float, name: str = "") -> None:
    """The bounds of `judge` for one tensor."""
    assert actual.shape == truth.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(truth.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name} is not finite"
    if truth.numel() == 0:
        return
    ours, theirs = actual.double() - truth, eager.double() - truth
    bound = factor * float(theirs.abs().max()) + absolute
    worst = float(ours.abs().max())
    assert worst <= bound, f"{name}: largest error {worst:.3g}, torch's own is {float(theirs.abs().max()):.3g}"
    size = float(truth.norm())
    if size > absolute * math.sqrt(truth.numel()):
        relative, own = float(ours.norm()) / size, float(theirs.norm()) / size
        allowed = factor * own + absolute * math.sqrt(truth.numel()) / size
        assert relative <= allowed, f"{name}: relative error {relative:.3g}, torch's own is {own:.3g}"
        cosine = float((actual.double() * truth).sum()) / (float(actual.double().norm()) * size)
        assert cosine >= 0.999, f"{name}: cosine {cosine:.6f} with the truth"


@contextlib.contextmanager
def guarded_memory() -> Iterator[None]:
    """Every tensor allocated inside by torch.empty, empty_like or zeros lies between guards that must stay untouched.

    New memory is NaN (or the largest integer) until a kernel writes it, so what was forgotten shows.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    plain_empty = torch.empty

    def filler(dtype: torch.dtype) -> Any:
        return math.nan if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).max

    def guarded_empty(*size: Any, **options: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        options.pop("memory_format", None)
        dtype = options.get("dtype") or torch.get_default_dtype()
        whole = plain_empty(math.prod(shape) + 2 * GUARD, **options)
        if whole.is_meta:
            return plain_empty(shape, **options)
        whole.fill_(filler(dtype))
        kept.append((whole, whole.clone()))
        return whole[GUARD : whole.numel() - GUARD].view(shape)

    def guarded_like(x: Tensor, **options: Any) -> Tensor:
        return guarded_empty(tuple(x.shape), **{"dtype": x.dtype, "device": x.device, **options})

    def guarded_zeros(*size: Any, **options: Any) -> Tensor:
        return guarded_empty(*size, **options).zero_()

    with (
        mock.patch.object(torch, "empty", guarded_empty),
        mock.patch.object(torch, "empty_like", guarded_like),
        mock.patch.object(torch, "zeros", guarded_zeros),
    ):
        yield
    for whole, before in kept:
        for side in (slice(None, GUARD), slice(whole.numel() - GUARD, None)):
            same = torch.equal(whole[side].nan_to_num(7.0), before[side].nan_to_num(7.0))
            assert same, f"memory beside a tensor of {whole.numel() - 2 * GUARD} elements was overwritten"


def mutant(module: ModuleType, folder: Path, old: str, new: str) -> ModuleType:
    """The module again with `old` replaced by `new` in its source: a deliberately broken kernel.

    `old` must occur; every occurrence is replaced.
    """
    assert module.__file__ is not None
    source = Path(module.__file__).read_text("utf-8")
    assert old in source, f"{module.__name__} has no {old!r} any more; the mutation test needs another place"
    name = f"mutant_{module.__name__.rpartition('.')[2]}_{abs(hash((old, new))):x}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new), "utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    sys.modules[name] = broken
    spec.loader.exec_module(broken)
    return broken


def noticed(check: Callable[[], None]) -> bool:
    """Whether a check fails: what a mutation must make it do."""
    try:
        check()
    except Exception:
        return True
    return False
