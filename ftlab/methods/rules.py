"""Which pretrained weights train, and how fast, as rules over Hugging Face parameter names.

Layer-wise decay (arXiv 2003.10555, as discriminative fine-tuning in arXiv 1801.06146): of L blocks, counted from 0 at
the bottom, block i learns at lr * decay ** (L - 1 - i), the embedding at lr * decay ** L, and what lies above the
blocks at lr. The uppermost block so learns at lr itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ftlab.config import LoRAConfig, MethodConfig
from ftlab.errors import ConfigError
from ftlab.methods.trainable import Rule, TrainableTable
from ftlab.models.heads import head_layers, head_parameters
from ftlab.patterns import block_ranges, pattern_and_factor

__all__ = [
    "Choice",
    "adapter_table",
    "block_numbers",
    "block_of",
    "graded",
    "num_blocks",
    "own_rules",
    "table",
    "weight_table",
]

EMBEDDING = r"(.*\.)?(embed_tokens\.weight|embeddings\..*)"
HEAD = r"(.*\.)?(lm_head|pooler|classifier|score)\..*"
NORM = r"\w*[nN]orm\.(weight|bias)"
LAST_NORM = r"(model\.)?norm\.(weight|bias)"


@dataclass(frozen=True)
class Choice:
    """Which weights train: blocks by number; embedding; the last norm and a head of its own; norms of which blocks."""

    blocks: frozenset[int]
    embeddings: bool
    head: bool = True
    norms: str = "trained"


def block_of(name: str) -> int | None:
    """The number of the block that a parameter lies in, by its name; None outside of blocks."""
    found = _BLOCK.search(name)
    return None if found is None else int(found.group(1))


def num_blocks(model: nn.Module) -> int:
    """How many blocks the parameter names of `model` count."""
    numbers = [block for name, _ in model.named_parameters() if (block := block_of(name)) is not None]
    return max(numbers, default=-1) + 1


def block_numbers(text: str, total: int) -> frozenset[int]:
    """ "20-29" or "0,5,28-" -> the numbers of the blocks. Errors: ConfigError if it names none of `total`."""
    chosen: set[int] = set()
    for first, given in block_ranges(text):
        last = total - 1 if given is None else given
        if first > last or last >= total:
            raise ConfigError(
                f"method.layers: {first}-{'' if given is None else last} is no range of the model's {total} blocks, "
                f"0 to {total - 1}"
            )
        chosen.update(range(first, last + 1))
    return frozenset(chosen)


def own_rules(rates: Sequence[str]) -> list[Rule]:
    """method.rates as rules: PATTERN matches whole parts of a parameter's name, such as q_proj or layers.0."""
    parsed = [pattern_and_factor("method.rates", entry) for entry in rates]
    return [Rule(whole, trainable=factor > 0, lr_scale=factor or 1.0) for whole, factor in parsed]


def weight_table(model: nn.Module, config: MethodConfig, choice: Choice) -> TrainableTable:
    """The table of a choice of pretrained weights. Errors: ConfigError if an entry of method.rates matches nothing."""
    total = num_blocks(model)
    decay = config.layer_decay
    # Before the embedding, which has a norm of its own in an encoder.
    rules = [Rule(rf"(.*\.)?{NORM}", trainable=False)] if choice.norms == "none" else []
    rules.append(Rule(EMBEDDING, choice.embeddings, decay**total if choice.embeddings else 1.0))
    rules += [Rule(pattern, choice.head) for pattern in (HEAD, LAST_NORM)]
    if choice.norms == "all":
        rules += _of_blocks(set(range(total)) - choice.blocks, rf"(.*\.)?{NORM}", decay, total)
    rules += _of_blocks(choice.blocks, ".*", decay, total)
    if decay == 1 and choice == Choice(frozenset(range(total)), choice.embeddings):
        rules = [rules[0], Rule(".*", trainable=True)]  # what follows the embedding is everything
    else:
        rules.append(Rule(".*", trainable=False))
    return table(model, [*own_rules(config.rates), *rules], len(config.rates))


def adapter_table(model: nn.Module, config: LoRAConfig) -> TrainableTable:
    """The table of LoRA's A and B, and DoRA's magnitudes; B learns `b_rate` times as fast, the others at lr.

    Own rates change those of what trains alone.
    """
    total = num_blocks(model) if config.layer_decay != 1 else 0
    trains = "|".join([r".*lora_(A|B|magnitude_vector)", *map(re.escape, head_parameters(model))])
    own = [Rule(rf"(?=({trains})$){rule.pattern}", rule.trainable, rule.lr_scale) for rule in own_rules(config.rates)]
    rules: list[Rule] = []
    parts = (("A", 1.0), ("B", config.b_rate), *([("magnitude_vector", 1.0)] if config.dora else []))
    for part, factor in parts:
        for block in range(total):
            rate = factor * config.layer_decay ** (total - 1 - block)
            rules.append(Rule(rf"(.*\.)?layers?\.{block}\..*lora_{part}", trainable=True, lr_scale=rate))
        rules.append(Rule(rf"(.*\.)?lora_{part}", trainable=True, lr_scale=factor))
    if config.b_rate == 1 and not total:
        rules = [Rule(r"(.*\.)?lora_(A|B|magnitude_vector)" if config.dora else r"(.*\.)?lora_[AB]", trainable=True)]
    return table(model, [*own, *rules, Rule(".*", trainable=False)], len(own))


def table(model: nn.Module, rules: Sequence[Rule], own: int) -> TrainableTable:
    """A table of the first `own` rules, each of which must decide for something, and of the others that do.

    The head of a classifier trains under any method unless an own rule says otherwise.
    """
    head = [Rule(re.escape(layer) + r"\..*", trainable=True) for layer in head_layers(model)]
    rules = [*rules[:own], *head, *rules[own:]]
    patterns = [re.compile(rule.pattern) for rule in rules]
    used = set()
    for name, _ in model.named_parameters():
        used.add(next(index for index, pattern in enumerate(patterns) if pattern.fullmatch(name)))
    idle = sorted(set(range(own)) - used)
    if idle:
        names = [name for name, _ in model.named_parameters()]
        raise ConfigError(
            f"method.rates: entry {idle[0] + 1} matches no parameter, or earlier entries take all of its own; the "
            f"names are such as {', '.join(names[:: max(len(names) // 4, 1)][:5])}"
        )
    found = TrainableTable([rule for index, rule in enumerate(rules) if index in used])
    if not any(rule.trainable for rule in found.rules):
        raise ConfigError(
            "method: nothing trains with these settings; let blocks, norms, the head or the embedding train"
        )
    return found


def graded(what: str, decay: float, total: int) -> list[Rule]:
    """Trainable rules over all that matches `what`, in the blocks, the embedding and above them, each at its rate."""
    above = Rule(what, trainable=True)
    if decay == 1:
        return [above]
    embedding = Rule(rf"(?={EMBEDDING}$){what}", trainable=True, lr_scale=decay**total)
    return [*_of_blocks(range(total), what, decay, total), embedding, above]


def _of_blocks(blocks: Iterable[int], what: str, decay: float, total: int) -> list[Rule]:
    """Trainable rules over the parameters of some blocks whose names go on with `what`; one a block if rates differ."""
    numbers = sorted(blocks)
    if not numbers:
        return []
    if decay == 1:
        return [Rule(rf"(.*\.)?layers?\.({'|'.join(map(str, numbers))})\.{what}", trainable=True)]
    return [Rule(rf"(.*\.)?layers?\.{i}\.{what}", trainable=True, lr_scale=decay ** (total - 1 - i)) for i in numbers]


_BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.")
