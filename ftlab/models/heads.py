"""Classifiers: an encoder or a decoder, one vector a text, and a linear head.

    logits = W dropout(pool(h)) + b

pool is the mean over real tokens, the first token (cls), BERT's tanh(dense(first token)) (pooler), or the last real
token. Names are those of Hugging Face's `BertForSequenceClassification` (`bert.*`, `classifier.*`) and
`LlamaForSequenceClassification` (`model.*`, `score.weight`, no bias).

Shapes: E texts, T positions, D width, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ftlab.errors import ConfigError, FtlabError
from ftlab.models.bert import CLASSIFIER, BertModel
from ftlab.models.checkpoint import CONFIG, SafetensorsFiles, read_json
from ftlab.models.labels import LabelSet
from ftlab.models.llama import Linear, LlamaConfig, LlamaForCausalLM
from ftlab.models.loading import compare_names, read_tensor
from ftlab.models.noise import QUIET, Noise
from ftlab.operators import TORCH, Operators
from ftlab.operators.dropout import dropout

__all__ = [
    "AnyModel",
    "BertClassifier",
    "Classifier",
    "Head",
    "LlamaClassifier",
    "TextBatch",
    "fresh_layers",
    "fresh_parameters",
    "head_facts",
    "head_in",
    "head_layers",
    "head_parameters",
    "is_head",
    "read_head",
    "refill",
]


class TextBatch(Protocol):
    """The part of a batch that a classifier reads; rows are padded on the right."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids, [E, T]."""

    @property
    def mask(self) -> Tensor:
        """True at real tokens, [E, T]."""

    @property
    def token_types(self) -> Tensor:
        """0 in the first text, 1 in the second, [E, T]."""

    @property
    def position_ids(self) -> Tensor:
        """Positions inside each text, [E, T]."""

    @property
    def documents(self) -> Any:
        """Where each text lies; its padding is a document of its own."""


POOLINGS = ("mean", "cls", "pooler", "last")
LM_HEAD = "lm_head"


@dataclass(frozen=True)
class Head:
    """What a head is made of: the labels, how one vector is made of a text, and the seed of W."""

    labels: LabelSet
    pooling: str
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """What makes the weights of two heads mean the same: the labels in their order, their kind, the pooling."""
        return {**self.labels.as_dict(), "pooling": self.pooling}


class _HeadMixin:
    """What both classifiers have in common; `layer` is the attribute that holds the linear layer."""

    head: Head
    layer: str
    noise: Noise
    architecture: str
    new_head = True  # W is drawn; False: it was read (`read_head`), so it has a first value to be held to

    def _logits(self, h_ETD: Tensor, mask_ET: Tensor, pooler: nn.Module | None, linear: nn.Linear) -> Tensor:
        """[E, C], in fp32 whatever the model computed in."""
        # A head that trains is stored wider than a frozen body may compute in.
        pooled_ED = pool(h_ETD, mask_ET, self.head.pooling, pooler).to(linear.weight.dtype)
        out: Tensor = linear(dropout(pooled_ED, self.noise.head if linear.training else 0.0)).float()
        return out

    def _hf_head(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {
            **fields,
            "architectures": [self.architecture],
            **self.head.labels.to_hf(),
            "ftlab_pooling": self.head.pooling,
        }


def pool(h_ETD: Tensor, mask_ET: Tensor, pooling: str, pooler: nn.Module | None = None) -> Tensor:
    """One vector a text, [E, D]; what stands at padded positions does not matter."""
    if pooling == "mean":
        real = mask_ET.unsqueeze(-1)
        return h_ETD.masked_fill(~real, 0).sum(1) / real.sum(1)
    if pooling == "last":
        return h_ETD[torch.arange(len(h_ETD), device=h_ETD.device), mask_ET.sum(1) - 1]
    if pooling == "pooler":
        assert pooler is not None
        out: Tensor = pooler(h_ETD)
        return out
    return h_ETD[:, 0]


def fresh_layer(width: int, head: Head, deviation: float, *, bias: bool) -> nn.Linear:
    """The linear layer: W from N(0, deviation^2) by the head's seed, b = 0."""
    generator = torch.Generator().manual_seed(head.seed)
    linear = Linear(width, head.labels.size, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.empty(linear.weight.shape).normal_(0.0, deviation, generator=generator))
        if bias:
            linear.bias.zero_()
    return linear


class BertClassifier(_HeadMixin, nn.Module):
    """An encoder with a head."""

    layer, architecture = "classifier", CLASSIFIER

    def __init__(self, bert: BertModel, head: Head) -> None:
        super().__init__()
        if head.pooling == "pooler" and bert.pooler is None:
            raise ConfigError("head.pooling: pooler needs an encoder that was loaded with its pooler")
        self.head, self.config = head, bert.config
        self.operators, self.noise = TORCH, QUIET
        self.bert = bert
        weight = bert.embeddings.word_embeddings.weight
        self.classifier = fresh_layer(self.config.hidden_size, head, self.config.initializer_range, bias=True)
        self.classifier.to(device=weight.device, dtype=weight.dtype)

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder layers."""
        return self.bert.encoder.layer

    @property
    def checkpoint_blocks(self) -> bool:
        """Whether activations are recomputed."""
        return self.bert.checkpoint_blocks

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, recompute: bool) -> None:
        self.bert.checkpoint_blocks = recompute

    def use(self, operators: Operators) -> None:
        """Compute the adapters by these operators; the encoder itself is torch's."""
        for module in self.modules():
            if hasattr(module, "operators"):
                module.operators = operators  # type: ignore[assignment]

    def hf_config(self, dtype: str) -> dict[str, Any]:
        """The fields of its config.json."""
        return self._hf_head(self.config.to_hf(dtype))

    def forward(self, batch: TextBatch) -> Tensor:
        """[E, C]. Padding beyond the encoder's positions is cut off; a text that long is an error."""
        ids_ET, mask_ET, types_ET = batch.input_ids, batch.mask, batch.token_types
        positions = self.config.max_position_embeddings
        # Rows are padded to a multiple, which positions need not be.
        if ids_ET.shape[1] > positions and not mask_ET[:, positions:].any():
            ids_ET, mask_ET, types_ET = (part[:, :positions] for part in (ids_ET, mask_ET, types_ET))
        h_ETD = self.bert(ids_ET, mask_ET, types_ET)
        return self._logits(h_ETD, mask_ET, self.bert.pooler, self.classifier)


class LlamaClassifier(_HeadMixin, LlamaForCausalLM):
    """A decoder whose head gives labels instead of tokens; takes over the decoder of a causal model."""

    layer, architecture = "score", "LlamaForSequenceClassification"

    def __init__(self, base: LlamaForCausalLM, head: Head) -> None:
        if head.pooling not in ("last", "mean"):
            raise ConfigError(
                f"head.pooling: {head.pooling} reads the first token, which in a decoder sees no other; use last"
            )
        config: LlamaConfig = base.config
        super().__init__(config)
        self.head, self.lm_head, self.model = head, None, base.model
        weight = base.model.embed_tokens.weight
        self.score = fresh_layer(config.hidden_size, head, config.initializer_range, bias=False)
        self.score.to(device=weight.device, dtype=weight.dtype)

    def hf_config(self, dtype: str) -> dict[str, Any]:
        """The fields of its config.json."""
        return self._hf_head(self.config.to_hf(dtype))

    def _before_head(self, h_BTD: Tensor) -> Tensor:
        return h_BTD  # dropout is on what is made of a text's tokens

    def forward(self, batch: TextBatch) -> Tensor:  # type: ignore[override]  # another task, other arguments
        """[E, C]."""
        h_ETD = self.hidden_states(batch.input_ids, batch.position_ids, batch.documents)
        return self._logits(h_ETD, batch.mask, None, self.score)


Classifier = BertClassifier | LlamaClassifier
AnyModel = LlamaForCausalLM | BertClassifier


def head_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that are a classifier's head: they train whatever else does, and are saved whole."""
    return (model.layer,) if isinstance(model, _HeadMixin) else ()


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Their parameters by name."""
    names = head_layers(model)
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in names}


def fresh_layers(model: nn.Module) -> tuple[str, ...]:
    """Those of them that have no pretrained values: a new head."""
    return (model.layer,) if isinstance(model, _HeadMixin) and model.new_head else ()


def fresh_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a new head by name."""
    return head_parameters(model) if fresh_layers(model) else {}


def head_facts(model: nn.Module) -> dict[str, Any] | None:
    """`Head.facts` of a classifier; None: the model gives tokens."""
    return model.head.facts() if isinstance(model, _HeadMixin) else None


def is_head(name: str) -> bool:
    """Whether a parameter's name is that of a head, of labels or of tokens."""
    return name.partition(".")[0] in (LM_HEAD, BertClassifier.layer, LlamaClassifier.layer)


def is_pooler(name: str) -> bool:
    """Whether a parameter's name is that of BERT's pooler, which a head of another pooling goes without."""
    return name.startswith("bert.pooler.")


def head_in(path: Path) -> Head | None:
    """The head of the whole classifier in a folder of ftlab's or transformers'; None for any other folder or file.

    The pooling is `ftlab_pooling`, or else transformers' own: BERT's pooler, the last token of a decoder.

    Errors: FtlabError if config.json does not tell its labels, or names another pooling.
    """
    fields = read_json(path / CONFIG) if path.is_dir() else {}
    poolings = {BertClassifier.architecture: "pooler", LlamaClassifier.architecture: "last"}
    for architecture in fields.get("architectures") or ():
        if architecture in poolings:
            pooling = fields.get("ftlab_pooling", poolings[architecture])
            if pooling not in POOLINGS:
                raise FtlabError(f"{path / CONFIG}: ftlab_pooling={pooling!r} is none of {', '.join(POOLINGS)}")
            return Head(LabelSet.from_hf(fields, str(path / CONFIG)), pooling)
    return None


def read_head(model: Classifier, directory: Path) -> None:
    """Read the weights of the head, in fp32, from the folder of a whole classifier with the same `Head.facts`.

    Errors: FtlabError if they are not there, or of another shape.
    """
    source = SafetensorsFiles(directory)
    own = head_parameters(model)
    found = {name for name in source.shapes if name.partition(".")[0] == model.layer}
    compare_names(source, found, {name: tuple(parameter.shape) for name, parameter in own.items()})
    for name, parameter in own.items():
        parameter.data = read_tensor(source, name, torch.float32, parameter.device)
    model.new_head = False


def refill(model: Classifier, directory: Path) -> None:
    """Read every weight of a classifier from a folder that `save_safetensors` wrote of one like it.

    Errors: FtlabError if its configuration, labels or pooling differ, or a tensor is missing, left over or misshapen.
    """
    ours, theirs = model.hf_config(""), read_json(directory / CONFIG)
    differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if differing := [key for key in differing if key != "torch_dtype"]:
        raise FtlabError(
            f"{directory}: config.json describes another model than the one to be filled ({', '.join(differing)} "
            "differ); use that one"
        )
    source = SafetensorsFiles(directory)
    state = model.state_dict()
    compare_names(source, set(source.shapes), {name: tuple(tensor.shape) for name, tensor in state.items()})
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(read_tensor(source, name, torch.float32, tensor.device))
