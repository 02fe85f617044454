"""``python -m ftlab.soup 'runs=[DIR,DIR]' out=DIR``: the mean of finished runs, or the way from the base to it.

Works on whole weights, so full and LoRA runs of one base mix; the result is a model in Hugging Face's format. A
new head of a classifier has no pretrained value: between the base and the mean it is the mean's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlab.arguments import can_be_written, guarded, parse
from ftlab.errors import ConfigError, FtlabError
from ftlab.files import one_place

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ftlab.config import Config
    from ftlab.models.heads import AnyModel
    from ftlab.open_run import OpenRun
    from ftlab.training.parallel import Ranks

__all__ = ["SoupArguments", "main"]

_USAGE = "usage: python -m ftlab.soup 'runs=[DIR,DIR]' out=DIR [kind=uniform] ['weights=[1,2]'] [alpha=1]"


@dataclass
class SoupArguments:
    """Settings of the soup command."""

    runs: str = field(metadata={"help": "folders of finished runs of one base model: [runs/a,runs/b]"})
    out: str = field(metadata={"help": "new folder for the model, its tokenizer and soup.json"})
    kind: str = field(default="uniform", metadata={"help": "uniform: all runs; greedy: those that lower the loss"})
    weights: str | None = field(
        default=None, metadata={"help": "with kind=uniform: a weight for each run; null: equal"}
    )
    alpha: float = field(default=1.0, metadata={"help": "share of the way from the base (0) to the mean (1)"})
    device: str | None = field(default=None, metadata={"help": "auto, cpu or cuda; null: the first run's"})


def _listed(text: str) -> list[str]:
    """`[a,b]` or `a,b` -> ["a", "b"]."""
    return [word.strip() for word in text.strip().removeprefix("[").removesuffix("]").split(",") if word.strip()]


def _weights(arguments: SoupArguments, runs: list[str]) -> list[float]:
    """The weight of each run, before they are divided by their sum."""
    if arguments.weights is None:
        return [1.0] * len(runs)
    if arguments.kind == "greedy":
        raise ConfigError(f"weights={arguments.weights}: kind=greedy takes equal parts; leave one of the two out")
    try:
        weights = [float(word) for word in _listed(arguments.weights)]
    except ValueError:
        raise ConfigError(f"weights={arguments.weights}: give numbers, for example weights=[1,2]") from None
    if len(weights) != len(runs):
        raise ConfigError(f"weights={arguments.weights}: {len(weights)} for {len(runs)} runs; give one each")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"weights={arguments.weights}: each must be above 0; leave a run out instead")
    return weights


def _run(argv: list[str]) -> int:
    arguments, words = parse(SoupArguments, argv, _USAGE)
    if words:
        raise ConfigError(f"{words[0]}: not a setting; {_USAGE}")
    runs = _listed(arguments.runs)
    if not runs:
        raise ConfigError(f"runs={arguments.runs}: it names no run; {_USAGE}")
    if twice := one_place(runs):
        raise ConfigError(f"runs={arguments.runs}: {twice[0]} and {twice[1]} are one run; name each once")
    if arguments.kind not in ("uniform", "greedy"):
        raise ConfigError(f"kind={arguments.kind}: give uniform or greedy")
    if not 0 <= arguments.alpha <= 1:
        raise ConfigError(f"alpha={arguments.alpha}: give a number from 0 (the base) to 1 (the mean of the runs)")
    if len(runs) == 1 and arguments.alpha == 1:
        raise ConfigError(
            "runs: one run with alpha=1 is that run itself; give more runs, a lower alpha, or ftlab.export"
        )
    weights = _weights(arguments, runs)
    if Path(arguments.out).exists():
        raise ConfigError(f"out={arguments.out} exists already; give a new folder")
    can_be_written("out", arguments.out)

    from ftlab.open_run import parallel_of, read_config
    from ftlab.training.parallel import start_ranks

    records = [read_config(Path(run)) for run in runs]
    for run, (config, record) in zip(runs[1:], records[1:], strict=True):
        _check_same(runs[0], *records[0], run, config, record, data=arguments.kind == "greedy")
    with start_ranks(parallel_of(records[0][0], arguments.device)) as ranks:
        _Kitchen(arguments, runs, ranks).cook(weights)
    return 0


def _check_same(
    first: str,
    config: Config,
    record: Mapping[str, Any],
    run: str,
    other: Config,
    theirs: Mapping[str, Any],
    *,
    data: bool,
) -> None:
    """Refuse runs that cannot be mixed: another base, tokenizer or head; for a greedy soup also other data."""
    ours, inputs = record.get("inputs", {}), theirs.get("inputs", {})
    if ours.get("base model") != inputs.get("base model") or ("base model" not in ours and config.model != other.model):
        raise FtlabError(f"{run} and {first} began from other base models; a mean of their weights means nothing")
    names = ("tokenizer", "labels", *(("chat template", "data") if data else ()))
    if changed := [name for name in names if ours.get(name) != inputs.get(name)]:
        elsewhere = {"chat template", "data"} >= set(changed)
        advice = "; kind=greedy compares losses, so give runs on the same data, or kind=uniform" if elsewhere else ""
        raise FtlabError(f"the {' and the '.join(changed)} of {run} differ from those of {first}{advice}")


class _Kitchen:
    """The first run's plain model, into which weights are put to measure them, and its validation examples."""

    def __init__(self, arguments: SoupArguments, runs: list[str], ranks: Ranks) -> None:
        from ftlab.open_run import open_run

        self.arguments, self.runs, self.ranks = arguments, runs, ranks
        self.first: OpenRun = open_run(Path(runs[0]), base=False, ranks=ranks)
        self.model: AnyModel = self.first.plain()
        data = self.first.data()
        self.examples = data.validation
        if arguments.kind == "greedy" and not self.examples:
            raise FtlabError(f"kind=greedy needs validation examples, and {runs[0]} has none; give kind=uniform")

    def state_of(self, number: int) -> dict[str, Tensor]:
        """The whole weights that a run ended with. Errors: FtlabError if its head is another one."""
        from ftlab.models.heads import head_facts
        from ftlab.open_run import open_run

        opened = open_run(Path(self.runs[number]), base=False, ranks=self.ranks)
        if head_facts(opened.model) != head_facts(self.model):
            raise FtlabError(
                f"{self.runs[number]} makes a vector of a text in another way than {self.runs[0]} (head.pooling); give "
                "runs alike"
            )
        return dict(opened.plain().state_dict())

    def base(self, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pretrained weights, with a new head from `head`."""
        from ftlab.models.heads import fresh_parameters
        from ftlab.open_run import open_run

        model = open_run(Path(self.runs[0]), base=True, ranks=self.ranks).plain()
        return {**model.state_dict(), **{name: head[name] for name in fresh_parameters(model)}}

    def loss_of(self, state: Mapping[str, Tensor]) -> float:
        """The validation loss of these weights, in nats a supervised token, of a classifier a text."""
        from dataclasses import replace

        from ftlab import build

        self.model.load_state_dict(state)
        first = self.first
        settings = replace(first.config.evaluation, generate=False)
        measurer = build.build_measurer(
            first.config, first.tokenizer, first.precision, self.ranks, first.labels, settings
        )
        return measurer.measure(self.model, self.examples, []).scores["loss"].value

    def told(self, name: str, state: Mapping[str, Tensor]) -> float | None:
        """The validation loss, printed under a name; None without validation examples."""
        if not self.examples:
            return None
        loss = self.loss_of(state)
        self.say(f"  {loss:.4f}  {name}")
        return loss

    def say(self, line: str) -> None:
        """Print a line, once."""
        if self.ranks.is_main:
            print(line)

    def cook(self, weights: list[float]) -> None:
        """Make the mean, go the way from the base, measure and write."""
        from ftlab.methods.interpolation import Soup, greedy_soup, interpolated, normalised

        self.say(f"validation loss on the examples of {self.runs[0]}" if self.examples else "no validation example")
        soup, losses = Soup(), []
        for number, run in enumerate(self.runs):
            state = self.state_of(number)
            losses.append(self.told(run, state))
            if self.arguments.kind == "uniform":
                soup = soup.with_one(state, weights[number])
        taken = list(range(len(self.runs)))
        if self.arguments.kind == "greedy":
            known = [loss for loss in losses if loss is not None]
            soup, taken, _ = greedy_soup(known, self.state_of, self.loss_of)
            self.say(
                f"greedy: {len(taken)} of {len(self.runs)} runs: {', '.join(self.runs[number] for number in taken)}"
            )
            weights = [1.0] * len(taken)
        result, base_loss = soup.state, None
        if self.arguments.alpha < 1:
            base = self.base(head=result)
            base_loss = self.told("the base model", base)
            result = interpolated(base, result, self.arguments.alpha)
        loss = self.told(f"the result, alpha={self.arguments.alpha:g}", result)
        self.write(
            result,
            {
                "kind": self.arguments.kind,
                "alpha": self.arguments.alpha,
                "runs": [self.runs[number] for number in taken],
                "weights": normalised(weights),
                "validation_loss": {"runs": dict(zip(self.runs, losses, strict=True)), "base": base_loss, "out": loss},
            },
        )

    def write(self, state: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """The model, its tokenizer and soup.json, whole or not at all."""
        import json

        from ftlab.files import atomic_directory
        from ftlab.models.checkpoint import save_safetensors
        from ftlab.training.record import writable

        if not self.ranks.is_main:
            return
        self.model.load_state_dict(state)
        with atomic_directory(Path(self.arguments.out)) as folder:
            save_safetensors(self.model, folder)
            self.first.tokenizer.save(folder)
            (folder / "soup.json").write_text(json.dumps(writable(facts), indent=1) + "\n", encoding="utf-8")
        print(f"written to {self.arguments.out}; model.location={self.arguments.out} starts from it")


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or that of the error."""
    return guarded(_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
