"""The training loop: the only one.

`fit` turns over steps; `train_step` is one optimizer step and takes everything it needs as an argument. Full
fine-tuning, LoRA and every regularizer run through here unchanged: they differ by the objects handed in.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ftlab.config import CheckpointConfig
from ftlab.data.loader import Batch, RowLoader, split_rows
from ftlab.errors import DivergenceError, FtlabError
from ftlab.evaluation.metrics import LOWER_IS_BETTER
from ftlab.losses.penalties import Penalty
from ftlab.losses.scalars import collecting
from ftlab.optim.adamw import set_lr
from ftlab.training.checkpoint import Checkpoints
from ftlab.training.hooks import Hook
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from ftlab.training.progress import Progress
from ftlab.training.record import peak_device_bytes, peak_rss_bytes
from ftlab.training.signals import Interrupted, StopSignal
from ftlab.training.state import TrainState, capture_rng
from ftlab.training.tracking import Tracker

__all__ = ["Climb", "Fit", "Limits", "StepResult", "fit", "save_state", "train_step", "validation_steps"]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, over all ranks."""

    nats: float  # summed loss of the supervised tokens, without penalties
    supervised: int
    tokens: int
    grad_norm: float  # before clipping
    penalties: dict[str, float]
    penalty_norms: dict[str, float]  # norm of each penalty's own gradient, where that was asked for
    noted: dict[str, float]  # what regularizers noted, summed as the loss is
    applied: bool  # False: a gradient was not finite and the weights did not move


Climb = Callable[[nn.Module], contextlib.AbstractContextManager[None]]
"""Moves the weights by means of their gradients; at the context's end they are back, bit for bit."""


def train_step(
    replica: Replica,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    precision: Precision,
    penalties: Sequence[Penalty] = (),
    max_grad_norm: float | None = None,
    climb: Climb | None = None,
    measure_penalties: bool = False,
) -> StepResult:
    """One optimizer step over `micro_batches`: this rank's part of the global batch, at least one.

    The loss is the sum over all micro-batches and ranks divided once by their supervised tokens, counted before the
    first backward, so the gradient does not depend on how the batch was split. DistributedDataParallel averages over
    ranks; the factor `world` undoes that. Penalties join the last micro-batch, equal on every rank.

    climb: the step follows the gradient of the weights moved like that, and reports the loss of those not moved; how
    much higher the other one is, is noted.
    measure_penalties: take the norm of each penalty's gradient too, which costs a backward pass of the penalty.
    """
    ranks = replica.ranks
    local = [float(sum(b.num_supervised for b in micro_batches)), float(sum(b.num_tokens for b in micro_batches))]
    supervised, tokens = (int(total) for total in ranks.sums(local))
    if supervised == 0:
        raise FtlabError("a global batch without a single supervised token; the loader must not yield one")

    optimizer.zero_grad(set_to_none=True)
    norms: dict[str, float] = {}
    measured = norms if measure_penalties else None
    nats, noted, values = _accumulate(replica, micro_batches, supervised, precision, penalties, measured)
    if climb is not None:
        with climb(replica.model):
            optimizer.zero_grad(set_to_none=True)
            noted["sam/rise"] = _accumulate(replica, micro_batches, supervised, precision, penalties)[0] - nats
    total_nats, *totals = ranks.sum(torch.stack([nats, *noted.values()])).tolist()
    grad_norm, applied = precision.step(optimizer, max_grad_norm, finite=math.isfinite(total_nats))
    optimizer.zero_grad(set_to_none=True)
    sums = dict(zip(noted, totals, strict=True))
    return StepResult(total_nats, supervised, tokens, grad_norm, values, norms, sums, applied)


def _accumulate(
    replica: Replica,
    micro_batches: Sequence[Batch],
    supervised: int,
    precision: Precision,
    penalties: Sequence[Penalty],
    norms: dict[str, float] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    """Add the gradient of the global batch to the parameters; this rank's nats and notes, and each penalty's value.

    norms: is filled with the norm of each penalty's gradient.
    """
    ranks = replica.ranks
    nats = torch.zeros((), dtype=torch.float64, device=ranks.device)
    noted: dict[str, torch.Tensor] = {}
    values: dict[str, float] = {}
    for number, batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with replica.sync(last):
            with precision.autocast(), collecting(noted):
                loss_sum = replica(batch.to(ranks.device))
            nats += loss_sum.detach().double()
            loss = loss_sum * (ranks.world / supervised)
            if last:
                for penalty in penalties:
                    value = penalty.value(replica.model)
                    values[penalty.name] = float(value.detach())
                    if norms is not None and value.requires_grad:
                        norms[penalty.name] = _gradient_norm(value, replica.model)
                    loss = loss + value
            precision.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    return nats, noted, values


def _gradient_norm(value: torch.Tensor, model: nn.Module) -> float:
    """Of a penalty's gradient over everything that trains; what backward adds later is not touched."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return float(torch.nn.utils.get_total_norm([gradient for gradient in found if gradient is not None]))


@dataclass(frozen=True)
class Limits:
    """When things happen, in optimizer steps."""

    total_steps: int
    validate_at: frozenset[int]
    log_every: int
    max_bad_steps: int
    max_grad_norm: float | None


def validation_steps(total_steps: int, every_steps: int | None, times: int) -> frozenset[int]:
    """After which steps to validate: every so many, or `times` spread evenly; the last step is always among them."""
    if every_steps is not None:
        return frozenset([*range(every_steps, total_steps, every_steps), total_steps])
    return frozenset(round(total_steps * (i + 1) / times) for i in range(times)) - {0}


@dataclass
class Fit:
    """What the loop works with besides the state."""

    replica: Replica
    loader: RowLoader
    schedule: Callable[[int], float]
    penalties: Sequence[Penalty]
    limits: Limits
    checkpoint: CheckpointConfig
    checkpoints: Checkpoints
    tracker: Tracker
    progress: Progress
    stop: StopSignal
    micro_batch_size: int
    validate: Callable[[int], Mapping[str, float]] | None = None  # None: nothing to validate on
    on_step: Callable[[int, StepResult, tuple[str, ...]], None] | None = None
    hooks: Sequence[Hook] = ()
    climb: Climb | None = None
    last_save: float = field(default_factory=time.monotonic)
    saved_step: int = -1
    log_time: float = field(default_factory=time.monotonic)
    log_tokens: int = 0  # since log_time


def fit(state: TrainState, run: Fit) -> None:
    """Train from where `state` stands to the last step, or until patience is spent.

    Raises:
        Interrupted: a signal asked for it; the state was saved first.
        DivergenceError: too many steps in a row with a non-finite gradient; the state was saved first.
    """
    ranks = run.replica.ranks
    _validate_if_due(state, run)
    for step in range(state.counters.step, run.limits.total_steps):
        if _out_of_patience(state, run):
            break
        _save_or_stop(state, run)
        for hook in run.hooks:
            hook.before_step(state, run)
        micro_batches, ids = _next_batches(state, run, ranks)
        rate = set_lr(state.optimizer, run.schedule(state.counters.updates))
        result = train_step(
            run.replica,
            state.optimizer,
            micro_batches,
            precision=state.precision,
            penalties=run.penalties,
            max_grad_norm=run.limits.max_grad_norm,
            climb=run.climb,
            measure_penalties=_logs(state.counters.step + 1, run.limits),
        )
        _count(state, result, ids)
        for hook in run.hooks:
            hook.after_step(state, run, result)
        run.log_tokens += result.tokens
        if run.on_step is not None:
            run.on_step(step, result, ids)
        _log(state, run, result, rate)
        _check_divergence(state, run)
        _validate_if_due(state, run)
        every = run.checkpoint.every_steps
        if every is not None and state.counters.step % every == 0:
            save_state(state, run)
    _save_or_stop(state, run)
    if state.counters.step != run.saved_step:
        save_state(state, run)


def _next_batches(state: TrainState, run: Fit, ranks: Ranks) -> tuple[list[Batch], tuple[str, ...]]:
    """This rank's micro-batches of the next global batch, the ids of all its examples, and the cursor moved on."""
    counters = state.counters
    rows = run.loader.global_batch(counters.epoch, counters.index)
    counters.index += 1
    if counters.index >= run.loader.steps_in_epoch(counters.epoch):
        counters.epoch, counters.index = counters.epoch + 1, 0
    ids = tuple(run.loader.examples[i].id for row in rows for i in row)
    mine = split_rows(rows, ranks.rank, ranks.world, run.micro_batch_size)
    if mine:
        return [run.loader.collate(part) for part in mine], ids
    # With fewer rows than ranks, the others must still take part in the gradient exchange, with nothing to say.
    return [run.loader.collate(rows[:1]).unsupervised()], ids


def _count(state: TrainState, result: StepResult, ids: tuple[str, ...]) -> None:
    counters = state.counters
    counters.step += 1
    counters.consume(ids)
    counters.tokens += result.tokens
    counters.supervised += result.supervised
    if result.applied:
        counters.bad_in_a_row = 0
        counters.window_nats += result.nats
        counters.window_supervised += result.supervised
        noted = counters.window_noted
        counters.window_noted = {name: noted.get(name, 0.0) + value for name, value in result.noted.items()}
    else:
        counters.skipped += 1
        counters.bad_in_a_row += 1


def _logs(step: int, limits: Limits) -> bool:
    """Whether this step, counted from 1, gets a line."""
    return step % limits.log_every == 0 or step == limits.total_steps


def _log(state: TrainState, run: Fit, result: StepResult, rate: float) -> None:
    counters, limits = state.counters, run.limits
    if not _logs(counters.step, limits):
        return
    now = time.monotonic()
    device = run.replica.ranks.device
    whole = result.grad_norm
    shares = result.penalty_norms if whole != 0 else {}  # 0: dropout may leave nothing to learn from
    values: dict[str, Any] = {
        "loss": counters.window_nats / counters.window_supervised if counters.window_supervised else float("nan"),
        "lr": rate,
        "grad_norm": whole,
        **{f"penalty/{name}": value for name, value in result.penalties.items()},
        **{f"penalty_share/{name}": norm / whole for name, norm in shares.items()},
        **{name: total / counters.window_supervised for name, total in counters.window_noted.items()},
        **{name: value for hook in run.hooks for name, value in hook.scalars(state).items()},
        "tokens": counters.tokens,
        "supervised_tokens": counters.supervised,
        "epoch": counters.epoch + counters.index / run.loader.steps_in_epoch(counters.epoch),
        "skipped_steps": counters.skipped,
        "tokens_per_second": run.log_tokens / max(now - run.log_time, 1e-9),
        "memory_bytes": peak_device_bytes(device) or peak_rss_bytes(),
    }
    if state.precision.scaler.is_enabled():
        values["loss_scale"] = state.precision.scaler.get_scale()
    run.tracker.log(counters.step, "train", {**values, "data_digest": counters.data_digest})
    run.progress.update(counters.step, values)
    counters.window_nats, counters.window_supervised, counters.window_noted = 0.0, 0, {}
    run.log_time, run.log_tokens = now, 0


def _check_divergence(state: TrainState, run: Fit) -> None:
    counters, scaler = state.counters, state.precision.scaler
    if counters.bad_in_a_row == 0:
        return
    run.progress.message(f"step {counters.step}: a gradient was not finite; the weights did not move")
    settling = scaler.is_enabled() and scaler.get_scale() > 1  # fp16 finds its loss scale by overflowing
    if counters.bad_in_a_row >= run.limits.max_bad_steps and not settling:
        save_state(state, run)
        raise DivergenceError(
            f"{counters.bad_in_a_row} steps in a row had a non-finite gradient, up to step {counters.step}; lower "
            "optimizer.lr, set optimizer.max_grad_norm, or look at the data of those steps"
        )


def _validate_if_due(state: TrainState, run: Fit) -> None:
    """Validate after this step if that is due and not done yet, and keep the weights if they are the best so far.

    The state is saved before, so that being stopped meanwhile loses nothing, and after, so that a checkpoint never
    calls weights the best that do not stand beside it.
    """
    counters = state.counters
    if run.validate is None or counters.step not in run.limits.validate_at or counters.validated_step >= counters.step:
        return
    begin = time.monotonic()
    if counters.step != run.saved_step:
        save_state(state, run)
    with contextlib.ExitStack() as around:
        for hook in run.hooks:
            around.enter_context(hook.validating(state))
        better = _validate(state, run, run.validate)
    for hook in run.hooks:
        hook.after_validation(state, run, better=better)
    save_state(state, run)
    run.log_time += time.monotonic() - begin


def _validate(state: TrainState, run: Fit, validate: Callable[[int], Mapping[str, float]]) -> bool:
    """Whether the weights are better than at every validation before; if so they are kept."""
    counters, ranks = state.counters, run.replica.ranks
    # Several ranks must leave a validation together, so there a signal waits for its end.
    with run.stop.at_once() if ranks.world == 1 else contextlib.nullcontext():
        values = validate(counters.step)
    counters.validated_step = counters.step
    metric = run.checkpoint.metric
    if metric not in values:
        raise FtlabError(f"checkpoint.metric={metric} is not among what validation measured: {', '.join(values)}")
    value = float(values[metric])
    falls = run.checkpoint.mode == "min" or (run.checkpoint.mode == "auto" and metric in LOWER_IS_BETTER)
    best = counters.best_value
    better = value == value and (best is None or (value < best if falls else value > best))
    if better:
        if ranks.agree(ranks.is_main and run.checkpoints.save_best(counters.step, state.trainable())):
            counters.best_step, counters.best_value, counters.worse_in_a_row = counters.step, value, 0
    else:
        counters.worse_in_a_row += 1
    return better


def _out_of_patience(state: TrainState, run: Fit) -> bool:
    patience = run.checkpoint.patience
    if patience is None or state.counters.worse_in_a_row < patience:
        return False
    run.progress.message(
        f"stopped after step {state.counters.step}: {patience} validations in a row without a better "
        f"{run.checkpoint.metric} than {state.counters.best_value} at step {state.counters.best_step}"
    )
    return True


def _save_or_stop(state: TrainState, run: Fit) -> None:
    """Save when the minutes are up; save and stop when any rank received a signal."""
    minutes = run.checkpoint.every_minutes
    due = minutes is not None and time.monotonic() - run.last_save >= minutes * 60
    ranks = run.replica.ranks
    received = run.stop.received or 0
    signal_sum, due_sum = ranks.sums([float(received), float(due and ranks.is_main)])
    if signal_sum:
        signum = max(ranks.gather(received))
        if state.counters.step != run.saved_step:
            save_state(state, run)
        raise Interrupted(signum)
    if due_sum:
        save_state(state, run)


def save_state(state: TrainState, run: Fit) -> bool:
    """Write a checkpoint of this step from the main rank; every rank takes part. False if the disk refused."""
    ranks = run.replica.ranks
    rng = ranks.gather(capture_rng())
    saved = True
    if ranks.is_main:
        run.tracker.sync()
        saved = run.checkpoints.save(state.state_dict(rng))
    run.last_save = time.monotonic()
    saved = bool(ranks.agree(saved))
    if saved:
        run.saved_step = state.counters.step
    return saved
