"""What a command calls: parse, compose, check every run of the sweep, then let Hydra run, show or launch."""

from __future__ import annotations

import argparse
import json
import os
import string
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import ftlab
from ftlab.compose.composer import Composer, conf_dir, without_hydra
from ftlab.config import Config
from ftlab.errors import ConfigError, FtlabError
from ftlab.schema import GROUPS, run_folder, suggestion
from ftlab.studies import sweep

__all__ = ["Task", "run_command"]

Task = Callable[[Config, dict[str, Any]], int | None]

INTERRUPTED = (130, 143)  # exit codes after Ctrl-C and SIGTERM
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class _Stopped(BaseException):
    """Leaves Hydra's launcher, which goes on after any ordinary exception, when the user stopped a run."""


def rank() -> int:
    """This process's number under torchrun, else 0."""
    return int(os.environ.get("RANK", "0"))


def run_command(argv: Sequence[str] | None, task: Task, *, name: str = "ftlab.train") -> int:
    """Run a command on a command line and return its exit code.

    The task gets the typed configuration and its plain dictionary (see `ftlab.schema.config_to_dict`); it returns an
    exit code (None: 0) and may raise FtlabError. A mistake prints one line; one in the command line or configuration,
    which every rank finds alike, on rank 0 alone. `FTLAB_DEBUG=1` adds the traceback. With `-m` every combination is
    checked before the first runs, a failed run does not stop the others, and the exit code is that of the first
    failure.
    """
    try:
        return dispatch(list(sys.argv[1:] if argv is None else argv), task, name)
    except FtlabError as error:
        return report_error(error)
    except KeyboardInterrupt:
        return report_error(FtlabError("interrupted"), INTERRUPTED[0])
    finally:
        GlobalHydra.instance().clear()


def report_error(error: FtlabError, code: int | None = None) -> int:
    """Print `error: ...` in one line on rank 0 and return the exit code."""
    if rank() == 0:
        print_error(error, "error:")
    return error.exit_code if code is None else code


def print_error(error: FtlabError, prefix: str) -> None:
    """The error in one line on stderr, after its traceback if that was asked for."""
    if os.environ.get("FTLAB_DEBUG") == "1":
        traceback.print_exception(error)
    print(prefix, " ".join(str(error).split()), file=sys.stderr, flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    """Hydra's command line, with its mistakes as ConfigError."""
    parser = get_args_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]

    def refuse(message: str) -> NoReturn:
        unknown = next((word for word in argv if word.startswith("-") and word.split("=")[0] not in flags), "")
        raise ConfigError(f"{message}{suggestion(unknown, flags)}" if unknown else message)

    # argparse offers no other way to raise: its own error() prints a usage text and exits.
    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args(argv)
    if arguments.run and arguments.multirun:
        raise ConfigError("--run and --multirun exclude each other; give one")
    if arguments.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun: it reads a pickle, which ftlab never does; give the overrides again")
    if arguments.config_dir is not None and not Path(arguments.config_dir).is_dir():
        raise ConfigError(f"--config-dir {arguments.config_dir}: no such folder")
    return arguments


def dispatch(argv: list[str], task: Task, name: str) -> int:
    """Do what the command line asks for: show something, run once, or sweep."""
    if "--version" in argv:
        print(f"ftlab {ftlab.__version__}")
        return 0
    arguments = parse(argv)
    conf = Path(arguments.config_path).absolute() if arguments.config_path else conf_dir()
    user_dir = Path(arguments.config_dir) if arguments.config_dir else None
    composer = Composer(name, conf, user_dir, arguments.config_name or "config")
    overrides: list[str] = arguments.overrides
    if arguments.shell_completion:
        composer.hydra.shell_completion(config_name=composer.config_name, overrides=overrides)
        return 0
    composer.parse(overrides)
    if arguments.help or arguments.hydra_help or arguments.cfg or arguments.info:
        show(composer, arguments)
        return 0
    mode = composer.hydra.get_mode(composer.config_name, overrides)
    if arguments.multirun or mode == RunMode.MULTIRUN:
        return run_sweep(composer, [*overrides, "hydra.mode=MULTIRUN"], task)
    return run_once(composer, overrides, task)


# --- showing ----------------------------------------------------------------------------------------------------------


def show(composer: Composer, arguments: argparse.Namespace) -> None:
    """`--help`, `--hydra-help`, `--cfg` and `--info`. Values may still be missing; unknown keys are refused."""
    hydra, config_name, overrides = composer.hydra, composer.config_name, arguments.overrides
    composed = composer.compose(overrides)
    if arguments.help:
        HydraConfig.instance().set_config(composed)
        print(help_text(composer, composed, resolve=arguments.resolve))
    elif arguments.hydra_help:
        hydra.hydra_help(config_name=config_name, args_parser=get_args_parser(), args=arguments)
    elif arguments.cfg:
        try:
            hydra.show_cfg(config_name, overrides, arguments.cfg, arguments.package, arguments.resolve)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    else:
        hydra.show_info(arguments.info, config_name=config_name, overrides=overrides)


def help_text(composer: Composer, composed: DictConfig, *, resolve: bool) -> str:
    """The template `hydra.help.template`, filled in.

    As Hydra's own get_help, which lists all groups, a second or two of work, whether the template shows them or not.
    """
    hydra = composer.hydra
    parts: dict[str, Callable[[], str]] = {
        "FTLAB_GROUPS": lambda: groups_text(composer, composed),
        "FLAGS_HELP": lambda: hydra.format_args_help(get_args_parser()),
        "HYDRA_CONFIG_GROUPS": lambda: hydra.format_config_groups(lambda name: name.split("/")[0] == "hydra"),
        "APP_CONFIG_GROUPS": lambda: hydra.format_config_groups(lambda name: name.split("/")[0] != "hydra"),
        "CONFIG": lambda: OmegaConf.to_yaml(without_hydra(composed), resolve=resolve),
    }
    template = string.Template(str(composed.hydra.help.template))
    return template.substitute({name: parts[name]() for name in template.get_identifiers()}).rstrip()


def groups_text(composer: Composer, composed: DictConfig) -> str:
    """The groups and their options with the first line of each file, the chosen option marked with a star."""
    chosen = composed.hydra.runtime.choices
    lines = []
    for group in [*GROUPS, "experiment"]:
        for number, option in enumerate(composer.options(group)):
            mark = "*" if chosen.get(group) == option else " "
            file = composer.find(f"{group}/{option}")
            about = next((line for line in comments(file) if "@package" not in line), "") if file else ""
            lines.append(f"  {group if number == 0 else '':<12}{mark} {option:<21} {about}".rstrip())
    return "\n".join(lines)


def comments(file: Path) -> list[str]:
    """The comment lines at the head of a file, without their marks."""
    lines = file.read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    return head


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a run ended: an exit code, or the exception that it raised."""

    code: int = 0
    error: Exception | None = None


class Job:
    """The function that Hydra calls with one composed configuration. Never raises an ordinary exception.

    An error of the task is printed here on every rank but 0, whose caller prints it: it may be that rank's alone.
    """

    def __init__(self, composer: Composer, task: Task) -> None:
        self.composer = composer
        self.task = task
        self.outcome = Outcome()

    def __call__(self, composed: DictConfig) -> None:
        try:
            config, resolved = self.composer.typed(composed)
            try:
                self.outcome = Outcome(self.task(config, resolved) or 0)
            except FtlabError as error:
                if rank() != 0:
                    print_error(error, f"error: rank {rank()}:")
                raise
        except FtlabError as error:
            self.outcome = Outcome(error.exit_code, error)
        except Exception as error:
            self.outcome = Outcome(1, error)


def run_once(composer: Composer, overrides: list[str], task: Task) -> int:
    """Check, then run through Hydra."""
    composer.typed(composer.compose(overrides))
    job = Job(composer, task)
    composer.hydra.run(composer.config_name, job, [*overrides, "hydra.mode=RUN"])
    if job.outcome.error is not None:
        raise job.outcome.error
    return job.outcome.code


# --- a sweep ----------------------------------------------------------------------------------------------------------


class SweepJob(Job):
    """A job that leaves a record in the sweep's folder, also when the launcher runs it in another process.

    Returns the best validation value, for sweepers that search; NaN after a failure.
    """

    def __init__(self, composer: Composer, task: Task, folder: Path, total: int | None) -> None:
        super().__init__(composer, task)
        self.folder = folder
        self.total = total

    # The base class returns nothing; a sweeper reads a number.
    def __call__(self, composed: DictConfig) -> float:  # type: ignore[override]
        hydra = HydraConfig.get()
        number = int(hydra.job.num)
        overrides = [str(text) for text in hydra.overrides.task]
        if rank() == 0:
            of = f"/{self.total}" if self.total else ""
            print(f"--- run {number + 1}{of}: {' '.join(overrides)}", flush=True)
        try:
            super().__call__(composed)
        except KeyboardInterrupt:
            self.outcome = Outcome(INTERRUPTED[0])
        folder = self.run_dir(composed)
        trial = sweep.Trial(number, overrides, self.outcome.code, self.message(), str(folder))
        if rank() == 0:
            sweep.write_trial(self.folder, trial)
        if self.outcome.code in INTERRUPTED:
            raise _Stopped
        value = sweep.best_value(folder) if self.outcome.code == 0 else None
        return float("nan") if value is None else value

    def run_dir(self, composed: DictConfig) -> Path:
        """The folder of this run; the sweep's own if the configuration was refused."""
        try:
            return run_folder(*self.composer.typed(composed))
        except ConfigError:
            return self.folder

    def message(self) -> str:
        """The failure in one line; a bug's traceback goes to stderr at once."""
        error = self.outcome.error
        if error is None:
            return ""
        if not isinstance(error, FtlabError):
            traceback.print_exception(error)
            return " ".join(f"{type(error).__name__}: {error}".split())
        report_error(error)
        return " ".join(str(error).split())


def run_sweep(composer: Composer, overrides: list[str], task: Task) -> int:
    """Check every combination, run them all, then write and print the table of runs."""
    master = composer.compose(overrides, RunMode.MULTIRUN)
    total = check_sweep(composer, overrides, master)
    HydraConfig.instance().set_config(master)
    if rank() == 0:
        folder = fresh(Path(str(master.hydra.sweep.dir)))
        return launch(composer, overrides, SweepJob(composer, task, folder, total))
    with tempfile.TemporaryDirectory() as scratch:  # what Hydra writes on the other ranks is thrown away
        return launch(composer, overrides, SweepJob(composer, task, Path(scratch), total))


def launch(composer: Composer, overrides: list[str], job: SweepJob) -> int:
    """Hand the sweep to Hydra's sweeper and launcher; exit code of the first failure."""
    stopped = False
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        place = f"hydra.sweep.dir={json.dumps(str(job.folder.absolute()))}"
        composer.hydra.multirun(composer.config_name, job, [*overrides, place])
    except _Stopped:
        stopped = True
    except OSError as error:
        raise FtlabError(
            f"{job.folder}: {error.strerror or error}; give output_dir=... a folder to write in"
        ) from error
    except HydraException as error:
        raise FtlabError(" ".join(str(error).split())) from error
    if rank() != 0:
        return job.outcome.code
    trials = sweep.read_trials(job.folder)
    sweep.write_sweep(job.folder, trials)
    sweep.print_sweep(job.folder, trials)
    failed = [trial.exit_code for trial in trials if trial.exit_code != 0]
    return job.outcome.code if stopped else next(iter(failed), 0)


def fresh(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that does not exist: two sweeps may start in one second."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def check_sweep(composer: Composer, overrides: list[str], master: DictConfig) -> int | None:
    """Validate every combination of Hydra's own sweeper; their number, or None under a sweeper that searches.

    Two combinations with one run folder would train over each other, so they are refused.
    """
    if master.hydra.sweeper.get("_target_") != BASIC_SWEEPER:
        return None
    params = master.hydra.sweeper.params
    from_file = [] if params is None else [f"{key}={params[key]}" for key in params]
    hydra_overrides = [text for text in overrides if text.lstrip("+~").startswith(("hydra.", "hydra/"))]
    parsed = composer.parse([*from_file, *(text for text in overrides if text not in hydra_overrides)])
    try:
        (combinations,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise ConfigError(
            f"-m: {str(error).splitlines()[0]}; list the values, or choose another hydra/sweeper"
        ) from error
    folders: dict[Path, list[str]] = {}
    # A bad value shows where one key differs from the first combination, so those are looked at first.
    for combination in sorted(combinations, key=lambda row: sum(map(str.__ne__, row, combinations[0]))):
        config, resolved = composer.typed(composer.compose([*hydra_overrides, *combination], RunMode.MULTIRUN))
        folder = run_folder(config, resolved).absolute()
        if folder in folders:
            first = " ".join(folders[folder])
            raise ConfigError(
                f"-m: the runs ({first}) and ({' '.join(combination)}) would share the folder {folder}; "
                "sweep keys that change what is computed, and leave run_dir unset"
            )
        folders[folder] = combination
    return len(combinations)
