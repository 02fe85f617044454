"""``python -m ftlab.generate run=DIR "..."``: answers of a finished run, greedy."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from ftlab.arguments import at_least_one, guarded, parse
from ftlab.errors import ConfigError
from ftlab.startup import without_collector

__all__ = ["GenerateArguments", "main"]

_USAGE = (
    "usage: python -m ftlab.generate run=DIR [base=false] [adapter=DIR] [max_new_tokens=64] "
    '"a prompt" ["another"] (or - for stdin)'
)


@dataclass
class GenerateArguments:
    """Settings of the generate command."""

    run: str = field(metadata={"help": "folder of a run"})
    base: bool = field(default=False, metadata={"help": "ask the pretrained model without what was trained"})
    adapter: str | None = field(
        default=None, metadata={"help": "folder of an adapter, of ftlab or of PEFT, in place of what the run trained"}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "longest answer in tokens"})
    raw: bool = field(default=False, metadata={"help": "give the words as they are, without the data's prompt wording"})
    device: str | None = field(default=None, metadata={"help": "auto, cpu or cuda; null: the run's"})


def _run(argv: list[str]) -> int:
    arguments, words = parse(GenerateArguments, argv, _USAGE)
    at_least_one(max_new_tokens=arguments.max_new_tokens)
    if arguments.adapter is not None and arguments.base:
        raise ConfigError("adapter: base=true asks the model without one; leave one of them out")
    if words == ["-"]:
        words = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not words:
        raise ConfigError(f"no prompt given; {_USAGE}")

    with without_collector():
        from ftlab.build import causal
        from ftlab.data.records import Message, wording
        from ftlab.data.templates import ChatTemplate
        from ftlab.models.generation import generate
        from ftlab.open_run import open_run, parallel_of, read_config
        from ftlab.training.parallel import start_ranks

    run_dir = Path(arguments.run)
    config, _ = read_config(run_dir)
    with start_ranks(parallel_of(config, arguments.device)) as ranks:
        adapter = None if arguments.adapter is None else Path(arguments.adapter)
        opened = open_run(run_dir, base=arguments.base, ranks=ranks, adapter=adapter)
        model = causal(opened.model)
        template = ChatTemplate.load(config.data.template, opened.tokenizer)
        system = [] if config.data.system is None else [Message("system", config.data.system)]
        prompts = []
        for word in words:
            text = word if arguments.raw else wording(config.data, word)
            prompts.append(template.prompt_ids([*system, Message("user", text)]))
        with opened.precision.autocast():
            answers = generate(
                model,
                prompts,
                max_new_tokens=arguments.max_new_tokens,
                stop_ids=opened.tokenizer.stop_ids,
                pad_id=opened.tokenizer.pad_id,
            )
        for answer in answers:
            print(opened.tokenizer.decode(answer).strip())
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or that of the error."""
    return guarded(_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
