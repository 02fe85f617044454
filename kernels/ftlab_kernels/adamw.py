"""AdamW with all that belongs to a step in one pass: unscaling, clipping, decay, pulls to an anchor, rounding.

Letters: p a weight, g its gradient, m and v its moments, w0 the anchor of the pull, w* and F anchor and Fisher
information of EWC, lr the learning rate, wd the weight decay, b1 and b2 the betas, t the step, T tensors.

    g  = inv_scale * g_loss * min(1, max_grad_norm / (norm + 1e-6))     norm = ||inv_scale * g_loss|| over all groups
    g += ewc_strength * F (p - w*)                                      (EWC, arXiv 1612.00796)
    m  = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2               (AdamW, arXiv 1711.05101)
    p  = p - lr wd p - min(1, lr strength) (p - w0)                     (L2-SP, arXiv 1802.01483, decoupled)
           - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

Both pulls and the decay see the p from before the step. At lr strength = 1 the pull ends at w0; more would overshoot,
and from 2 on diverge. EWC's gradient comes before the moments and after the clipping:
only the loss is clipped, and a clipped loss does not weaken what holds the weights. 1 - b and the corrections are made
in fp64, all else is fp32.

Weights are fp32; or bf16 with `rounding`: "stochastic" rounds the fp32 result up or down at random, right in the mean;
"split" keeps the lower half of an exact fp32 master in 16 bits beside the weight, which is its nearest bf16. To the
nearest without a master is not offered: a step below half an ulp would change nothing, ever. Moments are fp32, or 8
bits in blocks of 256 (`states`). `ftlab_kernels.adamw_kernels` has the formats.

Nothing waits for the device. Norm, whether to step at all, and t stay there: if a gradient is not finite, or the norm
above 1.8e19, nothing changes and t does not advance. At most three launches a step, however many tensors: sums of
squares, one program that decides, the step (one launch a group; tensors of other dtypes in it, or not at a multiple of
16 bytes, take one more). The first is left out where nothing needs it: without `max_grad_norm` (inf measures without
clipping) and with no scale to undo that might have overflowed.

Bytes for each parameter, and ms for 1e9 at 3.0 TB/s: fp32 28, 9.33; bf16 anchor + 2, 0.67; stochastic with fp32
moments 22, 7.33; split 26, 8.67; stochastic with 8-bit moments 10.06, 3.35 (and about 100 instructions for each, which
take as long); the norm + 4 or + 2, 1.33 or 0.67.

Differs from torch's fused AdamW: one pass for what clip_grad_norm_, GradScaler and regularisers do in passes of their
own; one launch for any number of tensors; gradients are not written back unscaled; no amsgrad, no maximize. From
bitsandbytes' 8 bits: no table of codes, rounding without bias, no tensor is exempt. From FlashOptim: ties go away from
zero, so that 16 bits of remainder always suffice.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from ftlab_kernels import adamw_kernels as columns
from ftlab_kernels.adamw_kernels import (
    BLOCK,
    decode_moments,
    encode_moments,
    join_master,
    random_bits,
    round_stochastic,
    split_master,
    square_root,
)
from ftlab_kernels.adamw_table import Layout, Member, Scales, Table, capturing, launches
from ftlab_kernels.aot import Shipped
from ftlab_kernels.common import ceil_div, require_triton

__all__ = ["Anchor", "Ewc", "FusedAdamW", "Options", "Rule", "join_master", "reference_step", "shipped", "split_master"]

ROUNDINGS = ("none", "stochastic", "split")
STATES = ("fp32", "8bit")
OURS = ("rounding", "states", "seed")  # keys of a group that torch's AdamW does not have
HELD = ("anchored", "held_by_ewc")  # and those that only say which of its parameters are held
DTYPES = (torch.float32, torch.bfloat16)
# What the groups of torch's AdamW hold; fused, so that it finds the steps on the device when it goes on from ours.
TORCHS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": True,
    "decoupled_weight_decay": True,
}
COLUMN_OF = {
    "step": columns.STEP,
    "exp_avg": columns.EXP_AVG,
    "exp_avg_sq": columns.EXP_AVG_SQ,
    "remainder": columns.REMAINDER,
    "exp_avg_absmax": columns.EXP_AVG_ABSMAX,
    "exp_avg_sq_absmax": columns.EXP_AVG_SQ_ABSMAX,
}


class Anchor(NamedTuple):
    """Pulls a parameter to `tensor` (its shape; fp32 or bf16), by min(1, lr * strength) of the distance in a step."""

    tensor: Tensor
    strength: float


class Ewc(NamedTuple):
    """Adds strength * fisher * (p - anchor) to a parameter's gradient; tensors of its shape, fp32 or bf16."""

    fisher: Tensor
    anchor: Tensor
    strength: float


class Options(TypedDict, total=False):
    """The keywords of FusedAdamW. rounding, states and seed may also stand in a group."""

    max_grad_norm: float | None
    anchors: Mapping[Tensor, Anchor | tuple[Tensor, float]] | None
    ewc: Mapping[Tensor, Ewc | tuple[Tensor, Tensor, float]] | None
    rounding: str
    states: str
    seed: int


@dataclass(frozen=True)
class Rule:
    """The numbers and formats of a group."""

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    rounding: str = "none"
    states: str = "fp32"
    seed: int = 0

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Rule:
        """That of an optimizer's group. Errors: ValueError for a number or word out of range."""
        rule = cls(**{field.name: group[field.name] for field in fields(cls)})
        if isinstance(rule.lr, Tensor):
            if rule.lr.numel() != 1 or rule.lr.dtype != torch.float32:
                raise ValueError("a learning rate that is a tensor must be fp32 and have one element")
        elif not rule.lr >= 0:
            raise ValueError(f"lr must be at least 0, not {rule.lr}")
        if not all(isinstance(beta, float | int) and 0 <= beta < 1 for beta in rule.betas):
            raise ValueError(f"betas must be numbers in [0, 1), not {rule.betas}")
        if not (rule.eps >= 0 and rule.weight_decay >= 0):
            raise ValueError(f"eps and weight_decay must be at least 0, not {rule.eps} and {rule.weight_decay}")
        if rule.rounding not in ROUNDINGS or rule.states not in STATES:
            raise ValueError(
                f"rounding is one of {ROUNDINGS} and states of {STATES}, not {rule.rounding}, {rule.states}"
            )
        if not 0 <= rule.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), not {rule.seed}")
        if group.get("amsgrad") or group.get("maximize"):
            raise ValueError("FusedAdamW knows neither amsgrad nor maximize")
        return rule

    def kind(self, param: Tensor) -> str:
        """How the kernel writes a parameter."""
        return self.rounding if param.dtype == torch.bfloat16 else "fp32"

    def fill(self, state: dict[str, Any], param: Tensor) -> None:
        """Add what a parameter's state still lacks: zeros."""
        wide = torch.promote_types(param.dtype, torch.float32)
        eight = self.states == "8bit"
        wanted: dict[str, tuple[Sequence[int], torch.dtype]] = {
            "step": ((), torch.float32),
            "exp_avg": (param.shape, torch.int8 if eight else wide),
            "exp_avg_sq": (param.shape, torch.uint8 if eight else wide),
        }
        if eight:
            scales = ((ceil_div(param.numel(), BLOCK),), wide)
            wanted |= {"exp_avg_absmax": scales, "exp_avg_sq_absmax": scales}
        if self.kind(param) == "split":
            wanted["remainder"] = (param.shape, torch.int16)
        for name, (shape, dtype) in wanted.items():
            if name not in state:
                state[name] = torch.zeros(tuple(shape), dtype=dtype, device=param.device)
            elif state[name].dtype != dtype or state[name].shape != tuple(shape):
                found = f"{state[name].dtype} {tuple(state[name].shape)}"
                raise ValueError(f"the state {name} must be {dtype} {tuple(shape)}, not {found}")


# --- the reference ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    rule: Rule | None = None,
    *,
    max_grad_norm: float | None = None,
    inv_scale: float = 1.0,
    anchors: Sequence[Anchor | None] | None = None,
    ewc: Sequence[Ewc | None] | None = None,
) -> Tensor:
    """One step in plain torch; params and states (as the optimizer's, empty at first) change in place. Gives the norm.

    The place of a parameter among `params` is that of its random bits. fp64 throughout for fp64 parameters.
    """
    rule = rule or Rule()
    wides = [torch.promote_types(p.dtype, torch.float32) for p in params]
    unscaled = [g.to(wide) * inv_scale for g, wide in zip(grads, wides, strict=True)]
    norm = torch.stack([g.square().sum() for g in unscaled]).sum().sqrt() if unscaled else torch.zeros(())
    if not bool(torch.isfinite(norm)):
        return norm
    clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (float(norm) + 1e-6))
    nothing = [None] * len(params)
    held = zip(params, unscaled, states, anchors or nothing, ewc or nothing, strict=True)
    for place, (p, g, state, anchor, elastic) in enumerate(held):
        rule.fill(state, p)
        weight = join_master(p, state["remainder"]) if rule.kind(p) == "split" else p.to(wides[place])
        state["step"] += 1
        g = g * clip
        if elastic is not None:
            g = g + elastic.strength * elastic.fisher.to(g.dtype) * (weight - elastic.anchor.to(g.dtype))
        _write(p, state, rule, place, *_moved(weight, g, state, rule, anchor))
    return norm


def _moved(
    weight: Tensor, g: Tensor, state: dict[str, Any], rule: Rule, anchor: Anchor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The new weight and moments, before any of them is rounded."""
    t, lr, (beta_1, beta_2) = float(state["step"]), float(rule.lr), rule.betas
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if rule.states == "8bit":
        scales = state["exp_avg_absmax"], state["exp_avg_sq_absmax"]
        m, v = (x.view(weight.shape) for x in decode_moments(m.flatten(), v.flatten(), *scales))
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g.square()
    corrected = square_root(v / (1 - beta_2**t)) + rule.eps
    new = weight - lr * rule.weight_decay * weight - lr / (1 - beta_1**t) * m / corrected
    if anchor is not None:
        new = new - min(1.0, lr * anchor.strength) * (weight - anchor.tensor.to(weight.dtype))
    return new, m, v


def _write(p: Tensor, state: dict[str, Any], rule: Rule, place: int, new: Tensor, m: Tensor, v: Tensor) -> None:
    """Round the new weight and moments and put them in place."""
    bits = torch.zeros(0)
    if rule.states == "8bit" or rule.kind(p) == "stochastic":
        bits = random_bits(rule.seed, int(state["step"]), place, p.numel()).to(p.device)
    if rule.kind(p) == "stochastic":
        new = round_stochastic(new, bits)
    elif rule.kind(p) == "split":
        new, remainder = split_master(new)
        state["remainder"].copy_(remainder)
    p.copy_(new)
    if rule.states == "8bit":
        m, v, m_scale, v_scale = encode_moments(m.flatten(), v.flatten(), bits)
        state["exp_avg_absmax"].copy_(m_scale)
        state["exp_avg_sq_absmax"].copy_(v_scale)
    state["exp_avg"].copy_(m.view(p.shape))
    state["exp_avg_sq"].copy_(v.view(p.shape))


# --- the optimizer ----------------------------------------------------------------------------------------------------


class FusedAdamW(torch.optim.Optimizer):
    """AdamW as at the top of this file; torch.optim.AdamW's arguments, groups and state.

    max_grad_norm: clip to this norm over all groups. anchors, ewc: by parameter; strength 0 is as if it were not there.
    rounding: "stochastic" or "split" for bf16 parameters. states: "fp32" or "8bit". seed: of the random rounding,
    whose bits are a function of seed, step and element, so that a resumed run draws the same.

    A float lr is an argument of the launch. In a CUDA graph it would be frozen: there let lr be a tensor on the device,
    as for torch's own, take one step before the capture, and keep the captured gradients.

    GradScaler: scaler.step(optimizer) hands scale and found_inf to the step, which unscales. Or step(inv_scale=...).

    State: step, exp_avg, exp_avg_sq as torch's, fp32 also beside bf16 weights; remainder (int16) for split;
    exp_avg_absmax, exp_avg_sq_absmax with 8-bit moments. A state_dict of torch.optim.AdamW can be loaded where states
    is fp32, and torch's loads that of fp32 parameters and states. Anchors and Fisher information are the caller's and
    not in it; which parameters are held is, and loading refuses where that is another set.

    Errors: ValueError for parameters that are not fp32 or bf16, not contiguous, on several devices, and bf16 ones
    without a rounding; KernelUnavailableError where Triton cannot run.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        if unknown := set(options) - set(Options.__annotations__):
            raise TypeError(f"FusedAdamW has no argument {', '.join(sorted(unknown))}")
        self.max_grad_norm = options.get("max_grad_norm")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, not {self.max_grad_norm}")
        # What has strength 0 is left out, so that it costs nothing and changes no bit.
        self._anchors = {p: Anchor(*given) for p, given in (options.get("anchors") or {}).items() if given[-1] != 0}
        self._ewc = {p: Ewc(*given) for p, given in (options.get("ewc") or {}).items() if given[-1] != 0}
        self._forget()
        formats = {name: options.get(name, getattr(Rule(), name)) for name in OURS}
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **TORCHS, **formats}
        )
        known = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) not in known for p in (*self._anchors, *self._ewc)):
            raise ValueError("an anchor belongs to a tensor that is not a parameter of this optimizer")

    def _forget(self) -> None:
        """Drop what is derived from groups, state and gradients, but not the memory that captured graphs write."""
        kept = self.__dict__
        self._in_graphs: list[Table] = kept.get("_in_graphs", [])
        if (table := kept.get("_table")) is not None and table.captured:
            self._in_graphs.append(table)
        self._table: Table | None = None
        self._built_for: Any = None
        self._results: Tensor | None = kept.get("_results")
        self._measured = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group that the kernels cannot take is refused."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        rule = Rule.of(group)
        for p in group["params"]:
            where = f"a parameter of shape {tuple(p.shape)}"
            if p.dtype not in DTYPES:
                raise ValueError(f"{where} is {p.dtype}; FusedAdamW takes fp32 and bf16")
            if rule.kind(p) == "none":
                raise ValueError(f'{where} is bf16, which needs rounding="stochastic" or rounding="split"')
            if not p.is_contiguous():
                raise ValueError(f"{where} is not contiguous; make it so before it becomes a parameter")
            for tensor, strength in self._held_by(p):
                if tensor.shape != p.shape or tensor.dtype not in DTYPES or not tensor.is_contiguous():
                    raise ValueError(f"the anchor or Fisher information of {where} must be like it, fp32 or bf16")
                if not 0 <= strength < math.inf:
                    raise ValueError(f"strength must be at least 0 and finite, not {strength}")
        group["anchored"] = [p in self._anchors for p in group["params"]]
        group["held_by_ewc"] = [p in self._ewc for p in group["params"]]
        require_triton(*(p for other in self.param_groups for p in other["params"]))

    def _held_by(self, p: Tensor) -> list[tuple[Tensor, float]]:
        """The tensors that hold a parameter, each with its strength."""
        found = [(each.tensor, each.strength) for each in (self._anchors.get(p),) if each is not None]
        for each in (self._ewc.get(p),):
            found += [] if each is None else [(each.fisher, each.strength), (each.anchor, each.strength)]
        return found

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's unscaled gradients before clipping, on the device; None if it was not measured.

        The same memory in every step: copy what is to be kept.
        """
        return self._results[0] if self._results is not None and self._measured else None

    def master(self, param: Tensor) -> Tensor:
        """The fp32 value of a parameter; for rounding="split" exact."""
        remainder = self.state.get(param, {}).get("remainder")
        return param.detach().float() if remainder is None else join_master(param.detach(), remainder)

    @torch.no_grad()
    def step(self, closure: Any = None, *, inv_scale: Tensor | None = None) -> Any:
        """One step of all parameters that have a gradient. inv_scale: a tensor of one element on their device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scales = Scales(inv_scale, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        if params:
            device = params[0].device
            scales.check(device)
            if not all(map(Tensor.is_contiguous, grads)):
                grads = [_dense(g) for g in grads]  # the copies must live until the launches
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                self._launch(self._up_to_date(params, grads), scales)
        return loss

    def _launch(self, table: Table, scales: Scales) -> None:
        if self._results is None:
            self._results = torch.zeros(3, dtype=torch.float32, device=table.device)
        scaled = scales.inv_scale is not None or scales.grad_scale is not None
        self._measured = self.max_grad_norm is not None or (scaled and scales.found_inf is None)
        if self._measured:
            table.measure(scales)
        table.decide(self._results, scales, self.max_grad_norm, measured=self._measured)
        table.step(self._results, self.param_groups)

    def _up_to_date(self, params: list[Tensor], grads: list[Tensor]) -> Table:
        """The table of these tensors, from before if it is still right."""
        wanted = self._identity(params)
        table = self._table
        if table is not None and wanted == self._built_for and table.fits() and table.refresh(grads):
            return table
        device = params[0].device
        if capturing(device):
            raise RuntimeError("take a step with these parameters before one is captured in a CUDA graph")
        if table is not None and table.captured:
            self._in_graphs.append(table)
        self._table = table = Table(self._members({id(p) for p in params}), grads, device)
        self._built_for = self._identity(params)
        return table

    def _identity(self, params: list[Tensor]) -> tuple[list[Any], ...]:
        """What a table was built of: the parameters and all states as objects, and the numbers in it."""
        groups = [(*group["betas"], *(group[name] for name in OURS)) for group in self.param_groups]
        states = chain.from_iterable(map(dict.values, self.state.values()))
        return list(map(id, params)), list(map(id, self.state)), list(map(id, states)), groups

    def _members(self, wanted: set[int]) -> list[Member]:
        """What the table is built of; new states where there are none. Places count all parameters, also idle ones."""
        found = []
        place = -1
        for index, group in enumerate(self.param_groups):
            self._check_group(group)
            rule = Rule.of(group)
            pulls = [self._anchors[p].tensor.dtype for p in group["params"] if p in self._anchors]
            elastic = [self._ewc[p] for p in group["params"] if p in self._ewc]
            usual = (pulls[0] if pulls else None, *_dtypes(elastic[0] if elastic else None, (None, None)))
            for p in group["params"]:
                place += 1
                if id(p) not in wanted:
                    continue
                rule.fill(self.state[p], p)
                tensors = {column: self.state[p][name] for name, column in COLUMN_OF.items() if name in self.state[p]}
                pull, ewc = self._anchors.get(p), self._ewc.get(p)
                tensors |= {columns.PARAM: p} | ({} if pull is None else {columns.ANCHOR: pull.tensor})
                tensors |= {} if ewc is None else {columns.FISHER: ewc.fisher, columns.EWC_ANCHOR: ewc.anchor}
                # A tensor that nothing holds goes through the kernel of those that are held: one launch for all.
                dtypes = (usual[0] if pull is None else pull.tensor.dtype, *_dtypes(ewc, usual[1:]))
                layout = Layout(rule.kind(p), rule.states == "8bit", *dtypes)
                strengths = (0.0 if pull is None else pull.strength, 0.0 if ewc is None else ewc.strength)
                rates = (_ln(rule.betas[0]), _ln(rule.betas[1]))
                found.append(Member(index, place, rule.seed, layout, tensors, strengths, rates))
        return found

    # --- saving and loading ---

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From `state_dict()` of this class or of torch.optim.AdamW; the tensors are copied.

        Errors: ValueError where it was saved with other formats or with other parameters held.
        """
        loaded: dict[str, Any] = {}

        # torch would cast every state to its parameter's dtype, so it gets none: between the hooks, which see all.
        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            groups = [_completed(*pair) for pair in zip(self.param_groups, given["param_groups"], strict=False)]
            loaded.update(given)
            return {**given, "state": {}, "param_groups": groups + given["param_groups"][len(groups) :]}

        def put(_: torch.optim.Optimizer) -> None:
            saved = [number for group in loaded["param_groups"] for number in group["params"]]
            params = [(p, group) for group in self.param_groups for p in group["params"]]
            for number, (p, group) in zip(saved, params, strict=True):
                if number in loaded["state"]:
                    self.state[p] = _loaded(loaded["state"][number], p, Rule.of(group))

        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: what torch keeps, the limit of the norm and the anchors."""
        ours = {"max_grad_norm": self.max_grad_norm, "_anchors": self._anchors, "_ewc": self._ewc}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also part of loading a state_dict."""
        super().__setstate__(state)
        self._forget()


def _dense(grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        raise ValueError("FusedAdamW does not take sparse gradients")
    return grad if grad.is_contiguous() else grad.contiguous()


def _ln(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _dtypes(ewc: Ewc | None, otherwise: Any) -> Any:
    return otherwise if ewc is None else (ewc.fisher.dtype, ewc.anchor.dtype)


def _completed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with what torch's AdamW does not save. Errors: ValueError if it does not suit our formats."""
    if "states" not in theirs and ours["states"] != "fp32":
        raise ValueError(f"the saved state has fp32 moments, states={ours['states']!r} cannot go on from them")
    same = len(ours["params"]) == len(theirs["params"])  # if not, torch says so
    for name in ("rounding", "states", *(HELD if same else ())):
        if theirs.get(name, ours[name]) != ours[name]:
            raise ValueError(f"saved with {name} = {theirs[name]}, which is {ours[name]} here")
    group = {**{name: ours[name] for name in (*OURS, *HELD)}, **theirs, "fused": True}
    Rule.of(group)
    return group


def _loaded(saved: Mapping[str, Any], p: Tensor, rule: Rule) -> dict[str, Any]:
    """Copies of saved states on the parameter's device; integers and fp32, whatever the parameter is."""
    state = {}
    for name, value in saved.items():
        x = torch.as_tensor(value)
        dtype = torch.float32 if x.is_floating_point() else x.dtype
        state[name] = x.to(p.device, dtype, copy=True).contiguous()
    rule.fill(state, p)
    return state


def shipped() -> list[Shipped]:
    """What is compiled ahead of time: the step in each format, the norm of fp32 and bf16 gradients, the decision."""
    return launches()
