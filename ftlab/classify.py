"""What `build` makes for data with labels: a classifier, its data, its objective and its measurer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from ftlab.assets import resolve
from ftlab.config import (
    Config,
    DataConfig,
    LabelledDataConfig,
    LoRAConfig,
    PretrainedConfig,
    RandomBertConfig,
    makes_classifier,
)
from ftlab.data.labelled import LabelledExample, LabelledRecord, encode_labelled, load_labelled
from ftlab.data.records import SourceInfo, Splits
from ftlab.data.tokenization import Example
from ftlab.errors import ConfigError, FtlabError
from ftlab.evaluation.text_metrics import normalise_answer
from ftlab.losses.classification import classification_loss
from ftlab.models.bert import BertConfig, BertModel, is_bert, load_bert, random_bert
from ftlab.models.heads import BertClassifier, Classifier, Head, LlamaClassifier, head_in, read_head
from ftlab.models.labels import LabelSet, label_text
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ftlab.training.parallel import Ranks

__all__ = ["about_head", "check_answers", "check_texts", "classifier", "encoder", "labelled_data", "objective"]


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
    pooler = _pooling(config, "mean") == "pooler"
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
    tokenizer.check_rows(bert.config.vocab_size, model.location)
    return bert


def classifier(
    config: Config, base: BertModel | LlamaForCausalLM, labels: LabelSet, tokenizer: Tokenizer
) -> Classifier:
    """The base with a head for these labels: model.location's if it is theirs, else one drawn by training.seed."""
    pooling = _pooling(config, "mean" if isinstance(base, BertModel) else "last")
    if pooling in ("cls", "pooler") and tokenizer.bos_id is None:
        raise ConfigError(f"head.pooling: {pooling} reads the first token, but this tokenizer starts no text; use mean")
    head = Head(labels, pooling, config.training.seed)
    if isinstance(base, BertModel):
        data, positions = config.data, base.config.max_position_embeddings
        if data.pad_rows and data.row_length > positions:
            raise ConfigError(
                f"data.row_length: data.pad_rows=true pads to {data.row_length} tokens, and the encoder has "
                f"{positions} positions; lower it"
            )
        return _with_read_head(config, BertClassifier(base, head))
    p = config.regularizer.dropout.attention
    if p > 0 and config.kernels in ("native", "triton"):
        raise ConfigError(
            f"kernels: {config.kernels} has no kernel with regularizer.dropout.attention={p} in a decoder; use "
            "kernels=auto, which leaves that to torch"
        )
    return _with_read_head(config, LlamaClassifier(base, head))


def _with_read_head(config: Config, model: Classifier) -> Classifier:
    """The model, its head read from model.location if that is the same."""
    if not _why_new(config, model.head.labels):
        assert isinstance(config.model, PretrainedConfig)
        read_head(model, resolve(config.model.location))
    return model


def _saved_head(config: Config) -> Head | None:
    """The head in the folder of model.location, if it holds a whole classifier."""
    return head_in(resolve(config.model.location)) if isinstance(config.model, PretrainedConfig) else None


def _pooling(config: Config, auto: str) -> str:
    """head.pooling; auto is that of the head in model.location, or without one `auto`."""
    if config.head.pooling != "auto":
        return config.head.pooling
    saved = _saved_head(config)
    return auto if saved is None else saved.pooling


def _why_new(config: Config, labels: LabelSet) -> str:
    """Why the head is not the one in the folder of model.location; empty: it is."""
    saved = _saved_head(config)
    if saved is None:
        return "model.location has none" if isinstance(config.model, PretrainedConfig) else "the weights are random"
    if saved.labels != labels:
        return f"that of model.location has other labels ({saved.labels}) than these data ({labels})"
    if config.head.pooling not in ("auto", saved.pooling):
        return f"that of model.location has the pooling {saved.pooling}, and head.pooling is {config.head.pooling}"
    return ""


def about_head(config: Config, labels: LabelSet) -> str:
    """A line that says what became of the head in model.location; empty where there is none, or an adapter brings one.

    Errors: ConfigError if regularizer.lwf is to keep the answers of a new head.
    """
    if isinstance(config.method, LoRAConfig) and config.method.start_from is not None:
        return ""
    why = _why_new(config, labels)
    if why and config.regularizer.lwf.strength > 0:
        raise ConfigError(
            f"regularizer.lwf.strength: the head is new ({why}), so it has no old answer to keep; start from a "
            "classifier of the same labels, by model.location=RUN/model or method.start_from=RUN/adapter, or set it "
            "to 0"
        )
    if not why:
        return f"the head is that of model.location ({labels})"
    return f"the head is new: {why}" if _saved_head(config) is not None else ""


def check_answers(data: DataConfig, splits: Splits) -> None:
    """Errors: FtlabError naming labels that data.instruction asks for and exact_match would count as one.

    Compared are the labels by name and, of several a text, the answers that the records have.
    """
    if not isinstance(data, LabelledDataConfig) or data.instruction is None:
        return
    found: set[tuple[str, ...]] = set()
    for record in (*splits.train, *splits.validation, *splits.test):
        assert isinstance(record, LabelledRecord)
        label = record.label if isinstance(record.label, tuple) else (str(record.label),)
        found |= {label, *((name,) for name in label)}
    advice = "rename one in the data, or train a head, without data.instruction"
    first: dict[str, tuple[str, ...]] = {}
    for label in sorted(found):
        compared = normalise_answer(label_text(label))
        if not compared:  # punctuation alone
            raise FtlabError(
                f"data.instruction: exact_match, which ignores case and outer punctuation, cannot tell the label "
                f"{_shown(label)} from an empty answer; {advice}"
            )
        other = first.setdefault(compared, label)
        if other != label:
            raise FtlabError(
                f"data.instruction: exact_match, which ignores case and outer punctuation, cannot tell the labels "
                f"{_shown(other)} and {_shown(label)} apart; {advice}"
            )


def _shown(label: tuple[str, ...]) -> str:
    """One label as a text, several or none as a list."""
    return repr(label[0] if len(label) == 1 else list(label))


def check_texts(examples: list[Example], model: Classifier) -> None:
    """Errors: FtlabError naming a text that an encoder cannot read: it has too few positions or kinds of segment."""
    if not isinstance(model, BertClassifier):
        return
    longest = max(examples, key=lambda example: len(example.token_ids))
    if len(longest.token_ids) > model.config.max_position_embeddings:
        raise FtlabError(
            f"{longest.id}: {len(longest.token_ids)} tokens, but the encoder has "
            f"{model.config.max_position_embeddings} positions; lower data.max_length, and set data.too_long to "
            "truncate or drop"
        )
    kinds = model.config.type_vocab_size
    for example in examples if kinds < 2 else ():  # two is what pairs need: nothing to look for
        if isinstance(example, LabelledExample) and max(example.token_types, default=0) >= kinds:
            raise FtlabError(
                f"{example.id}: has a second text, but the encoder has one kind of segment (type_vocab_size={kinds}) "
                "and pairs need two; join the texts in one field, or take another model"
            )


def objective(config: Config, label_smoothing: float = 0.0, r_drop: float = 0.0) -> Any:
    """(model, batch) -> summed loss."""
    data = config.data
    assert makes_classifier(data)
    return functools.partial(classification_loss, kind=data.labels, label_smoothing=label_smoothing, r_drop=r_drop)
