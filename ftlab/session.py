"""One training run from its configuration to its report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ftlab import build
from ftlab.compose import config_hash, run_folder, to_yaml
from ftlab.config import Config, option_classes
from ftlab.data.loader import RowLoader
from ftlab.errors import FtlabError
from ftlab.evaluation.measure import Measured, Measurer
from ftlab.files import atomic_write
from ftlab.methods import make_method
from ftlab.models.tokenizer import Tokenizer
from ftlab.optim.schedules import make_schedule
from ftlab.studies.report import write_report
from ftlab.training.checkpoint import Checkpoints, read_checkpoint
from ftlab.training.loop import Fit, Limits, fit, validation_steps
from ftlab.training.parallel import Ranks, Replica, start_ranks
from ftlab.training.precision import dtype_of
from ftlab.training.preflight import preflight, static_memory
from ftlab.training.progress import Progress
from ftlab.training.record import RunRecord, peak_device_bytes, peak_rss_bytes
from ftlab.training.signals import Interrupted, StopSignal
from ftlab.training.tracking import Tracker

__all__ = ["train"]


def train(config: Config, resolved: dict[str, Any]) -> int:
    """Train, score and report; the exit status of the command."""
    with StopSignal() as stop, start_ranks(config.parallel) as ranks:
        run_dir = run_folder(config, resolved)
        with _own_folder(run_dir, ranks) as record:
            session = _Session(config, resolved, run_dir, ranks, stop, record)
            if not session.open_folder():
                return 0
            try:
                session.run()
            except Interrupted as interrupted:
                return session.end("interrupted", str(interrupted), interrupted.exit_code)
            except FtlabError as error:
                return session.end("failed", str(error), None, error)
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                problem = FtlabError(
                    f"{where}{error.strerror or error}; put that right and give the same command again"
                )
                return session.end("failed", str(problem), None, problem)
            except BaseException as error:
                session.end("failed", f"{type(error).__name__}: {error}", 1)
                raise
            return session.end("finished", "", 0)


@contextlib.contextmanager
def _own_folder(run_dir: Path, ranks: Ranks) -> Iterator[RunRecord]:
    """The run folder, made if missing, and locked against a second process that would write into it."""
    problem: str | None = None
    lock: IO[str] | None = None
    if ranks.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = (run_dir / ".lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"another process is running in {run_dir}; wait for it, or give another run_dir"
        except OSError as error:
            problem = (
                f"the run folder {run_dir} cannot be written ({error.strerror}); give another output_dir or run_dir"
            )
    problem = ranks.agree(problem)
    if problem is not None:
        raise FtlabError(problem)
    try:
        yield RunRecord(run_dir, enabled=ranks.is_main)
    finally:
        if lock is not None:
            lock.close()


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
            self.record.update(timings={name: round(spent, 3)})


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

    # --- the phases -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Everything from the first byte of data to the report."""
        with self.phase("data"):
            tokenizer = build.build_tokenizer(self.config)
            data = build.build_data(self.config, tokenizer)
            loader = build.build_loader(self.config, data, tokenizer)
        with self.phase("model"):
            built = self._build_model(tokenizer)
        self._describe(data, loader, built)
        saved = self._find_checkpoint()
        measurer = self._measurer(data, tokenizer, built)
        self._baseline(measurer, data, built)
        replica = Replica(built.model, build.loss_sum_of(self.config), self.ranks)
        steps = build.total_steps(self.config, loader)
        if self.config.training.preflight:
            self._preflight(replica, loader, built, steps)
        self._resume(saved, built)
        self.tracker = Tracker(
            self.run_dir,
            self.config.tracking,
            self.resolved,
            run_name=self.run_dir.name,
            resume_step=built.state.counters.step if saved is not None else None,
            enabled=self.ranks.is_main,
        )
        self._fit(replica, loader, built, measurer, data, steps)
        self._finish(built, measurer, data)

    def open_folder(self) -> bool:
        """Settle that this folder is this run's, and note what is known before any work.

        False: the run is finished already.

        Raises:
            FtlabError: it holds a run with another configuration, which is left untouched.
        """
        record, config = self.record, self.config
        if record.content and config.resume == "never":
            self._set_aside()
        other = record.content.get("config_hash")
        if other not in (None, self.hash):
            changed = ", ".join(_differences(record.content.get("config", {}), self.resolved)[:5])
            raise FtlabError(
                f"{self.run_dir} holds a run with another configuration ({changed}); give another run_dir, or "
                "resume=never to set that run aside"
            )
        if config.resume == "auto" and record.status == "finished":
            self.progress.message(f"already finished: {self.run_dir}/report.html (resume=never runs it anew)")
            self.progress.close()
            return False
        record.begin(config.name, self.hash, self.ranks.device, self.ranks.world)
        record.update(config=self.resolved, classes=option_classes(config), seeds={"training": config.training.seed})
        if self.ranks.is_main:
            atomic_write(self.run_dir / "config.yaml", to_yaml(self.resolved))
        self.progress.message(f"run folder {self.run_dir}")
        return True

    def _set_aside(self) -> None:
        """Move an earlier run out of the way; the lock file stays, because this process holds it."""
        if self.ranks.is_main:
            number = 1
            while (aside := self.run_dir.with_name(f"{self.run_dir.name}.{number}")).exists():
                number += 1
            aside.mkdir()
            for entry in self.run_dir.iterdir():
                if entry.name != ".lock":
                    entry.rename(aside / entry.name)
            self.progress.message(f"the earlier run was moved to {aside}")
        self.record.content = {}
        self.ranks.barrier()

    def _build_model(self, tokenizer: Tokenizer) -> build.Built:
        method = make_method(self.config.method, seed=self.config.training.seed)
        dtype = dtype_of(self.config.precision.frozen if method.keeps_base else "fp32")
        model = build.build_model(self.config, tokenizer, self.ranks, dtype=dtype)
        self.record.update(model=build.model_facts(self.config, model))
        return build.build_training(self.config, model, method, self.ranks, self.hash)

    def _describe(self, data: build.DataSet, loader: RowLoader, built: build.Built) -> None:
        rows = [asdict(row) for row in built.rows]
        self.record.update(
            data={
                **data.source.as_dict(),
                "train": len(data.train),
                "validation": len(data.validation),
                "test": len(data.test),
                "train_tokens": sum(len(e.token_ids) for e in data.train),
                "train_supervised": sum(sum(e.supervised) for e in data.train),
                "rows_in_epoch": len(loader.rows(0)),
            },
            parameters=rows,
            memory=static_memory(built.model.parameters()),
        )
        trainable = sum(row["count"] for row in rows if row["trainable"])
        total = sum(row["count"] for row in rows)
        self.progress.message(
            f"{len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test examples; "
            f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %)"
        )
        for row in rows:
            how = f"trains, rate x {row['lr_scale']:g}" if row["trainable"] else "frozen"
            self.progress.message(f"  {row['count']:>13,} in {row['tensors']:>4} tensors  {how:<18}  {row['rule']}")

        for note in data.notes:
            self.tell(note)

    def _measurer(self, data: build.DataSet, tokenizer: Tokenizer, built: build.Built) -> Measurer:
        loss_sum = build.loss_sum_of(self.config)
        return Measurer(
            self.config.evaluation, tokenizer, data.template, loss_sum, built.precision.autocast, self.ranks
        )

    def _test(self, measurer: Measurer, data: build.DataSet, built: build.Built, who: str) -> None:
        """Score the test split and keep scores and answers under `who` (base or final)."""
        records = data.splits.test if self.config.evaluation.generate else []
        with self.phase(f"test_{who}"):
            measured = measurer.measure(built.model, data.test, records, progress=self.progress.count)
        self.record.update(scores={who: {name: score.as_dict() for name, score in measured.scores.items()}})
        if self.ranks.is_main and measured.predictions:
            lines = [json.dumps(p.as_dict(), ensure_ascii=False) for p in measured.predictions]
            (self.run_dir / "predictions").mkdir(exist_ok=True)
            atomic_write(self.run_dir / "predictions" / f"{who}.jsonl", "\n".join(lines) + "\n")

    def _baseline(self, measurer: Measurer, data: build.DataSet, built: build.Built) -> None:
        """Before a checkpoint is loaded the method is the identity, so this is the untouched model."""
        wanted = self.config.evaluation.baseline and self.config.evaluation.test and data.test
        if wanted and "base" not in self.record.content.get("scores", {}):
            self._test(measurer, data, built, "base")

    def _find_checkpoint(self) -> dict[str, Any] | None:
        resume = self.config.resume
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", self.config.checkpoint.keep_last, self.tell)
        if resume == "never":
            return None
        if resume != "auto":
            return read_checkpoint(Path(resume))
        return self.checkpoints.newest()

    def _resume(self, saved: dict[str, Any] | None, built: build.Built) -> None:
        if saved is None:
            torch.manual_seed(self.config.training.seed * 1000 + self.ranks.rank)
            return
        for line in built.state.load_state_dict(saved, self.ranks.rank, self.ranks.world):
            self.tell(line)
        step = built.state.counters.step
        self.record.update(resumed_from=[*self.record.content.get("resumed_from", []), step])
        self.progress.message(f"resumed after step {step}")

    def _preflight(self, replica: Replica, loader: RowLoader, built: build.Built, steps: int) -> None:
        with self.phase("preflight"):
            batch = loader.largest_batch()
            measured = preflight(replica, batch, built.precision)
        micro = -(-self.config.data.batch_size // (self.config.data.micro_batch_size * self.ranks.world))
        seconds = measured.seconds * micro * steps
        self.record.update(preflight={**measured.as_dict(), "steps": steps, "estimated_seconds": round(seconds, 1)})
        memory = measured.peak_device or measured.peak_rss
        self.progress.message(
            f"largest micro-batch: {measured.tokens} tokens in {measured.seconds:.2f} s, peak memory "
            f"{memory / 2**30:.2f} GiB; {steps} steps, at most about {seconds / 60:.1f} minutes of training"
        )
        if measured.silent:
            self.tell(f"no gradient reached {len(measured.silent)} module(s), the first is {measured.silent[0]}")

    def _fit(
        self,
        replica: Replica,
        loader: RowLoader,
        built: build.Built,
        measurer: Measurer,
        data: build.DataSet,
        steps: int,
    ) -> None:
        config, counters = self.config, built.state.counters
        assert self.tracker is not None
        tracker = self.tracker
        validate_at = frozenset[int]()
        if data.validation and (config.evaluation.every_steps or config.evaluation.times):
            validate_at = validation_steps(steps, config.evaluation.every_steps, config.evaluation.times)
        records = data.splits.validation[: config.evaluation.generate_limit] if config.evaluation.generate else []

        def validate(step: int) -> Mapping[str, float]:
            with self.phase("validation"):
                measured = measurer.measure(
                    built.model, data.validation, records, bootstrap=100, progress=self.progress.count
                )
            values = measured.values()
            tracker.log(step, "validation", values)
            self.progress.message(f"step {step}: validation " + _brief(measured))
            return values

        run = Fit(
            replica=replica,
            loader=loader,
            schedule=make_schedule(config.schedule, steps),
            penalties=built.penalties,
            limits=Limits(
                steps,
                validate_at,
                config.tracking.log_every_steps,
                config.training.max_bad_steps,
                config.optimizer.max_grad_norm,
            ),
            checkpoint=config.checkpoint,
            checkpoints=self.checkpoints,
            tracker=tracker,
            progress=self.progress,
            stop=self.stop,
            validate=validate,
            micro_batch_size=config.data.micro_batch_size,
        )
        built.model.train()
        before = counters.tokens, time.monotonic(), self.record.content.get("timings", {}).get("validation", 0.0)
        self.progress.begin(steps, counters.step)
        with self.phase("training"), self.stop.deferred():
            fit(built.state, run)
        counters = built.state.counters
        validating = self.record.content["timings"].get("validation", 0.0) - before[2]
        seconds = time.monotonic() - before[1] - validating
        self.record.update(
            steps=counters.step,
            skipped_steps=counters.skipped,
            data_digest=counters.data_digest,
            throughput={"tokens_per_second": round((counters.tokens - before[0]) / max(seconds, 1e-9), 1)},
        )

    def _finish(self, built: build.Built, measurer: Measurer, data: build.DataSet) -> None:
        config, state = self.config, built.state
        counters = state.counters
        if config.checkpoint.load_best and counters.best_step >= 0:
            if self.ranks.is_main:
                state.load_weights(self.checkpoints.load_best(counters.best_step))
            self.ranks.broadcast_(list(state.trainable().values()))
            self.record.update(
                best={"step": counters.best_step, "metric": config.checkpoint.metric, "value": counters.best_value}
            )
        if self.ranks.is_main:
            folder = build.export_folder(self.run_dir, built.method)
            built.method.save(built.model, folder, build.base_location(config))
        if config.evaluation.test and data.test:
            self._test(measurer, data, built, "final")
            assert self.tracker is not None
            scores = self.record.content["scores"]["final"]
            self.tracker.log(counters.step, "test", {name: score["value"] for name, score in scores.items()})

    # --- the end ----------------------------------------------------------------------------------------------------

    def end(self, status: str, why: str, code: int | None, error: FtlabError | None = None) -> int:
        """Close the tracker, write record and report, and print where they are; raises `error` if there is one."""
        if self.tracker is not None:
            self.tracker.finish(status)
            if trouble := self.tracker.mirror_status():
                self.tell(trouble)
        peaks = self.ranks.gather(peak_rss_bytes()) if status == "finished" else [peak_rss_bytes()]
        self.record.update(
            memory={"peak_rss": max(peaks), "peak_device": peak_device_bytes(self.ranks.device)},
            warnings=[*self.record.content.get("warnings", []), *self.warnings],
            reason=why,
        )
        self.record.end(status)
        if self.ranks.is_main:
            if status == "finished":
                path = write_report(self.run_dir)
                self.progress.summary(self.record.content)
                self.progress.message(f"report: {path}")
            elif status == "interrupted":
                self.progress.message(f"{why}; the same command goes on from here")
        self.progress.close()
        if error is not None:
            raise error
        assert code is not None
        return code


def _brief(measured: Measured) -> str:
    """The scores that a progress line has room for."""
    shown = ("loss", "exact_match", "token_f1", "rougeL")
    values = measured.values()
    return ", ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` for each leaf that differs."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            lines.append(f"{prefix}{key}: {before} -> {now}")
    return lines
