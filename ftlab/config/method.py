"""What trains (group `method`)."""

from __future__ import annotations

from dataclasses import dataclass

from ftlab.config.options import option

__all__ = [
    "BitFitConfig",
    "FreezeConfig",
    "FullConfig",
    "GradualUnfreezeConfig",
    "LinearProbeConfig",
    "LoRAConfig",
    "MethodConfig",
]


@dataclass
class MethodConfig:
    """What trains."""

    name: str = option("method", "label used in reports and run names")
    layer_decay: float = option(
        1.0, "block i of L learns at lr * layer_decay ** (L - 1 - i), an embedding at ** L", above=0, high=1
    )
    rates: list[str] = option(
        list, "your own rates, PATTERN:FACTOR of the learning rate; the first that matches decides, 0 freezes"
    )


@dataclass
class FullConfig(MethodConfig):
    """Every weight trains."""

    train_embeddings: bool = option(True, "whether the token embedding (and a tied head) trains")


@dataclass
class FreezeConfig(MethodConfig):
    """The upper blocks train, the lower ones keep their pretrained weights."""

    frozen_fraction: float = option(2 / 3, "share of the blocks, from the lowest, that stay frozen", low=0, high=1)
    layers: str | None = option(None, "blocks that train, such as 20-29 or 0,5,28-; null: those above the frozen ones")
    train_embeddings: bool = option(False, "whether the token embedding (and a tied head) trains")
    train_head: bool = option(True, "whether the last norm and a language model's own head train")
    norms: str = option(
        "trained", "norms that train: of trained blocks, all, or none", choices=("trained", "all", "none")
    )


@dataclass
class LinearProbeConfig(MethodConfig):
    """The head alone trains, on features that stay as they are."""


@dataclass
class BitFitConfig(MethodConfig):
    """The biases alone train (arXiv 2106.10199)."""

    train_norms: bool = option(False, "whether the weights of the norms train too")


@dataclass
class GradualUnfreezeConfig(MethodConfig):
    """The uppermost blocks train first and lower ones join from the top down (arXiv 1801.06146)."""

    first_blocks: int = option(
        1, "blocks that train from the start, besides the last norm and a head of its own", low=0
    )
    blocks: int = option(1, "blocks that join at a time", low=1)
    trigger: str = option("epoch", "what makes more of them join", choices=("step", "epoch", "stall"))
    every: int = option(1, "steps, epochs, or validations in a row without a better one, until more join", low=1)
    train_embeddings: bool = option(False, "whether the token embedding (and a tied head) joins last")


@dataclass
class LoRAConfig(MethodConfig):
    """Low-rank adapters on linear layers (arXiv 2106.09685)."""

    rank: int = option(16, "rank r of the update B A", low=1, high=1024)
    alpha: float = option(32.0, "the update is scaled by alpha / r, or alpha / sqrt(r) with rslora", above=0)
    rslora: bool = option(False, "scale by alpha / sqrt(r) (arXiv 2312.03732)")
    b_rate: float = option(1.0, "B learns at this many times the rate of A: LoRA+ (arXiv 2402.12354)", above=0)
    dropout: float = option(0.0, "dropout on the adapter's input", low=0, below=1)
    targets: list[str] = option(
        lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "linear layers to adapt: a regular expression that matches the whole name or its last parts",
    )
    ranks: list[str] = option(list, "other ranks, PATTERN:RANK of a layer's name; the first that matches decides")
    alphas: list[str] = option(list, "other alphas, PATTERN:ALPHA of a layer's name; the first that matches decides")
    init: str = option(
        "default",
        "first A and B: default (B is 0), or pissa, the principal components of the weight (arXiv 2404.02948)",
        choices=("default", "pissa"),
    )
    quantize: str | None = option(
        None, "store the adapted weights in 4 bits: nf4, QLoRA (arXiv 2305.14314); null: not", choices=("nf4",)
    )
    start_from: str | None = option(
        None, "folder of an adapter, of ftlab or of PEFT, to train on from; rank, alpha, targets must be its own"
    )
    dora: bool = option(False, "train the norm of each row of the weight apart from its direction (arXiv 2402.09353)")
