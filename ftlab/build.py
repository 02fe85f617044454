"""From the typed configuration to objects: the second of the three hops."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ftlab.assets import describe, parse_location, resolve
from ftlab.config import Config, GradualUnfreezeConfig, PretrainedConfig, RandomConfig
from ftlab.data.loader import RowLoader
from ftlab.data.records import Record, SourceInfo, Splits, load_records
from ftlab.data.templates import ChatTemplate
from ftlab.data.tokenization import Example, encode_all
from ftlab.errors import ConfigError, FtlabError
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.losses.mixout import Mixout
from ftlab.losses.penalties import Penalty, build_penalties
from ftlab.losses.r_drop import r_drop
from ftlab.methods import Method, make_method
from ftlab.methods.trainable import ParameterRow
from ftlab.models.activation_cache import ActivationCache
from ftlab.models.llama import LlamaConfig, LlamaForCausalLM
from ftlab.models.loading import load_model, random_llama
from ftlab.models.noise import Noise
from ftlab.models.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from ftlab.operators import select
from ftlab.optim.adamw import build_optimizer
from ftlab.startup import without_collector
from ftlab.training.averaging import Averaging
from ftlab.training.loop import Climb, Hook
from ftlab.training.parallel import LossSum, Ranks
from ftlab.training.precision import Precision, dtype_of
from ftlab.training.sharpness import climbed
from ftlab.training.unfreezing import Unfreezing

__all__ = [
    "Built",
    "DataSet",
    "base_location",
    "build_base",
    "build_data",
    "build_hooks",
    "build_loader",
    "build_model",
    "build_tokenizer",
    "build_training",
    "climb_of",
    "export_folder",
    "fingerprints",
    "loss_sum_of",
    "model_facts",
    "total_steps",
    "with_absolute_paths",
]


@dataclass
class DataSet:
    """Everything made from the data group: records, their tokens, and how they are laid out."""

    source: SourceInfo
    splits: Splits
    template: ChatTemplate
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    notes: tuple[str, ...] = ()  # what the user should know of the data as loaded


@dataclass
class Built:
    """The objects of a training run."""

    model: LlamaForCausalLM
    method: Method
    rows: list[ParameterRow]
    precision: Precision
    penalties: list[Penalty]
    optimizer: torch.optim.Optimizer
    cache: ActivationCache | None
    objective: LossSum
    kernels: str  # a line that says who computes between the matrix products


@without_collector()
def build_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of model.tokenizer (`bytes`: one token a byte), or the one that comes with the weights."""
    wanted = config.model.tokenizer
    if wanted == "bytes":
        return byte_tokenizer()
    if wanted is not None:
        return load_tokenizer(resolve(wanted))
    if isinstance(config.model, PretrainedConfig):
        return load_tokenizer(resolve(config.model.location))
    raise ConfigError("model.tokenizer is null, but this model brings none; give a location, or model.tokenizer=bytes")


def build_model(config: Config, tokenizer: Tokenizer, ranks: Ranks, *, dtype: torch.dtype) -> LlamaForCausalLM:
    """The untouched base model, with its weights stored in `dtype`."""
    if isinstance(config.model, PretrainedConfig):
        model = load_model(resolve(config.model.location), dtype=dtype, device=ranks.device)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise FtlabError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.model.location} rows for "
                f"{model.config.vocab_size}; give the tokenizer that belongs to it in model.tokenizer"
            )
        return model
    if not isinstance(config.model, RandomConfig):
        raise ConfigError("model: choose an option, for example model=smollm2_135m")
    sizes = config.model
    llama = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.hidden_size // sizes.num_heads,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    return random_llama(llama, seed=sizes.init_seed).to(device=ranks.device, dtype=dtype)


def build_base(config: Config, tokenizer: Tokenizer, ranks: Ranks) -> tuple[LlamaForCausalLM, Method]:
    """The untouched base model and the method that is to change it, which settles the dtype of the stored weights."""
    method = make_method(config.method, seed=config.training.seed)
    dtype = dtype_of(config.precision.frozen if method.keeps_base else "fp32")
    return build_model(config, tokenizer, ranks, dtype=dtype), method


@without_collector()
def build_data(config: Config, tokenizer: Tokenizer) -> DataSet:
    """Records, split and tokenised. Every example has a supervised token, or this raises with its id."""
    splits, source = load_records(config.data)
    template = ChatTemplate.load(config.data.template, tokenizer)

    def encode(records: list[Record]) -> list[Example]:
        return encode_all(records, template, tokenizer, config.data)

    train, validation, test = (encode(side) for side in (splits.train, splits.validation, splits.test))
    if not train:
        raise FtlabError(f"{source.name} has no training example left; look at data.max_length and data.too_long")
    sides = ((splits.train, train), (splits.validation, validation), (splits.test, test))
    kept = [_kept(records, examples) for records, examples in sides]
    notes = list(source.notes)
    if dropped := sum(len(records) - len(examples) for records, examples in sides):
        notes.append(f"{dropped} records are longer than data.max_length={config.data.max_length} and were dropped")
    if cut := sum(example.truncated for side in (train, validation, test) for example in side):
        notes.append(f"{cut} prompts were cut from the left to data.max_length={config.data.max_length}")
    return DataSet(source, Splits(*kept), template, train, validation, test, tuple(notes))


def _kept(records: list[Record], examples: list[Example]) -> list[Record]:
    """The records that became examples, in the same order, so that loss and answers are measured on the same ones."""
    ids = {example.id for example in examples}
    return [record for record in records if record.id in ids]


def build_training(config: Config, model: LlamaForCausalLM, method: Method, precision: Precision) -> Built:
    """Method, dtypes, penalties and optimizer around a base model."""
    table = method.apply(model)
    precision.store(model)
    operators, kernels = select(config.kernels, precision.device, compiled=config.training.compile)
    model.use(operators)
    model.checkpoint_blocks = config.training.activation_checkpointing
    model.disturb(Noise.of(config.regularizer))
    penalties = build_penalties(config.regularizer, model)
    optimizer = build_optimizer(config.optimizer, model, table, triton=operators.path == "triton")
    gib = config.training.activation_cache_gib
    cache = ActivationCache(model, int(gib * 2**30)) if gib > 0 else None
    if config.training.compile:
        for block in model.blocks:
            block.compile(dynamic=not config.data.pad_rows)
    objective = _objective(config, model, cache)
    return Built(model, method, table.rows(model), precision, penalties, optimizer, cache, objective, kernels)


def build_hooks(config: Config, method: Method, total_steps: int) -> list[Hook]:
    """What acts between the steps of the loop."""
    hooks: list[Hook] = []
    if isinstance(config.method, GradualUnfreezeConfig):
        hooks.append(Unfreezing(config.method, method.stages))
    if config.regularizer.average.kind != "none":
        hooks.append(Averaging(config.regularizer.average, total_steps))
    return hooks


def climb_of(config: Config) -> Climb | None:
    """Where the step's gradient is taken, if not where the weights stand."""
    rho = config.regularizer.sam
    return functools.partial(climbed, rho=rho) if rho > 0 else None


def loss_sum_of(config: Config) -> Any:
    """What evaluation measures: (model, batch) -> summed nats, whatever the run is regularized by."""
    return functools.partial(supervised_cross_entropy, chunk=config.training.head_chunk)


def _objective(config: Config, model: LlamaForCausalLM, cache: ActivationCache | None) -> LossSum:
    """What training lowers: the same sum as it is regularized, from cached activations if there are any."""
    settings: dict[str, Any] = {
        "chunk": config.training.head_chunk,
        "hidden_states": None if cache is None else cache.hidden_states,
        "smoothing": config.regularizer.label_smoothing,
    }
    objective: Any = functools.partial(supervised_cross_entropy, **settings)
    if config.regularizer.r_drop > 0:
        objective = functools.partial(r_drop, strength=config.regularizer.r_drop, **settings)
    if config.regularizer.mixout > 0:
        objective = Mixout(model, config.regularizer.mixout, objective)
    return objective  # type: ignore[no-any-return]


def build_loader(config: Config, data: DataSet, tokenizer: Tokenizer) -> RowLoader:
    """The training rows."""
    return RowLoader(data.train, config.data, seed=config.training.seed, pad_id=tokenizer.pad_id)


def total_steps(config: Config, loader: RowLoader) -> int:
    """Optimizer steps of the whole run: max_steps if it is given, else what the epochs come to."""
    if config.training.max_steps is not None:
        return config.training.max_steps
    assert config.training.epochs is not None  # validate refuses a run without an end
    return max(1, loader.total_steps(config.training.epochs))


def fingerprints(config: Config, data: DataSet, tokenizer: Tokenizer) -> dict[str, str]:
    """Hashes of the contents a run depends on and that a path does not tell: model file, tokenizer, template, data."""
    digest = hashlib.sha256()
    for side in (data.train, data.validation, data.test):
        for example in side:
            digest.update(repr((example.id, example.token_ids, example.supervised)).encode())
        digest.update(b"|")
    hashes = {
        "tokenizer": tokenizer.fingerprint,
        "chat template": data.template.fingerprint,
        "data": digest.hexdigest(),
    }
    if isinstance(config.model, PretrainedConfig):
        hashes["base model"] = str(describe(config.model.location)["sha256"])
    return {name: value[:16] for name, value in hashes.items()}


def model_facts(config: Config, model: LlamaForCausalLM) -> dict[str, Any]:
    """What run.json says of the base model."""
    facts: dict[str, Any] = {"name": config.model.name, "parameters": sum(p.numel() for p in model.parameters())}
    if isinstance(config.model, PretrainedConfig):
        facts["location"] = config.model.location
        facts["sha256"] = describe(config.model.location).get("sha256")
    else:
        facts["location"] = f"random weights, {asdict(config.model)}"
    return facts


def with_absolute_paths(resolved: dict[str, Any]) -> dict[str, Any]:
    """The plain configuration with the user's own files named from the root of the file system."""

    def settle(node: Any, key: str = "") -> Any:
        if isinstance(node, dict):
            return {name: settle(value, name) for name, value in node.items()}
        if (
            key in ("location", "tokenizer", "train", "validation", "test")
            and isinstance(node, str)
            and node != "bytes"
        ):
            parsed = parse_location(node)
            if parsed.kind == "file" and parsed.sha256 is None:
                return str(Path(parsed.member).expanduser().absolute())
        if key == "template" and isinstance(node, str) and node.endswith((".jinja", ".j2")):
            return str(Path(node).expanduser().absolute())
        return node

    groups: dict[str, Any] = {name: settle(resolved[name]) for name in ("model", "data") if name in resolved}
    return {**resolved, **groups}


def base_location(config: Config) -> str:
    """What an adapter's configuration calls its base."""
    return config.model.location if isinstance(config.model, PretrainedConfig) else config.model.name


def export_folder(run_dir: Path, method: Method) -> Path:
    """Where what was trained is exported: adapter/ for what sits on a base, model/ for a whole model."""
    return run_dir / ("adapter" if method.keeps_base else "model")
