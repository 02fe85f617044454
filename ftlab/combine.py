"""``python -m ftlab.combine adapters=[A,B] weights=[0.5,0.5] out=DIR``: a weighted sum of adapters as one adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.arguments import can_be_written, guarded, parse
from ftlab.errors import ConfigError, FtlabError
from ftlab.files import one_place

if TYPE_CHECKING:
    from ftlab.methods.adapters import Adapter

__all__ = ["CombineArguments", "main"]

_USAGE = "usage: python -m ftlab.combine adapters=[DIR,DIR,...] out=DIR [weights=[0.5,0.5]] [run=DIR]"


@dataclass
class CombineArguments:
    """Settings of the combine command."""

    adapters: str = field(
        metadata={"help": "[DIR,DIR,...]: folders of runs, or of adapters of ftlab or PEFT; no DoRA, no classifiers"}
    )
    out: str = field(metadata={"help": "new folder for the sum, which PEFT and ftlab load"})
    weights: str | None = field(
        default=None, metadata={"help": "[NUMBER,NUMBER,...], one an adapter, any sign; null: each 1 / their number"}
    )
    run: str | None = field(
        default=None, metadata={"help": "score each adapter and the sum on this run's model and data; null: not"}
    )
    split: str = field(default="validation", metadata={"help": "train, validation or test, for run="})


def _run(argv: list[str]) -> int:
    arguments, words = parse(CombineArguments, argv, _USAGE)
    if words:
        raise ConfigError(f"{words[0]}: not a setting; {_USAGE}")
    names = _listed(arguments.adapters)
    if len(names) < 2 or one_place(names):
        raise ConfigError(f"adapters={arguments.adapters}: give at least two folders, each once, as [runs/a,runs/b]")
    weights = _weights(arguments.weights, len(names))
    if arguments.split not in ("train", "validation", "test"):
        raise ConfigError(f"split={arguments.split}: give train, validation or test")
    if Path(arguments.out).exists():
        raise ConfigError(f"out={arguments.out} exists already; give a new folder")
    can_be_written("out", arguments.out)
    folders = [_folder(name) for name in names]
    if twice := one_place(folders):  # a run and the adapter in it
        raise ConfigError(f"adapters={arguments.adapters}: {twice[0]} is named twice; name each adapter once")

    from ftlab.methods.adapters import combined, read_adapter, write_adapter

    adapters = {name: read_adapter(folder) for name, folder in zip(names, folders, strict=True)}
    total = combined(list(adapters.values()), weights)
    if any(adapter.sample is None for adapter in adapters.values()):
        bases = sorted({adapter.base for adapter in adapters.values()})
        print(f"not all adapters say on which weights they were trained; they name as their base {', '.join(bases)}")
    if arguments.run is not None:
        _score(Path(arguments.run), arguments.split, adapters, dict(zip(names, weights, strict=True)))
    write_adapter(total, Path(arguments.out))
    ranks = sorted({len(a) for a, _ in total.factors.values()})
    print(f"{len(total.factors)} layers of rank {' and '.join(map(str, ranks))}, written to {arguments.out}")
    return 0


def _listed(text: str) -> list[str]:
    """ "[a, b]" or "a,b" -> the items."""
    return [item.strip() for item in text.strip().removeprefix("[").removesuffix("]").split(",") if item.strip()]


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1 / count] * count
    try:
        weights = [float(item) for item in _listed(text)]
    except ValueError:
        weights = []
    if len(weights) != count or not all(abs(weight) < float("inf") for weight in weights):
        raise ConfigError(f"weights={text}: give {count} numbers, one an adapter, as [0.5,0.5]")
    return weights


def _folder(name: str) -> Path:
    """The adapter's folder of a run, or the folder itself."""
    folder = Path(name)
    for candidate in (folder, folder / "adapter"):
        if (candidate / "adapter_config.json").exists():
            return candidate
    raise FtlabError(f"adapters: {name} has no adapter: neither it nor {folder / 'adapter'} has an adapter_config.json")


def _score(run: Path, split: str, adapters: dict[str, Adapter], weights: dict[str, float]) -> None:
    """Print the loss of the pretrained model, of each adapter alone and of the sum, over one model."""
    from ftlab import build
    from ftlab.evaluation.measure import Measurer
    from ftlab.methods.adapters import AdapterSet
    from ftlab.open_run import open_run, read_config
    from ftlab.training.parallel import Ranks

    if getattr(read_config(run)[0].method, "quantize", None) is not None:
        raise ConfigError(f"run={run}: its base is quantised; give a run on the pretrained weights to score on")
    opened = open_run(run, base=True)
    model = build.causal(opened.model)
    examples = getattr(opened.data(), split)
    if not examples:
        raise FtlabError(f"the {split} split of the run in {run} is empty; give another split=...")
    loss_sum = build.loss_sum_of(opened.config)
    measurer = Measurer(opened.config.evaluation, opened.tokenizer, loss_sum, opened.precision.autocast, Ranks())
    over = AdapterSet(model, adapters)
    mixes: dict[str, dict[str, float]] = {"the pretrained model": {}}
    mixes |= {name: {name: 1.0} for name in adapters}
    mixes[" + ".join(f"{weight:g} x {name}" for name, weight in weights.items())] = weights
    for name, mix in mixes.items():
        over.use(mix)
        print(f"{split} loss {measurer.measure(model, examples, []).scores['loss'].value:.4f}  {name}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or that of the error."""
    return guarded(_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
