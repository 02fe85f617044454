"""``python -m ftlab.evaluate run=DIR``: score a run, or the untouched base model, on one split."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ftlab.arguments import guarded, parse
from ftlab.errors import ConfigError

__all__ = ["EvaluateArguments", "main"]

_USAGE = "usage: python -m ftlab.evaluate run=DIR [split=test] [base=false] [limit=N] [out=FILE.json]"


@dataclass
class EvaluateArguments:
    """Settings of the evaluate command."""

    run: str = field(metadata={"help": "folder of a run"})
    split: str = field(default="test", metadata={"help": "train, validation or test"})
    base: bool = field(default=False, metadata={"help": "score the pretrained model without what was trained"})
    limit: int | None = field(default=None, metadata={"help": "only the first N records of the split"})
    batch_size: int | None = field(default=None, metadata={"help": "examples in one forward pass; null: the run's"})
    device: str | None = field(default=None, metadata={"help": "auto, cpu or cuda; null: the run's"})
    out: str | None = field(default=None, metadata={"help": "write scores and predictions to this JSON file"})


def _run(argv: list[str]) -> int:
    arguments, words = parse(EvaluateArguments, argv, _USAGE)
    if words:
        raise ConfigError(f"{words[0]}: not a setting; {_USAGE}")
    if arguments.split not in ("train", "validation", "test"):
        raise ConfigError(f"split={arguments.split}: give train, validation or test")

    import json

    from ftlab import build
    from ftlab.evaluation.measure import Measurer
    from ftlab.files import atomic_write
    from ftlab.open_run import open_run, parallel_of, read_config
    from ftlab.studies.tables import score_table
    from ftlab.training.parallel import start_ranks

    run_dir = Path(arguments.run)
    config, _ = read_config(run_dir)
    with start_ranks(parallel_of(config, arguments.device)) as ranks:
        opened = open_run(run_dir, base=arguments.base, ranks=ranks)
        data = build.build_data(config, opened.tokenizer)
        examples = getattr(data, arguments.split)[: arguments.limit]
        records = getattr(data.splits, arguments.split)[: arguments.limit]
        settings = replace(config.evaluation, batch_size=arguments.batch_size or config.evaluation.batch_size)
        measurer = Measurer(
            settings, opened.tokenizer, data.template, build.loss_sum_of(config), opened.precision.autocast, ranks
        )
        measured = measurer.measure(opened.model, examples, records if settings.generate else [])
        if not ranks.is_main:
            return 0
        title = f"{'base model' if arguments.base else run_dir} on {arguments.split} ({len(examples)} examples)"
        print(score_table(title, {name: score.as_dict() for name, score in measured.scores.items()}))
        if arguments.out is not None:
            content = {
                "run": str(run_dir),
                "base": arguments.base,
                "split": arguments.split,
                "scores": {name: score.as_dict() for name, score in measured.scores.items()},
                "predictions": [prediction.as_dict() for prediction in measured.predictions],
            }
            atomic_write(Path(arguments.out), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            print(f"written to {arguments.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or that of the error."""
    return guarded(_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
