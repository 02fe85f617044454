"""``python -m ftlab.export run=DIR out=DIR``: the merged model in Hugging Face's format, checked on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.arguments import can_be_written, guarded, parse
from ftlab.errors import ConfigError, FtlabError

if TYPE_CHECKING:
    from torch import Tensor

    from ftlab.models.llama import LlamaForCausalLM

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
    before = [_log_probabilities(model, example.token_ids) for example in held_out]
    opened.method.merge(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype_of(arguments.dtype)).float()
    after = [_log_probabilities(model, example.token_ids) for example in held_out]
    total = sum(float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True))
    kl = max(total / sum(b.shape[0] for b in before), 0.0)
    largest = max(float((b - a).abs().max()) for b, a in zip(before, after, strict=True))
    print(f"merged against adapter on {len(held_out)} held-out examples: KL {kl:.2e} nats a token, ", end="")
    print(f"largest change of a log-probability {largest:.2e}")
    if not kl <= arguments.max_kl:
        raise FtlabError(
            f"the exported model differs too much (KL {kl:.3g} > max_kl={arguments.max_kl}); use dtype=fp32"
        )
    with atomic_directory(Path(arguments.out)) as folder:
        opened.method.merged(model)
        save_safetensors(model, folder, dtype_of(arguments.dtype))
        opened.tokenizer.save(folder)
    print(f"written to {arguments.out}; transformers' AutoModelForCausalLM.from_pretrained reads it")
    return 0


def _log_probabilities(model: LlamaForCausalLM, token_ids: Sequence[int]) -> Tensor:
    """[tokens, V] in fp64."""
    import torch

    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(token_ids)]))
    return torch.log_softmax(logits[0].double(), dim=-1)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or that of the error."""
    return guarded(_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
