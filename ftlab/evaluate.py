"""``python -m ftlab.evaluate run=DIR``: score a run, its untouched base model, or both, on one split."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.arguments import at_least_one, can_be_written, guarded, parse
from ftlab.errors import ConfigError, FtlabError

if TYPE_CHECKING:
    from ftlab.build import DataSet
    from ftlab.evaluation.measure import Measured
    from ftlab.open_run import OpenRun
    from ftlab.training.parallel import Ranks

__all__ = ["EvaluateArguments", "main"]

_USAGE = (
    "usage: python -m ftlab.evaluate run=DIR [split=test] [base=also] [limit=N] [adapter=DIR] [model=DIR] "
    "[out=FILE.json]"
)


@dataclass
class EvaluateArguments:
    """Settings of the evaluate command."""

    run: str = field(metadata={"help": "folder of a run"})
    split: str = field(default="test", metadata={"help": "train, validation or test"})
    base: str = field(
        default="no", metadata={"help": "the pretrained model too, for one before/after table: no, also or only"}
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "folder of an adapter, of ftlab or of PEFT, to score in place of what the run trained"},
    )
    model: str | None = field(
        default=None,
        metadata={"help": "folder of a whole model to score in place of that: model/ of a run, a soup, an export"},
    )
    limit: int | None = field(default=None, metadata={"help": "only the first N records of the split"})
    batch_size: int | None = field(default=None, metadata={"help": "examples in one forward pass; null: the run's"})
    device: str | None = field(default=None, metadata={"help": "auto, cpu or cuda; null: the run's"})
    out: str | None = field(default=None, metadata={"help": "write scores and predictions to this JSON file"})


def _run(argv: list[str]) -> int:
    arguments, words = parse(EvaluateArguments, argv, _USAGE)
    if words:
        raise ConfigError(f"{words[0]}: not a setting; {_USAGE}")
    _check(arguments)

    import json

    from ftlab.files import atomic_write
    from ftlab.open_run import open_run, parallel_of, read_config
    from ftlab.training.parallel import start_ranks
    from ftlab.training.progress import score_lines
    from ftlab.training.record import writable

    config, _ = read_config(Path(arguments.run))
    with start_ranks(parallel_of(config, arguments.device)) as ranks:
        columns = {"no": ["after"], "also": ["before", "after"], "only": ["before"]}[arguments.base]
        data = None
        measured = {}
        for column in columns:
            adapter, whole = (
                None if folder is None else Path(folder) for folder in (arguments.adapter, arguments.model)
            )
            before = column == "before"
            opened = open_run(Path(arguments.run), base=before, ranks=ranks, adapter=adapter, whole=whole)
            data = data or opened.data()  # the same for both, so read once
            measured[column] = _measure(arguments, opened, data, ranks)
        if not ranks.is_main:
            return 0
    scores = {who: {name: score.as_dict() for name, score in result.scores.items()} for who, result in measured.items()}
    if replaced := arguments.adapter or arguments.model:
        print(f"{replaced}, on the data of {arguments.run}:")
    print("\n".join(score_lines(f"{arguments.split} split", scores)))
    if arguments.out is not None:
        answers = {who: [answer.as_dict() for answer in result.predictions] for who, result in measured.items()}
        asked = {name: getattr(arguments, name) for name in ("run", "adapter", "model", "split", "limit")}
        content = {**asked, "scores": scores, "predictions": answers}
        atomic_write(Path(arguments.out), json.dumps(writable(content), indent=1, ensure_ascii=False) + "\n")
        print(f"written to {arguments.out}")
    return 0


def _check(arguments: EvaluateArguments) -> None:
    """Errors: ConfigError, before anything is loaded."""
    if arguments.base not in ("no", "also", "only"):
        raise ConfigError(f"base={arguments.base}: give no, also or only")
    if arguments.split not in ("train", "validation", "test"):
        raise ConfigError(f"split={arguments.split}: give train, validation or test")
    if arguments.adapter is not None and arguments.model is not None:
        raise ConfigError("adapter, model: one of them is scored in place of what the run trained; leave one out")
    for name in ("adapter", "model"):
        folder = getattr(arguments, name)
        if folder is not None and arguments.base == "only":
            raise ConfigError(f"{name}: base=only scores the pretrained model alone; give base=also")
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"{name}={folder}: there is no such folder")
    if arguments.model is not None and not (Path(arguments.model) / "config.json").is_file():
        is_adapter = (Path(arguments.model) / "adapter_config.json").is_file()
        advice = "give it as adapter=" if is_adapter else f"is it {arguments.model}/model?"
        raise ConfigError(f"model={arguments.model} is no whole model, it has no config.json; {advice}")
    at_least_one(limit=arguments.limit, batch_size=arguments.batch_size)
    if arguments.out is not None:
        can_be_written("out", arguments.out)
        if Path(arguments.out).is_dir():
            raise ConfigError(f"out={arguments.out} is a folder; give a file")


def _measure(arguments: EvaluateArguments, opened: OpenRun, data: DataSet, ranks: Ranks) -> Measured:
    from ftlab import build

    examples = getattr(data, arguments.split)[: arguments.limit]
    records = getattr(data.splits, arguments.split)[: arguments.limit]
    if not examples:
        raise FtlabError(f"the {arguments.split} split of the run in {arguments.run} is empty; give another split=...")
    config = opened.config
    settings = replace(config.evaluation, batch_size=arguments.batch_size or config.evaluation.batch_size)
    measurer = build.build_measurer(config, opened.tokenizer, opened.precision, ranks, opened.labels, settings)
    return measurer.measure(opened.model, examples, records if settings.generate else [])


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or that of the error."""
    return guarded(_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
