"""The shape and the maths of a llama, read from and written as a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftlab.errors import FtlabError

__all__ = ["LlamaConfig", "RopeScaling"]

# Fields that do not change what the network computes: bookkeeping, and defaults of generation and of training.
# fmt: off
HARMLESS = frozenset((
    "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "max_position_embeddings",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "is_llama_config", "transformers.js_config", "name_or_path", "return_dict", "id2label", "label2id",
    "problem_type", "ftlab_pooling", "task_specific_params", "tokenizer_class", "prefix", "finetuning_task",
    "max_length", "min_length", "max_new_tokens", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty", "do_sample",
    "early_stopping", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "output_attentions",
    "output_hidden_states", "unsloth_version", "unsloth_fixed", "is_decoder", "chunk_size_feed_forward",
))
# fmt: on
# Fields that change the maths; only the listed value is what this implementation computes.
FIXED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
READ = frozenset(
    (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    )
)
ROPE_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
ADVICE = "use a model without it"


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    `linear` divides every frequency by `factor` (arXiv 2306.15595). `llama3` divides low frequencies by `factor`, keeps
    high ones and blends between, with wavelengths measured against `original_max_position_embeddings` tokens.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """A llama (arXiv 2302.13971, grouped-query attention arXiv 2305.13245), with the field names of Hugging Face."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        for name in (*REQUIRED, "num_key_value_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise FtlabError(f"model configuration: {name} is {value!r}; it must be a positive integer")
        if self.num_attention_heads % self.num_key_value_heads:
            raise FtlabError(
                f"model configuration: num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise FtlabError(f"model configuration: head_dim is {self.head_dim}; rotary positions need an even number")

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
        """Read the fields of a config.json; `where` names it in errors.

        A field that is not known here is accepted only when it is switched off (null, false or empty): one that may
        change the maths is refused by name with FtlabError, never ignored.
        """
        if fields.get("model_type", "llama") != "llama":
            raise FtlabError(
                f"{where}: model_type is {fields['model_type']!r}; implemented are llama, and bert for data with labels"
            )
        missing = [name for name in REQUIRED if fields.get(name) is None]
        if missing:
            raise FtlabError(f"{where}: missing {', '.join(missing)}")
        for name, value in fields.items():
            if name in FIXED:
                if value is not None and value != FIXED[name]:
                    raise FtlabError(f"{where}: {name}={value!r} is not implemented (only {FIXED[name]!r}); {ADVICE}")
            elif name not in HARMLESS | READ | set(REQUIRED) and not name.startswith("_") and not is_off(value):
                raise FtlabError(
                    f"{where}: the field {name}={value!r} is not known here and may change what the model computes; "
                    f"{ADVICE}, or delete the field if it has no effect"
                )
        theta, scaling = read_rope(fields, where)
        heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
        head_dim = fields.get("head_dim")
        if head_dim is None:
            if hidden % heads:
                raise FtlabError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
            head_dim = hidden // heads
        optional = {
            name: fields[name]
            for name in ("max_position_embeddings", "initializer_range", "rms_norm_eps")
            if fields.get(name) is not None
        }
        return cls(
            **{name: fields[name] for name in REQUIRED},
            num_key_value_heads=heads if fields.get("num_key_value_heads") is None else fields["num_key_value_heads"],
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(fields.get("tie_word_embeddings")),
            attention_bias=bool(fields.get("attention_bias")),
            mlp_bias=bool(fields.get("mlp_bias")),
            bos_token_id=fields.get("bos_token_id"),
            eos_token_id=fields.get("eos_token_id"),
            pad_token_id=fields.get("pad_token_id"),
            **optional,
        )

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The fields of a config.json as transformers 4 and 5 and other tools read it; `dtype` like "float32"."""
        scaling: dict[str, Any] | None = None
        if self.rope_scaling is not None:
            scaling = {"rope_type": self.rope_scaling.rope_type}
            scaling |= {key: getattr(self.rope_scaling, key) for key in sorted(ROPE_KEYS[self.rope_scaling.rope_type])}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": dtype,
            **{name: getattr(self, name) for name in REQUIRED},
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "mlp_bias": self.mlp_bias,
            "pretraining_tp": 1,
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
        }


def is_off(value: Any) -> bool:
    """Whether a field's value means that the feature is not used."""
    return value is None or value is False or value in ("", [], {})


def read_rope(fields: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            raise FtlabError(f"{where}: {name} is {value!r}; it must be an object")
    from_new = parse_rope(new, fields, f"{where}: rope_parameters") if new else None
    from_old = parse_rope(old or {}, fields, f"{where}: rope_scaling")
    if from_new is None:
        return from_old
    if (old is not None or fields.get("rope_theta") is not None) and from_new != from_old:
        raise FtlabError(f"{where}: rope_parameters contradicts rope_theta or rope_scaling; keep one of them")
    return from_new


def parse_rope(rope: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from one description; anything it does not know raises FtlabError."""
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", fields.get("rope_theta"))
    theta = 10000.0 if theta is None else float(theta)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise FtlabError(f"{where}: partial_rotary_factor other than 1 is not implemented; {ADVICE}")
    legacy = rope.pop("type", None)
    kind = rope.pop("rope_type", legacy if legacy is not None else "default")
    if kind not in ROPE_KEYS:
        raise FtlabError(f"{where}: rope type {kind!r} is not implemented (only {', '.join(ROPE_KEYS)}); {ADVICE}")
    keys = ROPE_KEYS[kind]
    if "original_max_position_embeddings" in keys and fields.get("max_position_embeddings") is not None:
        rope.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
    if missing := sorted(keys - rope.keys()):
        raise FtlabError(f"{where}: rope type {kind} needs {', '.join(missing)}")
    # "default" and "linear" do not read the original length, but it is often written beside them.
    if unknown := sorted(rope.keys() - keys - {"original_max_position_embeddings"}):
        raise FtlabError(f"{where}: {', '.join(unknown)} is not implemented for rope type {kind}; {ADVICE}")
    return theta, None if kind == "default" else RopeScaling(kind, **{key: rope[key] for key in keys})
