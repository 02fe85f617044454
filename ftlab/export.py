"""``python -m ftlab.export run=DIR out=DIR``: the merged model in Hugging Face's format, checked on held-out text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.arguments import can_be_written, guarded, parse
from ftlab.errors import ConfigError, FtlabError

if TYPE_CHECKING:
    from torch import Tensor

    from ftlab.data.tokenization import Example
    from ftlab.open_run import OpenRun

__all__ = ["ExportArguments", "main"]

_USAGE = "usage: python -m ftlab.export run=DIR out=DIR [dtype=fp32] [max_kl=0.01]"


@dataclass
class ExportArguments:
    """Settings of the export command."""

    run: str = field(metadata={"help": "folder of a run"})
    out: str = field(metadata={"help": "new folder for config.json, model.safetensors and tokenizer.json"})
    dtype: str = field(default="fp32", metadata={"help": "fp32, bf16 or fp16; the merge itself is done in fp32"})
    max_kl: float = field(default=0.01, metadata={"help": "largest mean KL from unmerged to exported, nats a token"})


def _run(argv: list[str]) -> int:
    arguments, words = parse(ExportArguments, argv, _USAGE)
    if words:
        raise ConfigError(f"{words[0]}: not a setting; {_USAGE}")
    if arguments.dtype not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"dtype={arguments.dtype}: give fp32, bf16 or fp16")
    if Path(arguments.out).exists():
        raise ConfigError(f"out={arguments.out} exists already; give a new folder")
    can_be_written("out", arguments.out)

    from ftlab.files import atomic_directory
    from ftlab.models.checkpoint import save_safetensors
    from ftlab.open_run import open_run
    from ftlab.training.precision import dtype_of

    opened = open_run(Path(arguments.run), base=False)
    model = opened.model.float()
    data = opened.data()
    held_out = (data.validation or data.test or data.train)[:16]
    before = [_log_probabilities(opened, example) for example in held_out]
    opened.method.merge(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype_of(arguments.dtype)).float()
    after = [_log_probabilities(opened, example) for example in held_out]
    unit = "a token" if opened.labels is None else "a label"
    total = sum(float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True))
    kl = max(total / sum(b.shape[0] for b in before), 0.0)
    largest = max(float((b - a).abs().max()) for b, a in zip(before, after, strict=True))
    print(f"merged against adapter on {len(held_out)} held-out examples: KL {kl:.2e} nats {unit}, ", end="")
    print(f"largest change of a log-probability {largest:.2e}")
    if not kl <= arguments.max_kl:
        raise FtlabError(
            f"the exported model differs too much (KL {kl:.3g} > max_kl={arguments.max_kl}); use dtype=fp32"
        )
    with atomic_directory(Path(arguments.out)) as folder:
        opened.method.merged(model)
        save_safetensors(model, folder, dtype_of(arguments.dtype))
        opened.tokenizer.save(folder)
    reader = "AutoModelForCausalLM" if opened.labels is None else "AutoModelForSequenceClassification"
    print(f"written to {arguments.out}; transformers' {reader}.from_pretrained reads it{_caution(opened)}")
    return 0


def _caution(opened: OpenRun) -> str:
    """How other tools would differ: they know one pooling of a family."""
    from ftlab.models.heads import BertClassifier, Classifier

    if not isinstance(opened.model, Classifier):
        return ""
    theirs = "pooler" if isinstance(opened.model, BertClassifier) else "last"
    ours = opened.model.head.pooling
    return "" if ours == theirs else f", but pools by {theirs} where this run has head.pooling={ours}"


def _log_probabilities(opened: OpenRun, example: Example) -> Tensor:
    """In fp64: [tokens, V] of a language model; [1, C] or [C, 2] of a classifier (a number counts as a logit)."""
    import torch
    import torch.nn.functional as F

    from ftlab.build import causal
    from ftlab.data.labelled import collate_labelled

    with torch.no_grad():
        if opened.labels is None:
            logits: Tensor = causal(opened.model)(torch.tensor([list(example.token_ids)]))[0].double()
            return torch.log_softmax(logits, dim=-1)
        logits = opened.model(collate_labelled([example], opened.labels, opened.tokenizer.pad_id)).double()
        if opened.labels.kind == "single":
            return torch.log_softmax(logits, dim=-1)
        return torch.stack((F.logsigmoid(logits[0]), F.logsigmoid(-logits[0])), dim=-1)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or that of the error."""
    return guarded(_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
