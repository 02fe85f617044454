"""One training run from its configuration to its report."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftlab_kernels.check import KernelMismatchError

from ftlab import build, classify
from ftlab.compose import config_hash, run_folder, to_yaml
from ftlab.config import Config, GradualUnfreezeConfig, option_classes
from ftlab.data.loader import RowLoader
from ftlab.errors import ConfigError, FtlabError
from ftlab.evaluation.measure import Measured, Measures, require_finite
from ftlab.files import atomic_write
from ftlab.models.tokenizer import Tokenizer
from ftlab.operators import describe
from ftlab.optim.schedules import make_schedule
from ftlab.studies.report import write_report
from ftlab.training.averaging import Averaging
from ftlab.training.checkpoint import Checkpoints, read_checkpoint
from ftlab.training.loop import Fit, Limits, fit, validation_steps
from ftlab.training.parallel import Ranks, Replica, start_ranks
from ftlab.training.precision import Precision
from ftlab.training.preflight import preflight, static_memory
from ftlab.training.profiling import StepProfiler, window
from ftlab.training.progress import Progress, memory_size
from ftlab.training.record import RunRecord, peak_device_bytes, peak_rss_bytes, reset_peaks
from ftlab.training.run_dir import differences, needed_within, own_folder, set_aside
from ftlab.training.signals import Interrupted, StopSignal
from ftlab.training.state import TrainState, changed_inputs, seed_rng
from ftlab.training.tracking import Tracker, logged
from ftlab.training.unfreezing import Unfreezing

__all__ = ["train"]


def train(config: Config, resolved: dict[str, Any]) -> int:
    """Train, score and report; the exit status of the command."""
    try:
        with StopSignal() as stop, start_ranks(config.parallel) as ranks:
            reset_peaks(ranks.device)
            run_dir = run_folder(config, resolved)
            with own_folder(run_dir, ranks) as record:
                return _Session(config, resolved, run_dir, ranks, stop, record).whole()
    except Interrupted as interrupted:  # before the run had a folder, or by an impatient second signal
        return interrupted.exit_code


@dataclass
class _Phases:
    """Seconds spent in each phase, kept over interruptions."""

    record: RunRecord
    progress: Progress

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            with self.progress.phase(name):
                yield
        finally:
            spent = self.record.content.get("timings", {}).get(name, 0.0) + time.monotonic() - begin
            self.record.try_update(timings={name: round(spent, 3)})


class _Session:
    """The phases of one run, in order. Objects that several phases use are attributes; `run` sets them up."""

    def __init__(
        self,
        config: Config,
        resolved: dict[str, Any],
        run_dir: Path,
        ranks: Ranks,
        stop: StopSignal,
        record: RunRecord,
    ) -> None:
        self.config, self.resolved, self.run_dir = config, resolved, run_dir
        self.settled = build.with_absolute_paths(resolved)  # so that the run can be read from any folder
        self.needed = needed_within(run_dir, self.settled)
        self.opened = False
        self.fitting: Fit | None = None
        self.ranks, self.stop, self.record = ranks, stop, record
        self.hash = config_hash(resolved)
        self.progress = Progress(enabled=ranks.is_main)
        self.phase = _Phases(record, self.progress)
        self.tracker: Tracker | None = None
        self.warnings: list[str] = []

    def tell(self, line: str) -> None:
        """A line for the user now, and for the report."""
        self.warnings.append(line)
        self.progress.message(line)

    @property
    def again(self) -> str:
        """The command that goes on from here. never would set this run aside, and a path goes back to its checkpoint.

        Until something is saved in this folder that checkpoint is what there is to go on from.
        """
        resume = self.config.resume
        saved = self.fitting is not None and self.fitting.saved_step >= 0
        if resume == "auto" or not (self.opened if resume == "never" else saved):
            return "the same command"
        return f"the same command with resume=auto in place of resume={resume}"

    # --- the phases -------------------------------------------------------------------------------------------------

    def whole(self) -> int:
        """Everything, and an orderly end whatever happens; the exit status."""
        try:
            if not self.open_folder():
                return 0
            self.run()
        except Interrupted as interrupted:
            return self.end("interrupted", str(interrupted), interrupted.exit_code)
        except FtlabError as error:
            return self.end("failed", str(error), None, error)
        except KernelMismatchError as error:
            problem = FtlabError(f"{error}; kernels=reference trains without the kernel")
            return self.end("failed", str(problem), None, problem)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            problem = FtlabError(f"{where}{error.strerror or error}; put that right and give {self.again} again")
            return self.end("failed", str(problem), None, problem)
        except BaseException as error:
            self.end("failed", f"{type(error).__name__}: {error}", 1)
            raise
        return self.end("finished", "", 0)

    def run(self) -> None:
        """Everything from the first byte of data to the scores."""
        precision = Precision(self.config.precision, self.ranks.device)
        if any(dtypes != precision.dtypes for dtypes in self.ranks.gather(precision.dtypes)):
            raise FtlabError(
                "some processes have a processor that computes in bf16 and some have not; give precision=fp32, or "
                "FTLAB_BF16=always to all of them"
            )
        if precision.note is not None:
            self.tell(precision.note)
        self.record.update(dtypes=precision.dtypes)
        tokenizer, data, loader = self._read_data()
        steps = build.total_steps(self.config, loader)
        schedule = make_schedule(self.config.schedule, steps)  # a schedule that cannot be is refused before the model
        inputs = self._same_inputs(data, tokenizer)
        with self.phase("model"):
            built = self._build_model(tokenizer, precision, data)
        if (line := build.foreseen(self.config, built, loader, steps)) is not None:
            self.tell(line)
        penalties = {penalty.name: penalty.fingerprint() for penalty in built.penalties}
        state = TrainState(built.model, built.optimizer, precision, self.hash, inputs, penalties)
        self._describe(data, loader, built)
        saved = self._find_checkpoint()
        measurer = build.build_measurer(self.config, tokenizer, precision, self.ranks, data.labels)
        self._baseline(measurer, data, built)
        replica = Replica(built.model, built.objective, self.ranks)
        if self.config.training.preflight:
            self._preflight(replica, loader, built, steps)
        self._resume(saved, state)
        self.tracker = Tracker(
            self.run_dir,
            self.config.tracking,
            self.resolved,
            run_name=self.run_dir.name,
            resume_step=state.counters.step if saved is not None else None,
            enabled=self.ranks.is_main,
        )
        run = self.fitting = self._loop(replica, loader, schedule, steps, built)
        self._fit(run, state, built, measurer, data)
        if not self.config.training.preflight:
            self._tell_kernels(built)
        self._settle(state, run)
        self._finish(state, built, measurer, data)

    def _read_data(self) -> tuple[Tokenizer, build.DataSet, RowLoader]:
        with self.phase("data"):
            tokenizer = build.build_tokenizer(self.config)
            data = build.build_data(self.config, tokenizer)
            loader = build.build_loader(self.config, data, tokenizer)
        for note in data.notes:
            self.progress.message(note)
        evaluation, checkpoint = self.config.evaluation, self.config.checkpoint
        if not data.validation and (evaluation.times or evaluation.every_steps):
            if checkpoint.patience is not None:
                raise ConfigError("checkpoint.patience: there is no validation example to be patient with")
            method = self.config.method
            if isinstance(method, GradualUnfreezeConfig) and method.trigger == "stall":
                raise ConfigError(
                    "method.trigger: stall counts validations, and no validation example is left; give others, raise "
                    "data.max_length, or give method.trigger=epoch"
                )
            self.tell("no validation example: nothing is validated, and the last weights are the result")
        build.check_metric(self.config, data)
        classify.check_answers(self.config.data, data.splits)
        if not data.test and evaluation.test:
            self.tell("no test example: nothing is scored at the end")
        return tokenizer, data, loader

    def _same_inputs(self, data: build.DataSet, tokenizer: Tokenizer) -> dict[str, str]:
        """Hashes of what the run reads; those of an interrupted run in this folder must be the same."""
        inputs = build.fingerprints(self.config, data, tokenizer)
        before = self.record.content.get("inputs")
        if before is not None and (changed := changed_inputs(before, inputs)):
            raise FtlabError(
                f"the {' and the '.join(changed)} changed since this run began in {self.run_dir}; "
                f"{self._ways_out('restore what it was')}"
            )
        self.record.update(inputs=inputs)
        return inputs

    def _ways_out(self, *first: str) -> str:
        """What to do where the folder is not this run's. What this run itself reads there cannot be set aside."""
        ways = [*first, "give another run_dir"]
        ways += ["resume=never to set that run aside"] if self.needed is None else []
        return ", or ".join(filter(None, (", ".join(ways[:-1]), ways[-1])))

    def open_folder(self) -> bool:
        """Settle that this folder is this run's, and note what is known before any work.

        False: the run is finished already.

        Raises:
            FtlabError: it holds a run with another configuration, which is left untouched.
            ConfigError: with resume=never it holds something that this run is to read.
        """
        record, config = self.record, self.config
        if record.content and config.resume == "never":
            if self.needed is not None:
                raise ConfigError(
                    f"{self.needed}: that stands in {self.run_dir}, which resume=never would move away; give another "
                    "run_dir"
                )
            if self.ranks.is_main:
                self.progress.message(f"the earlier run was moved to {set_aside(self.run_dir)}")
            record.content = {}
            self.ranks.barrier()
        other = record.content.get("config_hash")
        if other not in (None, self.hash):
            changed = ", ".join(differences(record.content.get("config", {}), self.settled)[:5])
            raise FtlabError(f"{self.run_dir} holds a run with another configuration ({changed}); {self._ways_out()}")
        if config.resume == "auto" and record.status == "finished":
            tokenizer = build.build_tokenizer(config)
            self._same_inputs(build.build_data(config, tokenizer), tokenizer)
            anew = " (resume=never runs it anew)" if self.needed is None else ""
            self.progress.message(f"already finished: {self.run_dir}/report.html{anew}")
            self.progress.close()
            return False
        self.opened = True
        record.begin(config.name, self.hash, self.ranks.device, self.ranks.world)
        record.update(config=self.settled, classes=option_classes(config), seeds={"training": config.training.seed})
        if self.ranks.is_main:
            atomic_write(self.run_dir / "config.yaml", to_yaml(self.settled))
        self.progress.message(f"run folder {self.run_dir}")
        return True

    def _build_model(self, tokenizer: Tokenizer, precision: Precision, data: build.DataSet) -> build.Built:
        if data.labels is not None and (line := classify.about_head(self.config, data.labels)):
            self.tell(line)
        model, method = build.build_base(self.config, tokenizer, self.ranks, data.labels)
        build.check_texts(data, model)
        self.record.update(model=build.model_facts(self.config, model))
        return build.build_training(self.config, model, method, precision)

    def _describe(self, data: build.DataSet, loader: RowLoader, built: build.Built) -> None:
        rows = [asdict(row) for row in built.rows]
        self.record.update(
            data={
                **data.source.as_dict(),
                "notes": list(data.notes),
                "train": len(data.train),
                "validation": len(data.validation),
                "test": len(data.test),
                "train_tokens": sum(len(e.token_ids) for e in data.train),
                "train_supervised": sum(e.num_supervised for e in data.train),
                "rows_in_epoch": len(loader.rows(0)),
                **({} if loader.replay is None else {"replayed_in_epoch": loader.replay.count(loader.new)}),
            },
            labels=None if data.labels is None else data.labels.as_dict(),
            parameters=rows,
            kernels={"chosen": built.kernels},
            memory=static_memory(
                built.model.parameters(),
                built.model.buffers(),
                state=getattr(self.config.optimizer, "state", "fp32"),
            ),
        )
        trainable = sum(row["count"] for row in rows if row["trainable"])
        total = sum(row["count"] for row in rows)
        self.progress.message(
            f"{len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test examples; "
            f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %)"
        )
        self.progress.message(built.kernels)
        for note in built.notes:
            self.tell(note)
        for row in rows:
            how = f"trains, rate x {row['lr_scale']:g}" if row["trainable"] else "frozen"
            share = f"{100 * row['count'] / total:6.2f} %"
            self.progress.message(
                f"  {row['count']:>13,} ({share}) in {row['tensors']:>4} tensors  {how:<18}  {row['rule']}"
            )
        if not self.config.training.preflight:
            self._tell_memory()

    def _tell_memory(self) -> None:
        """Weights, gradients, optimizer state and activations, in bytes, as far as they are known before step 1."""
        memory = self.record.content["memory"]
        words = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer state"}
        parts = [f"{word} {memory_size(memory[key])}" for key, word in words.items()]
        kept = memory.get("activations")
        parts.append(f"activations {'not measured' if kept is None else memory_size(kept)}")
        self.progress.message(f"memory: {', '.join(parts)}")

    def _test(self, measurer: Measures, data: build.DataSet, built: build.Built, who: str) -> None:
        """Score the test split and keep scores and answers under `who` (base or final)."""
        records = data.splits.test if self.config.evaluation.generate else []
        with self.phase(f"test_{who}"):
            measured = measurer.measure(built.model, data.test, records, progress=self.progress.count)
        self.record.update(scores={who: {name: score.as_dict() for name, score in measured.scores.items()}})
        if measured.details:
            self.record.update(classification={who: measured.details})
        if self.ranks.is_main and measured.predictions:
            lines = [json.dumps(p.as_dict(), ensure_ascii=False) for p in measured.predictions]
            (self.run_dir / "predictions").mkdir(exist_ok=True)
            atomic_write(self.run_dir / "predictions" / f"{who}.jsonl", "\n".join(lines) + "\n")

    def _baseline(self, measurer: Measures, data: build.DataSet, built: build.Built) -> None:
        """Score the untouched model."""
        wanted = self.config.evaluation.baseline and self.config.evaluation.test and data.test
        if wanted and "base" not in self.record.content.get("scores", {}):
            with built.untouched():
                self._test(measurer, data, built, "base")

    def _find_checkpoint(self) -> dict[str, Any] | None:
        resume, main = self.config.resume, self.ranks.is_main
        keep = self.config.checkpoint.keep_last
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", keep, self.tell, main=main)
        self.ranks.barrier()
        if resume == "never":
            return None
        if resume == "auto":
            return self.checkpoints.newest()
        saved = read_checkpoint(Path(resume))
        if main:
            self.checkpoints.adopt(Path(resume), saved["counters"]["best_step"])
        self.ranks.barrier()
        return saved

    def _resume(self, saved: dict[str, Any] | None, state: TrainState) -> None:
        seed_rng(self.config.training.seed, self.ranks.rank)
        if saved is None:
            return
        for line in state.load_state_dict(saved, self.ranks.rank, self.ranks.world):
            self.tell(line)
        step = state.counters.step
        self.record.update(resumed_from=[*self.record.content.get("resumed_from", []), step])
        self.progress.message(f"resumed after step {step}")

    def _preflight(self, replica: Replica, loader: RowLoader, built: build.Built, steps: int) -> None:
        with self.phase("preflight"):
            batch = loader.largest_batch()
            measured = preflight(replica, batch, built.precision)
        micro = -(-self.config.data.batch_size // (self.config.data.micro_batch_size * self.ranks.world))
        gradients = 1 if built.climb is None else 2
        seconds = measured.seconds * gradients * micro * steps
        self.record.update(
            preflight={**measured.as_dict(), "steps": steps, "estimated_seconds": round(seconds, 1)},
            memory={"activations": measured.activations},
        )
        self._tell_memory()
        memory = measured.peak_device or measured.peak_rss
        self.progress.message(
            f"largest micro-batch: {measured.tokens} tokens in {measured.seconds:.2f} s, peak memory "
            f"{memory / 2**30:.2f} GiB; {steps} steps, at most about {seconds / 60:.1f} minutes of training"
        )
        self._tell_kernels(built)
        if measured.silent:
            self.tell(f"no gradient reached {len(measured.silent)} module(s), the first is {measured.silent[0]}")

    def _tell_kernels(self, built: build.Built) -> None:
        """What computed each operation so far; what was left to torch, and why, is told."""
        paths = describe(built.model.operators)
        log = built.model.operators.log
        compared = [] if log is None else log.lines()
        self.record.update(kernels={"chosen": built.kernels, "calls": paths, "compared": compared})
        for line in compared:
            self.progress.message(f"  {line}")
        for name, calls in paths.items():
            for path, count in calls.items():
                if path.startswith("torch, "):
                    self.tell(f"kernels: {name} was left to {path} ({count} calls)")

    def _loop(
        self,
        replica: Replica,
        loader: RowLoader,
        schedule: Callable[[int], float],
        steps: int,
        built: build.Built,
    ) -> Fit:
        config = self.config
        assert self.tracker is not None
        return Fit(
            replica=replica,
            loader=loader,
            schedule=schedule,
            penalties=built.penalties,
            limits=Limits(
                steps,
                validation_steps(steps, config.evaluation.every_steps, config.evaluation.times),
                config.tracking.log_every_steps,
                config.training.max_bad_steps,
                config.optimizer.max_grad_norm,
            ),
            checkpoint=config.checkpoint,
            checkpoints=self.checkpoints,
            tracker=self.tracker,
            progress=self.progress,
            stop=self.stop,
            micro_batch_size=config.data.micro_batch_size,
            hooks=build.build_hooks(config, built, steps),
            climb=built.climb,
        )

    def _fit(self, run: Fit, state: TrainState, built: build.Built, measurer: Measures, data: build.DataSet) -> None:
        evaluation, counters = self.config.evaluation, state.counters
        records = data.splits.validation[: evaluation.generate_limit] if evaluation.generate else []

        def validate(step: int) -> Mapping[str, float]:
            with self.phase("validation"):
                measured = measurer.measure(
                    built.model, data.validation, records, bootstrap=100, progress=self.progress.count
                )
            values = measured.values()
            run.tracker.log(step, "validation", values)
            self.progress.message(f"step {step}: validation " + _brief(measured))
            return values

        run.validate = validate if data.validation else None
        built.model.train()
        timings = self.record.content.setdefault("timings", {})
        begin, tokens, validating = time.monotonic(), counters.tokens, timings.get("validation", 0.0)
        self.progress.begin(run.limits.total_steps, counters.step)
        with self.phase("training"), self.stop.deferred(), self._profiled(run, counters.step):
            fit(state, run)
        counters = state.counters
        seconds = time.monotonic() - begin - (self.record.content["timings"].get("validation", 0.0) - validating)
        if built.cache is not None:
            self.record.update(activation_cache=built.cache.summary())
        self.record.update(steps=counters.step, skipped_steps=counters.skipped, data_digest=counters.data_digest)
        if counters.tokens > tokens:
            self.record.update(throughput={"tokens_per_second": round((counters.tokens - tokens) / seconds, 1)})

    @contextlib.contextmanager
    def _profiled(self, run: Fit, start: int) -> Iterator[None]:
        """Watch some of the steps that are left, if that was asked for; the main rank does."""
        steps = run.limits.total_steps - start
        if not self.config.tracking.profile or not self.ranks.is_main or steps < 1:
            yield
            return
        validated = {step - start for step in run.limits.validate_at} if run.validate is not None else ()
        profiler = StepProfiler(self.run_dir / "profile", self.ranks.device, window(steps, validated))
        run.on_step = profiler.on_step
        try:
            with profiler:
                yield
        finally:  # an interrupted run keeps what was seen
            if profiler.rows:
                self.record.try_update(profile=profiler.as_dicts())
                self.progress.message(f"profile in {self.run_dir}/profile; what took most time of its own:")
            for row in profiler.rows[:5]:
                self.progress.message(f"  {row}")
            if profiler.problem:
                self.tell(f"the profile could not be written: {profiler.problem}")

    def _settle(self, state: TrainState, run: Fit) -> None:
        """Put the weights that are the result into the model: the best, their average, or the last."""
        config, counters = self.config, state.counters
        best_step = None
        if config.checkpoint.load_best and counters.best_step >= 0:
            weights = self.checkpoints.load_best(counters.best_step) if self.ranks.is_main else None
            if weights is not None:
                state.load_weights(weights)
            self.ranks.broadcast_(list(state.trainable().values()))
            if self.ranks.agree(weights is not None):
                best = {"step": counters.best_step, "metric": config.checkpoint.metric, "value": counters.best_value}
                self.record.update(best=best)
                best_step = counters.best_step
        for hook in run.hooks:
            if isinstance(hook, Unfreezing):
                line = hook.unreached(counters.stage)
                if line is not None and line not in self.warnings:  # it may have been foreseen
                    self.tell(line)
            if isinstance(hook, Averaging):
                result = hook.settle(state, best_step)
                self.tell(result)
                self.record.update(result=result)

    def _finish(self, state: TrainState, built: build.Built, measurer: Measures, data: build.DataSet) -> None:
        config, counters = self.config, state.counters
        if self.ranks.is_main:
            folder = build.export_folder(self.run_dir, built.method)
            built.method.save(built.model, folder, build.base_location(config))
        if config.evaluation.test and data.test:
            self._test(measurer, data, built, "final")
            assert self.tracker is not None
            scores = {name: score["value"] for name, score in self.record.content["scores"]["final"].items()}
            self.tracker.log(counters.step, "test", scores)
            require_finite(scores)
        elif data.validation:
            best = config.checkpoint.load_best and counters.best_step >= 0
            step = counters.best_step if best else counters.validated_step
            require_finite(self.ranks.agree(logged(self.run_dir, step, "validation")), "validation")

    # --- the end ----------------------------------------------------------------------------------------------------

    def end(self, status: str, why: str, code: int | None, error: FtlabError | None = None) -> int:
        """Write how the run ended, then its report; returns `code`, or raises `error` if there is one.

        Nothing here may hide why the run ended: what the disk refuses now is told and passed over.
        """
        if self.opened:
            with self.stop.ignored():
                self._write_end(status, why)
        self.progress.close()
        if error is not None:
            raise error
        assert code is not None
        return code

    def _write_end(self, status: str, why: str) -> None:
        peaks = self.ranks.gather(peak_rss_bytes()) if status == "finished" else [peak_rss_bytes()]
        self.record.try_update(
            memory={"peak_rss": max(peaks), "peak_device": peak_device_bytes(self.ranks.device)},
            reason=why,
            again=self.again,
        )
        trouble = [self.record.end(status)]
        if self.tracker is not None:
            self.tracker.finish(status)
            trouble.append(self.tracker.mirror_status())
        for line in filter(None, trouble):
            self.tell(line)
        told = [*self.record.content.get("warnings", []), *self.warnings]
        self.record.try_update(warnings=list(dict.fromkeys(told)))
        if not self.ranks.is_main:
            return
        if status == "finished":
            self.progress.summary(self.record.content)
        elif status == "interrupted":
            self.progress.message(f"{why}; {self.again} goes on from what is saved")
        try:
            self.progress.message(f"report: {write_report(self.run_dir)}")
        except (OSError, FtlabError) as problem:
            self.progress.message(f"no report could be written: {problem}")


def _brief(measured: Measured) -> str:
    """The scores that a progress line has room for."""
    shown = ("loss", "exact_match", "token_f1", "rougeL", "accuracy", "subset_accuracy", "macro_f1", "mse", "pearson")
    values = measured.values()
    return ", ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)
