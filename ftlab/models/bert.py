"""The BERT encoder (Devlin et al. 2018, arXiv 1810.04805), with the parameter names of Hugging Face's `BertModel`.

    h <- LayerNorm(h + dense(attention(h))),   h <- LayerNorm(h + dense(gelu(dense(h))))

Shapes: B rows, T positions, D width, H heads, E width of a head. Rows are padded on the right; `mask_BT` is True at
real tokens, and no real position reads what stands at a padded one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlab.errors import FtlabError
from ftlab.models.checkpoint import CONFIG, SafetensorsFiles, TensorFiles, read_json
from ftlab.models.configuration import HARMLESS, is_off
from ftlab.models.llama import Embedding, Linear, project
from ftlab.models.loading import compare_names, read_tensor
from ftlab.models.noise import QUIET, embedding_noise, left_out
from ftlab.operators.dropout import dropout

__all__ = ["CLASSIFIER", "BertConfig", "BertModel", "is_bert", "load_bert", "random_bert"]

CLASSIFIER = "BertForSequenceClassification"  # among the architectures of a config.json
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
)
FIXED: dict[str, Any] = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
# Rates of dropout in the file are those of its pretraining; here they are settings of the run. Tied is the head that
# guesses masked words, which is not read.
OWN_HARMLESS = HARMLESS | {
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "gradient_checkpointing",
    "tie_word_embeddings",
}
POSITION_IDS = re.compile(r"(bert\.)?embeddings\.position_ids")  # 0, 1, 2, ... as a buffer of old checkpoints
PRETRAINING_HEADS = re.compile(r"cls\..*")  # masked words and next sentence
CLASSIFIER_HEAD = re.compile(r"classifier\..*")
POOLER = re.compile(r"pooler\..*")


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder, with the field names of Hugging Face."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise FtlabError(f"model configuration: {name} is {value!r}; it must be a positive integer")
        if self.hidden_size % self.num_attention_heads:
            raise FtlabError(
                f"model configuration: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise FtlabError(
                f"model configuration: hidden_act {self.hidden_act!r} is not implemented (only "
                f"{', '.join(ACTIVATIONS)}); use a model with one of them"
            )

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], where: str = "config.json") -> BertConfig:
        """Read the fields of a config.json; one that may change the maths and is not known here is refused by name."""
        own = cls.__dataclass_fields__
        for name, value in fields.items():
            if name in FIXED:
                if value is not None and value != FIXED[name]:
                    raise FtlabError(f"{where}: {name}={value!r} is not implemented (only {FIXED[name]!r})")
            elif name not in own and name not in OWN_HARMLESS and not name.startswith("_") and not is_off(value):
                raise FtlabError(
                    f"{where}: the field {name}={value!r} is not known here and may change what the model computes; "
                    "use a model without it, or delete the field if it has no effect"
                )
        if missing := [name for name in SIZES[:5] if fields.get(name) is None]:
            raise FtlabError(f"{where}: missing {', '.join(missing)}")
        return cls(**{name: fields[name] for name in own if fields.get(name) is not None})

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The fields of a config.json; `dtype` like "float32". Dropout is written as off."""
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "torch_dtype": dtype,
            **asdict(self),
            "position_embedding_type": "absolute",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }


class LayerNorm(nn.LayerNorm):
    """torch's, in fp32 whatever its weight and bias are stored in: a bias that trains is wider than a frozen weight."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x, in x's dtype; any shape [..., D]."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Embeddings(nn.Module):
    """Words, positions and segments, summed and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.noise = QUIET
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, input_ids_BT: Tensor, token_types_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]."""
        noise = self.noise if self.training else QUIET
        words_BTD: Tensor = self.word_embeddings(input_ids_BT)
        if noise.neftune > 0:
            words_BTD = embedding_noise(words_BTD, mask_BT.sum(1)[:, None, None], noise.neftune)
        positions_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
        summed_BTD = words_BTD + self.token_type_embeddings(token_types_BT)
        return dropout(self.LayerNorm(summed_BTD + self.position_embeddings(positions_T)), noise.embedding)


class SelfAttention(nn.Module):
    """Every real position looks at every real position of its row."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.noise = QUIET
        self.heads = config.num_attention_heads
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)

    def forward(self, h_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        B, T, D = h_BTD.shape
        q, k, v = (
            out.view(B, T, self.heads, -1).transpose(1, 2) for out in project(h_BTD, (self.query, self.key, self.value))
        )
        p = self.noise.attention if self.training else 0.0
        out_BHTE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BT[:, None, None, :], dropout_p=p)
        return out_BHTE.transpose(1, 2).reshape(B, T, D)


class Output(nn.Module):
    """LayerNorm(residual + scale * dropout(dense(x))): the end of either sublayer."""

    def __init__(self, width: int, config: BertConfig) -> None:
        super().__init__()
        self.noise = QUIET
        self.dense = Linear(width, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, residual_BTD: Tensor, scale: Tensor | None) -> Tensor:
        """[B, T, width], [B, T, D] -> [B, T, D]; scale: [], None for 1."""
        update_BTD = dropout(self.dense(x), self.noise.residual if self.training else 0.0)
        out: Tensor = self.LayerNorm(residual_BTD + (update_BTD if scale is None else scale * update_BTD))
        return out


class AttentionLayer(nn.Module):
    """The parameters under `attention.`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config.hidden_size, config)


class Intermediate(nn.Module):
    """The parameters under `intermediate.`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)


class Layer(nn.Module):
    """One encoder layer, normalised after each sum."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.noise = QUIET
        self.attention = AttentionLayer(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, h_BTD: Tensor, mask_BT: Tensor, scale: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; scale: [], of what is added; a tensor, lest each layer is compiled anew."""
        h_BTD = self.attention.output(self.attention.self(h_BTD, mask_BT), h_BTD, scale)
        p = self.noise.hidden if self.training else 0.0
        out: Tensor = self.output(dropout(self.activation(self.intermediate.dense(h_BTD)), p), h_BTD, scale)
        return out

    def left_out(self, h_BTD: Tensor) -> Tensor:
        """What the layer's norms make of h where its attention and MLP add nothing: [B, T, D] -> [B, T, D]."""
        out: Tensor = self.output.LayerNorm(self.attention.output.LayerNorm(left_out(h_BTD, self)))
        return out


class Encoder(nn.Module):
    """The parameters under `encoder.`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Pooler(nn.Module):
    """tanh(dense(first token))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, h_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, D]."""
        return torch.tanh(self.dense(h_BTD[:, 0]))


class BertModel(nn.Module):
    """An encoder, with a pooler if it is asked for. New, it is on the meta device: `load_bert`, `random_bert`."""

    def __init__(self, config: BertConfig, *, pooler: bool = False) -> None:
        super().__init__()
        self.config = config
        self.noise = QUIET
        self.checkpoint_blocks = False
        self.pooler: Pooler | None = None
        with torch.device("meta"):
            self.embeddings = Embeddings(config)
            self.encoder = Encoder(config)
            if pooler:
                self.pooler = Pooler(config)

    def forward(self, input_ids_BT: Tensor, mask_BT: Tensor, token_types_BT: Tensor | None = None) -> Tensor:
        """The last hidden states, [B, T, D]; those at padded positions mean nothing.

        input_ids_BT: int64. mask_BT: bool, True at real tokens, of which each row has one or more. token_types_BT:
        int64, 0 in the first segment and 1 in the second; None: all 0.
        """
        longest = self.config.max_position_embeddings
        if input_ids_BT.shape[1] > longest:
            raise FtlabError(f"a row of {input_ids_BT.shape[1]} tokens, but the encoder has {longest} positions")
        types_BT = torch.zeros_like(input_ids_BT) if token_types_BT is None else token_types_BT
        h_BTD: Tensor = self.embeddings(input_ids_BT, types_BT, mask_BT)
        random_depth = self.training and self.noise.depth > 0
        layers: list[Any] = [*self.encoder.layer]
        for number, layer in enumerate(layers):
            keep = self.noise.keep(number, len(layers))
            if random_depth and float(torch.rand(())) >= keep:
                h_BTD = layer.left_out(h_BTD)
                continue
            scale = torch.tensor(1 / keep, device=h_BTD.device) if random_depth else None
            if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
                h_BTD = checkpoint(layer, h_BTD, mask_BT, scale, use_reentrant=False, preserve_rng_state=True)
            else:
                h_BTD = layer(h_BTD, mask_BT, scale)
        return h_BTD


def is_bert(path: Path) -> bool:
    """Whether a path is a folder whose config.json describes a BERT."""
    return path.is_dir() and read_json(path / CONFIG).get("model_type") == "bert"


class Renamed:
    """A checkpoint's tensors under the names of `BertModel`, without what such a model does not hold."""

    def __init__(self, files: TensorFiles, pooler: bool, head: re.Pattern[str]) -> None:
        self.where = files.where
        self.files = files
        prefix = "bert." if any(name.startswith("bert.") for name in files.shapes) else ""
        self.original: dict[str, str] = {}
        for name in files.shapes:
            short = name.removeprefix(prefix)
            if head.fullmatch(name) or (not pooler and POOLER.fullmatch(short)):
                continue
            short = short.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            if short in self.original:
                raise FtlabError(f"{self.where}: {self.original[short]} and {name} are one tensor under two names")
            self.original[short] = name
        self.shapes = {short: files.shapes[name] for short, name in self.original.items()}

    def chunks(self, name: str) -> Any:
        """The tensor in consecutive slices of its first dimension."""
        return self.files.chunks(self.original[name])


def load_bert(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    pooler: bool = False,
) -> BertModel:
    """Build an encoder and fill it from a folder with config.json and safetensors.

    Names may begin with `bert.`; heads of its pretraining (`cls.`) are left out, that of a classifier too (where the
    folder says that it is one), and the pooler unless it is asked for.
    Any other tensor that is missing, unexpected, misshapen or not finite raises FtlabError with its name.
    """
    folder = Path(path)
    fields = read_json(folder / CONFIG)
    config = BertConfig.from_hf(fields, str(folder / CONFIG))
    head = CLASSIFIER_HEAD if CLASSIFIER in (fields.get("architectures") or ()) else PRETRAINING_HEADS
    source = Renamed(SafetensorsFiles(folder, skip=POSITION_IDS), pooler, head)
    model = BertModel(config, pooler=pooler)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare_names(source, set(source.shapes), expected)
    state = {name: read_tensor(source, name, dtype, device) for name in expected}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def random_bert(config: BertConfig, seed: int, *, pooler: bool = False) -> BertModel:
    """An encoder with random fp32 weights on the CPU: matrices N(0, initializer_range^2), biases 0, norms 1."""
    model = BertModel(config, pooler=pooler)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
            else:
                parameter.copy_(
                    torch.empty(parameter.shape).normal_(0.0, config.initializer_range, generator=generator)
                )
    return model
