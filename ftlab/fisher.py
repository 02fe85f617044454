"""``python -m ftlab.fisher run=DIR``: what a finished run's task needs of each weight, for regularizer=ewc.

Writes DIR/fisher.safetensors: the diagonal Fisher information of the weights that the run moved (under LoRA of the
effective weights of the adapted layers and of a classifier's head), measured on its training examples, and those
weights. With decay= also that of the runs that it was held to, for every weight that any of them moved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.arguments import at_least_one, guarded, parse
from ftlab.config.options import LARGEST_SEED
from ftlab.errors import ConfigError, FtlabError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from ftlab.data.loader import Batch
    from ftlab.data.tokenization import Example
    from ftlab.open_run import OpenRun

__all__ = ["FisherArguments", "main"]

_USAGE = "usage: python -m ftlab.fisher run=DIR [kind=true] [examples=200] [seed=0] [decay=G]"


@dataclass
class FisherArguments:
    """Settings of the fisher command."""

    run: str = field(metadata={"help": "folder of a finished run"})
    kind: str = field(
        default="true", metadata={"help": "labels drawn from the model (true) or those of the data (empirical)"}
    )
    examples: int = field(
        default=200, metadata={"help": "training examples to measure on, the first of a fixed shuffle"}
    )
    seed: int = field(default=0, metadata={"help": "of the shuffle and of drawn labels"})
    decay: float | None = field(
        default=None,
        metadata={
            "help": "online EWC: add this times the Fisher of the tasks that the run was itself held to; null: not"
        },
    )
    device: str | None = field(default=None, metadata={"help": "auto, cpu or cuda; null: the run's"})


def _run(argv: list[str]) -> int:
    arguments, words = parse(FisherArguments, argv, _USAGE)
    if words:
        raise ConfigError(f"{words[0]}: not a setting; {_USAGE}")
    if arguments.kind not in ("true", "empirical"):
        raise ConfigError(f"kind={arguments.kind}: give true or empirical")
    if arguments.decay is not None and not 0 < arguments.decay <= 1:
        raise ConfigError(f"decay={arguments.decay}: give a number above 0 and up to 1")
    at_least_one(examples=arguments.examples)
    if not 0 <= arguments.seed <= LARGEST_SEED:
        raise ConfigError(f"seed={arguments.seed}: give a whole number from 0 to {LARGEST_SEED}")

    from ftlab.data.loader import permutation
    from ftlab.losses.fisher import FILE, FisherFacts, diagonal_fisher, save_fisher
    from ftlab.models.heads import head_facts
    from ftlab.open_run import open_run, parallel_of, read_config
    from ftlab.training.parallel import start_ranks
    from ftlab.training.progress import Progress

    config, _ = read_config(Path(arguments.run))
    ewc = config.regularizer.ewc
    earlier = ewc.source if ewc.strength > 0 else []
    if arguments.decay is not None and not earlier:
        raise ConfigError(
            f"decay={arguments.decay}: the run in {arguments.run} was held to no earlier task (regularizer.ewc)"
        )
    with start_ranks(parallel_of(config, arguments.device)) as ranks:
        opened = open_run(Path(arguments.run), base=False, ranks=ranks)
        names = _moved(opened)
        model = opened.plain()
        examples = opened.data().train
        order = permutation(len(examples), arguments.seed, 0)[: arguments.examples]
        batches = (_alone(examples[i], opened).to(ranks.device) for i in order)
        progress = Progress(enabled=True)
        progress.message(f"{arguments.kind} Fisher information of {len(names)} tensors on {len(order)} examples")
        with progress.phase("fisher"):
            fisher = diagonal_fisher(
                model,
                names,
                batches,
                kind=arguments.kind,
                seed=arguments.seed,
                progress=lambda done: progress.count(done, len(order)),
            )
        progress.close()
        tasks = 1
        if arguments.decay is not None:
            fisher, tasks = _with_earlier(fisher, arguments.decay, earlier, model)
        facts = FisherFacts(arguments.kind, len(order), arguments.seed, tasks, head_facts(model))
        path = Path(arguments.run) / FILE
        save_fisher(path, fisher, {name: model.get_parameter(name) for name in fisher}, facts)
    mean = sum(float(f.double().sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    print(f"mean {mean:.3g} over {sum(f.numel() for f in fisher.values()):,} weights, written to {path}")
    print(f"now: python -m ftlab.train ... regularizer=ewc 'regularizer.ewc.source=[{arguments.run}]'")
    return 0


def _alone(example: Example, opened: OpenRun) -> Batch:
    """A batch of one example."""
    from ftlab.data.labelled import collate_labelled
    from ftlab.data.loader import collate_rows

    pad_id, multiple = opened.tokenizer.pad_id, opened.config.data.pad_to_multiple
    if opened.labels is None:
        return collate_rows([[example]], pad_id, multiple=multiple)
    return collate_labelled([example], opened.labels, pad_id, multiple)


def _moved(opened: OpenRun) -> list[str]:
    """Names of the weights whose value the run changed, as the plain model has them."""
    from ftlab.losses.penalties import AdapterLeaf
    from ftlab.methods.lora import LoRA
    from ftlab.methods.rules import adapter_table
    from ftlab.methods.trainable import trainable_parameters
    from ftlab.models.heads import head_parameters

    if isinstance(opened.method, LoRA):
        rules = adapter_table(opened.model, opened.method.config).assign(opened.model)
        adapted = [f"{name}.weight" for name, leaf in opened.model.named_modules() if isinstance(leaf, AdapterLeaf)]
        return [*adapted, *(name for name in head_parameters(opened.model) if rules[name].trainable)]
    opened.method.apply(opened.model)
    names = list(trainable_parameters(opened.model))
    opened.model.requires_grad_(False)
    return names


def _with_earlier(
    fisher: dict[str, Tensor], decay: float, sources: Sequence[str], model: nn.Module
) -> tuple[dict[str, Tensor], int]:
    """decay * F of the runs that it was held to + F (online EWC, Schwarz et al. 2018, arXiv 1805.06370, equation 9).

    A weight that only an earlier run moved keeps decay * F: later runs name this one alone, and that task needs it. The
    head of another task is not this model's, and is left out. model: plain, as `fisher` was measured on.

    Errors: FtlabError for a source whose other weights `model` does not have.
    """
    from ftlab.losses.ewc import of_another_head
    from ftlab.losses.fisher import FILE, read_fisher

    tasks = 1
    parameters = dict(model.named_parameters())
    for source in sources:
        earlier: Mapping[str, Tensor]
        earlier, _, facts = read_fisher(Path(source) / FILE)
        tasks += facts.tasks
        if other_head := of_another_head(earlier, facts, model):
            print(f"decay: the head in {Path(source) / FILE} is another task's (other labels or pooling): left out")
        for name, value in earlier.items():
            if name in other_head:
                continue
            weight = parameters.get(name)
            if weight is None or weight.shape != value.shape:
                raise FtlabError(
                    f"decay: {Path(source) / FILE} is of another model ({name} {list(value.shape)} is not here); "
                    "restore the run that this one was held to"
                )
            decayed = decay * value.to(weight.device).float()
            fisher[name] = fisher[name] + decayed if name in fisher else decayed
    return fisher, tasks


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or that of the error."""
    return guarded(_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
