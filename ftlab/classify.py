"""What `build` makes for data with labels: a classifier, its data, its objective and its measurer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from ftlab.assets import resolve
from ftlab.config import Config, PretrainedConfig, RandomBertConfig, makes_classifier
from ftlab.data.labelled import encode_labelled, load_labelled
from ftlab.data.records import SourceInfo, Splits
from ftlab.data.tokenization import Example
from ftlab.errors import ConfigError, FtlabError
from ftlab.losses.classification import classification_loss
from ftlab.models.bert import BertConfig, BertModel, is_bert, load_bert, random_bert
from ftlab.models.heads import BertClassifier, Classifier, Head, LlamaClassifier
from ftlab.models.labels import LabelSet
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ftlab.training.parallel import Ranks

__all__ = ["check_lengths", "classifier", "encoder", "labelled_data", "objective"]


def labelled_data(
    config: Config, tokenizer: Tokenizer
) -> tuple[SourceInfo, Splits, LabelSet, tuple[list[Example], list[Example], list[Example]]]:
    """Records, their labels and their tokens."""
    data = config.data
    assert makes_classifier(data)
    splits, info, labels = load_labelled(data)
    train, validation, test = (
        encode_labelled(side, labels, tokenizer, data) for side in (splits.train, splits.validation, splits.test)
    )
    return info, splits, labels, (train, validation, test)


def encoder(config: Config, tokenizer: Tokenizer, ranks: Ranks, dtype: torch.dtype) -> BertModel | None:
    """The encoder that the model group names; None if it names a decoder."""
    model = config.model
    pooler = config.head.pooling == "pooler"
    if isinstance(model, RandomBertConfig):
        sizes = BertConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            max_position_embeddings=model.max_positions,
            pad_token_id=tokenizer.pad_id,
        )
        return random_bert(sizes, model.init_seed, pooler=pooler).to(device=ranks.device, dtype=dtype)
    if not isinstance(model, PretrainedConfig) or not is_bert(path := resolve(model.location)):
        return None
    bert = load_bert(path, dtype=dtype, device=ranks.device, pooler=pooler)
    if tokenizer.vocab_size > bert.config.vocab_size:
        raise FtlabError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.location} rows for "
            f"{bert.config.vocab_size}; give the tokenizer that belongs to it in model.tokenizer"
        )
    return bert


def classifier(
    config: Config, base: BertModel | LlamaForCausalLM, labels: LabelSet, tokenizer: Tokenizer
) -> Classifier:
    """The base with a new head for these labels, drawn by training.seed."""
    auto = "mean" if isinstance(base, BertModel) else "last"
    pooling = auto if config.head.pooling == "auto" else config.head.pooling
    if pooling in ("cls", "pooler") and tokenizer.bos_id is None:
        raise ConfigError(f"head.pooling: {pooling} reads the first token, but this tokenizer starts no text; use mean")
    head = Head(labels, pooling, config.training.seed)
    if isinstance(base, BertModel):
        return BertClassifier(base, head)
    return LlamaClassifier(base, head)


def check_lengths(examples: list[Example], model: Classifier) -> None:
    """Errors: FtlabError naming a text that has more tokens than an encoder has positions."""
    if not isinstance(model, BertClassifier):
        return
    longest = max(examples, key=lambda example: len(example.token_ids))
    if len(longest.token_ids) > model.config.max_position_embeddings:
        raise FtlabError(
            f"{longest.id}: {len(longest.token_ids)} tokens, but the encoder has "
            f"{model.config.max_position_embeddings} positions; lower data.max_length, and set data.too_long to "
            "truncate or drop"
        )


def objective(config: Config, label_smoothing: float = 0.0, r_drop: float = 0.0) -> Any:
    """(model, batch) -> summed loss."""
    data = config.data
    assert makes_classifier(data)
    return functools.partial(classification_loss, kind=data.labels, label_smoothing=label_smoothing, r_drop=r_drop)
