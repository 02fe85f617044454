"""Run the reference beside a kernel, forward and backward, and stop where they differ by more than rounding.

    log = CheckLog()
    rms_norm = checked("rms_norm", norm.rms_norm, norm.reference, on_result=log.add)
    ...                                  # train; KernelMismatchError says which output or gradient is wrong
    print(log)

What a checked call returns, its gradients and the generator afterwards are the kernel's own, bit for bit: a checked run
is the run without checks, only slower. The reference runs twice for each comparison: on the arguments widened to fp64
(the truth) and on the arguments as they are (the error torch itself makes in that dtype, under the same autocast). An
output or gradient of n elements may be off by

    factor * torch's own error + (small(dtype) + eps * min(1, 64 / n)) * size of the truth + floor

where error and size are the largest element in one comparison and the Frobenius norm in another, and both must hold.
factor is 2, as in the tests. small is 1e-6 for fp32 and 1e-4 for fp16 and bf16: a fraction of the truth's size, because
the gradients of a step may all be tiny.

The other two terms are for where torch's own error is nearly 0, by luck or because its algorithm cancels less. eps is
that of the coarsest dtype at work and counts for scalars and short vectors only. floor is 8e-6, some roundings of an
intermediate fp32 number such as a logit, times sqrt(N / n) where N numbers are summed into n, and for a gradient times
the largest upstream gradient and the size of the arguments (their root mean square, at least 1).

So one wrong element in a million is found, and a sum in another order is not.

Costs: every comparison waits for the device; fp64 copies of the arguments and two more graphs of one operation are
alive at a time (the reference runs again in the backward pass rather than be kept); 4 to 20 times the time of a step.
For finding out whether the kernels are to blame, not for training.

Not for functions that change their arguments in place, under torch.compile, or in CUDA graphs. Differentiable once, and
once for each call (no retain_graph). The kernel's own graph is kept from forward to backward, so that memory it saves
there and that something overwrites meanwhile is noticed; checkpointed activations stay alive with it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ftlab_kernels.random import draw_seed

__all__ = ["FACTOR", "CheckLog", "Comparison", "KernelMismatchError", "checked", "compare"]

FACTOR = 2.0
SMALL = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
ROUNDINGS = 64  # of fp32, in an intermediate number of size 1 or a few: 8e-6
LEAST_NORMAL = 2.0**-126  # GPUs may flush smaller fp32 numbers to 0


@dataclass(frozen=True)
class Comparison:
    """One tensor of a kernel against the truth.

    name: the operation. what: `output 0`, `gradient of x`. error, own: the largest error of the kernel and of torch.
    bound: what error may be. ratio: error over bound, of the largest elements or of the norms, whichever is larger;
    above 1 is a mismatch. problem: what is wrong other than a number, in which case ratio is inf.
    """

    name: str
    what: str
    error: float
    own: float
    bound: float
    ratio: float
    shape: tuple[int, ...]
    dtype: torch.dtype
    problem: str = ""

    @property
    def close(self) -> bool:
        """Whether the kernel is within its bound."""
        return self.ratio <= 1

    def __str__(self) -> str:
        where = f"{self.name}: {self.what} ({_word(self.dtype)} {list(self.shape)})"
        if self.problem:
            return f"{where} {self.problem}"
        allowed = f"{self.bound:.3g} is allowed (torch's own error is {self.own:.3g})"
        return f"{where} is off by {self.error:.3g}, {allowed}; error / bound = {self.ratio:.3g}"


class KernelMismatchError(RuntimeError):
    """A kernel and its reference differ by more than rounding. comparison: the tensor in question."""

    def __init__(self, message: str, comparison: Comparison) -> None:
        super().__init__(message)
        self.comparison = comparison


class CheckLog:
    """How often each operation was compared and how near it came to its bound: `on_result=log.add`.

    counts: comparisons by operation. worst: by operation, the comparison with the largest ratio.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.worst: dict[str, Comparison] = {}

    def add(self, comparison: Comparison) -> None:
        """Take note of one comparison."""
        name = comparison.name
        self.counts[name] += 1
        if name not in self.worst or comparison.ratio > self.worst[name].ratio:
            self.worst[name] = comparison

    def lines(self) -> list[str]:
        """A line for each operation, for the summary of a run."""
        found = []
        for name, worst in sorted(self.worst.items()):
            count = f"{self.counts[name]} comparison{'s' if self.counts[name] > 1 else ''}"
            found.append(f"{name}: {count}, at most {worst.ratio:.2g} of what is allowed ({worst.what})")
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines()) or "no kernel was compared"


def compare(
    actual: Tensor,
    truth: Tensor,
    eager: Tensor,
    *,
    name: str = "",
    what: str = "output 0",
    factor: float = FACTOR,
    eps: float = 0.0,
    floor: float = 0.0,
) -> Comparison:
    """Judge a kernel's tensor by the truth (the reference on fp64 inputs) and by torch's own error in that dtype.

    eps: the relative rounding error of the coarsest dtype at work, at least that of `eager`. floor: an absolute error
    that is nothing. Where the truth or torch is not finite nothing is compared, but where both are not, the kernel must
    not be either: a kernel that hides a NaN is wrong. Tensors of integers must be equal.
    """

    def result(error: float, own: float, bound: float, ratio: float, problem: str = "") -> Comparison:
        return Comparison(name, what, error, own, bound, ratio, tuple(actual.shape), actual.dtype, problem)

    if actual.shape != truth.shape or actual.dtype != eager.dtype:
        wanted = f"{_word(eager.dtype)} {list(truth.shape)}"
        return result(math.inf, 0.0, 0.0, math.inf, f"is {wanted} by the reference")
    if actual.numel() == 0:
        return result(0.0, 0.0, 0.0, 0.0)
    if not actual.is_floating_point():
        differ = int((actual != eager).sum())
        problem = f"differs in {differ} of {actual.numel()} elements" if differ else ""
        return result(float(differ), 0.0, 0.0, math.inf if differ else 0.0, problem)
    truth = truth.double()
    ours, theirs = actual.double() - truth, eager.double() - truth
    known = theirs.isfinite()
    lost = int((known & ~actual.isfinite()).sum())
    if lost:
        return result(math.inf, 0.0, 0.0, math.inf, f"is not finite in {lost} of {actual.numel()} elements")
    if not bool(known.all()):
        hidden = int((actual.isfinite() & ~truth.isfinite() & ~eager.isfinite()).sum())
        if hidden:
            return result(math.inf, 0.0, 0.0, math.inf, f"is finite in {hidden} elements where the reference is not")
        ours, theirs, truth = (torch.where(known, x, 0) for x in (ours, theirs, truth))
    info = torch.finfo(actual.dtype)
    count = actual.numel()
    allowed = SMALL[actual.dtype] + max(eps, info.eps) * min(1.0, 64 / count)
    least = max(floor, info.smallest_normal * info.eps, LEAST_NORMAL)
    error, own, largest = (float(x.abs().max()) for x in (ours, theirs, truth))
    bound = factor * own + allowed * largest + least
    error_norm, own_norm, norm = (float(torch.linalg.vector_norm(x)) for x in (ours, theirs, truth))
    norm_bound = factor * own_norm + allowed * norm + least * math.sqrt(count)
    return result(error, own, bound, max(error / bound, error_norm / norm_bound))


def checked(
    name: str,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    *,
    factor: float = FACTOR,
    on_result: Callable[[Comparison], None] | None = None,
) -> Callable[..., Any]:
    """`kernel`, compared with `reference` at every call: each output at once, each gradient in the backward pass.

    Both take the same arguments: tensors, numbers, and lists, tuples, dictionaries and dataclasses of them. A keyword
    that the reference does not have (a block size, say) is not passed to it. Both return a tensor or a tuple of them.

    seed: where the kernel or the reference has an argument `seed` and it is None or not given, the kernel has to draw
    its seed by `random.draw_seed` on the device of the first tensor, before anything else. The reference is given that
    same seed, and so has the same dropout mask.

    on_result is called with every comparison, also with the one that fails: `CheckLog.add`.

    Errors: KernelMismatchError, from the call or from the backward pass.
    """
    check = _Check(name, kernel, reference)
    check.factor, check.on_result = factor, on_result

    @functools.wraps(kernel)
    def compared(*arguments: Any, **named: Any) -> Any:
        return check(*arguments, **named)

    return compared


# --- arguments --------------------------------------------------------------------------------------------------------

Build = Callable[[Iterator[Tensor]], Any]


@dataclass
class _Flat:
    """The tensors of nested arguments, where each stands, the numbers beside them, and how to put it together again.

    Holds no tensor but those in `tensors`: what is kept for the backward pass must not keep activations alive.
    """

    tensors: list[Tensor] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)

    def add(self, value: Any, path: str) -> Build:
        """Take `value` apart; the result makes it again of that many tensors, in order."""
        if isinstance(value, Tensor):
            self.tensors.append(value)
            self.paths.append(path)
            return next
        if is_dataclass(value) and not isinstance(value, type):
            kind = type(value)
            parts = {f.name: self.add(getattr(value, f.name), f"{path}.{f.name}") for f in fields(value) if f.init}
            return lambda tensors: kind(**{name: build(tensors) for name, build in parts.items()})
        if isinstance(value, tuple | list):
            make = getattr(type(value), "_make", type(value))  # a named tuple takes its items one by one
            items = [self.add(part, f"{path}[{index}]") for index, part in enumerate(value)]
            return lambda tensors: make([build(tensors) for build in items])
        if isinstance(value, Mapping):
            entries = {key: self.add(part, f"{path}[{key!r}]") for key, part in value.items()}
            return lambda tensors: {key: build(tensors) for key, build in entries.items()}
        if isinstance(value, bool | int | float | str):
            self.numbers.append(f"{path} = {value!r}")
        return lambda tensors: value


def _tensors(value: Any) -> tuple[list[Tensor], Build]:
    """The tensors that a function returned, and how to put them together again."""
    flat = _Flat()
    build = flat.add(value, "")
    return flat.tensors, build


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """By name; empty for the functions of torch that are written in C and have no signature."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def _next_seed(device: torch.device) -> Tensor:
    """The seed that `draw_seed` will give next; the generator stays where it is."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return draw_seed(device)


# --- a call -----------------------------------------------------------------------------------------------------------


class _Check:
    """What `checked` was given, and the number of calls so far."""

    def __init__(self, name: str, kernel: Callable[..., Any], reference: Callable[..., Any]) -> None:
        self.name, self.kernel, self.reference = name, kernel, reference
        self.factor = FACTOR
        self.on_result: Callable[[Comparison], None] | None = None
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters, known = _parameters(kernel), _parameters(reference)
        # Where the kernel takes *arguments, the reference says what they are called.
        variadic = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters.values())
        named = known if variadic or not parameters else parameters
        self.positions = [each.name for each in named.values() if each.kind in positional]
        self.draws = "seed" in parameters or "seed" in known
        self.takes_any = not known or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
        self.known = set(known)
        self.calls = itertools.count(1)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """One call of the kernel."""
        call = _Call(self, arguments, named)
        tensors = call.flat.tensors
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            outputs = _Checked.apply(call, *tensors)
            assert call.rebuild is not None
            return call.rebuild(iter(outputs))
        returned = self.kernel(*arguments, **named)
        call.compare_outputs(_tensors(returned)[0], tensors)
        return returned


class _Call:
    """What has to be remembered of one call: its arguments without tensors, the seed, autocast."""

    def __init__(self, check: _Check, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.check, self.number, self.flat = check, next(check.calls), _Flat()
        names = [*check.positions, *(f"arguments[{n}]" for n in range(len(check.positions), len(arguments)))]
        self._arguments = [self.flat.add(value, name) for name, value in zip(names, arguments, strict=False)]
        self._named = {name: self.flat.add(value, name) for name, value in named.items()}
        if not self.flat.tensors:
            raise ValueError(f"{check.name}: there is no tensor among the arguments")
        self.device = self.flat.tensors[0].device
        self.seed: Tensor | None = None
        self._seed_at: int | None = None
        if check.draws:
            at = check.positions.index("seed") if "seed" in check.positions else len(arguments)
            if (arguments[at] if at < len(arguments) else named.get("seed")) is None:
                self.seed = _next_seed(self.device)
                self._seed_at = at if at < len(arguments) else None
        on = torch.is_autocast_enabled(self.device.type)
        self.autocast = torch.get_autocast_dtype(self.device.type) if on else None
        self.rebuild: Build | None = None

    def run_kernel(self, tensors: Sequence[Tensor]) -> Any:
        """The kernel on these tensors; what it draws, it draws from the generator as it would unchecked."""
        remaining = iter(tensors)
        arguments = [build(remaining) for build in self._arguments]
        return self.check.kernel(*arguments, **{name: build(remaining) for name, build in self._named.items()})

    def run_reference(self, tensors: Sequence[Tensor], *, wide: bool) -> list[Tensor]:
        """The outputs of the reference; on fp64 tensors autocast stays off."""
        remaining = iter(tensors)
        arguments = [build(remaining) for build in self._arguments]
        named = {name: build(remaining) for name, build in self._named.items()}
        if self._seed_at is not None:
            arguments[self._seed_at] = self.seed
        elif self.seed is not None:
            named["seed"] = self.seed
        if not self.check.takes_any:
            named = {name: value for name, value in named.items() if name in self.check.known}
        on = self.autocast is not None and not wide
        # Without the cache: it would keep casts of these copies, and of one made without gradients at that.
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=on, cache_enabled=False):
            return _tensors(self.check.reference(*arguments, **named))[0]

    def compare_outputs(self, actual: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Judge what the kernel returned."""
        with torch.no_grad():
            eager = self.run_reference(tensors, wide=False)
            truth = self.run_reference([_wide(x) for x in tensors], wide=True)
        if len(actual) != len(eager):
            problem = f"are {len(actual)}, those of the reference {len(eager)}"
            self._settle(_wrong(self.check.name, "outputs", actual[0] if actual else tensors[0], problem), tensors)
        made_of = max(x.numel() for x in tensors)
        for index, parts in enumerate(zip(actual, truth, eager, strict=True)):
            self._judge(f"output {index}", parts, tensors, (made_of, 1.0))

    def compare_gradients(
        self,
        actual: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        wanted: Sequence[int],
        upstream: Sequence[Tensor | None],
    ) -> None:
        """Judge the gradients of the `wanted` tensors; the reference runs again, now with a graph."""
        found = []
        for wide in (True, False):
            leaves = [(_wide(x) if wide else x.detach()).requires_grad_(n in wanted) for n, x in enumerate(tensors)]
            with torch.enable_grad():
                outputs = self.run_reference(leaves, wide=wide)
            found.append(_gradients(outputs, [leaves[n] for n in wanted], upstream))
            del leaves, outputs
        made_of = sum(up.numel() for up in upstream if up is not None)
        largest = max((_largest(up) for up in upstream if up is not None), default=0.0)
        largest *= max([1.0, *(_mean_size(x) for x in tensors if x.is_floating_point())])
        for at, ours, truth, eager in zip(wanted, actual, *found, strict=True):
            zeros = [torch.zeros_like(tensors[at]) if x is None else x for x in (ours, truth, eager)]
            exact = zeros[1].double()
            what = f"gradient of {self.flat.paths[at]}"
            self._judge(what, (zeros[0], exact, zeros[2]), tensors, (made_of, largest))

    def _judge(
        self, what: str, parts: tuple[Tensor, Tensor, Tensor], tensors: Sequence[Tensor], sums: tuple[int, float]
    ) -> None:
        """parts: the kernel's, the truth, torch's. sums: of how many numbers these are made, and of which size."""
        dtypes = {x.dtype for x in (*tensors, parts[2]) if x.is_floating_point()}
        dtypes |= {self.autocast} if self.autocast is not None else set()
        eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        rounding = ROUNDINGS * torch.finfo(torch.promote_types(parts[2].dtype, torch.float32)).eps
        floor = rounding * sums[1] * math.sqrt(max(1.0, sums[0] / max(parts[2].numel(), 1)))
        with torch.no_grad():
            made = compare(*parts, name=self.check.name, what=what, factor=self.check.factor, eps=eps, floor=floor)
        self._settle(made, tensors)

    def _settle(self, comparison: Comparison, tensors: Sequence[Tensor]) -> None:
        """Report a comparison; stop if it is a mismatch."""
        if self.check.on_result is not None:
            self.check.on_result(comparison)
        if not comparison.close:
            raise KernelMismatchError(self._message(comparison, tensors), comparison)

    def _message(self, comparison: Comparison, tensors: Sequence[Tensor]) -> str:
        described = [_described(path, x) for path, x in zip(self.flat.paths, tensors, strict=True)]
        lines = [str(comparison), f"  arguments: {', '.join([*described, *self.flat.numbers])}"]
        if self.seed is not None:
            lines.append(f"  seed of its dropout: {int(self.seed.item())}")
        if self.autocast is not None:
            lines.append(f"  autocast: {_word(self.autocast)}")
        again = f"call {self.number} of {self.check.name} in this process"
        lines.append(f"  This was {again}; the same run with the same torch.manual_seed stops there again.")
        return "\n".join(lines)


def _wrong(name: str, what: str, like: Tensor, problem: str) -> Comparison:
    return Comparison(name, what, math.inf, 0.0, 0.0, math.inf, tuple(like.shape), like.dtype, problem)


def _wide(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x


def _largest(x: Tensor) -> float:
    """The largest absolute value of a finite element."""
    return float(x.detach().float().nan_to_num(0.0, 0.0, 0.0).abs().max()) if x.numel() else 0.0


def _mean_size(x: Tensor) -> float:
    """The root mean square of the finite elements."""
    if x.numel() == 0:
        return 0.0
    finite = x.detach().nan_to_num(0.0, 0.0, 0.0)
    norm = float(torch.linalg.vector_norm(finite, dtype=torch.promote_types(x.dtype, torch.float32)))
    return norm / math.sqrt(x.numel())


def _described(path: str, x: Tensor) -> str:
    strides = "" if x.is_contiguous() else f" with strides {list(x.stride())}"
    return f"{path} {_word(x.dtype)} {list(x.shape)}{strides}"


def _gradients(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The gradients of `leaves` under the upstream gradients of the outputs that have one."""
    pairs = zip(outputs, upstream, strict=True)
    used = [(out, up.to(out.dtype)) for out, up in pairs if up is not None and out.requires_grad]
    if not used:
        return [None] * len(leaves)
    return torch.autograd.grad([out for out, _ in used], leaves, [up for _, up in used], allow_unused=True)


class _Checked(torch.autograd.Function):
    """Keeps the kernel's own graph, and the arguments for the reference's."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The kernel on copies that share memory, with a graph of their own."""
        leaves = [
            x.detach().requires_grad_(needed) for x, needed in zip(tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        with torch.enable_grad():
            returned = call.run_kernel(leaves)
        outputs, call.rebuild = _tensors(returned)
        call.compare_outputs([out.detach() for out in outputs], tensors)
        call.flat.tensors = []
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.call, ctx.graph = call, (leaves, outputs)
        results = tuple(out.detach() for out in outputs)
        ctx.mark_non_differentiable(*(x for x, out in zip(results, outputs, strict=True) if not out.requires_grad))
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """The kernel's gradients, once they are compared."""
        if ctx.graph is None:
            raise RuntimeError("a checked kernel keeps its graph for one backward pass; this is the second")
        tensors = ctx.saved_tensors
        leaves, outputs = ctx.graph
        ctx.graph = None
        wanted = [n for n, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        found = _gradients(outputs, [leaves[n] for n in wanted], upstream)
        ctx.call.compare_gradients(found, tensors, wanted, upstream)
        by_place = dict(zip(wanted, found, strict=True))
        return None, *(by_place.get(n) for n in range(len(tensors)))
