"""From the typed configuration to objects: the second of the three hops."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ftlab import classify, replay
from ftlab.assets import describe, parse_location, resolve
from ftlab.config import (
    Config,
    EvaluationConfig,
    GradualUnfreezeConfig,
    LabelledDataConfig,
    LoRAConfig,
    PretrainedConfig,
    RandomBertConfig,
    RandomConfig,
    makes_classifier,
)
from ftlab.data.labelled import LabelledLoader
from ftlab.data.loader import Replay, RowLoader
from ftlab.data.records import Record, SourceInfo, Splits, load_records
from ftlab.data.templates import ChatTemplate
from ftlab.data.tokenization import Example, encode_all
from ftlab.errors import ConfigError, FtlabError
from ftlab.evaluation.label_measure import LabelMeasurer, measured_names
from ftlab.evaluation.measure import Measurer, Measures
from ftlab.files import sha256_file
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.losses.ewc import EWC
from ftlab.losses.lwf import LabelLwF, TokenLwF
from ftlab.losses.mixout import Mixout
from ftlab.losses.penalties import DecoupledL2SP, Penalty, build_penalties
from ftlab.losses.r_drop import r_drop
from ftlab.methods import Method, make_method
from ftlab.methods.lora import quantised_rows
from ftlab.methods.trainable import ParameterRow
from ftlab.models.activation_cache import ActivationCache
from ftlab.models.bert import is_bert
from ftlab.models.heads import AnyModel, Classifier, head_in, head_parameters
from ftlab.models.labels import LabelSet
from ftlab.models.llama import LlamaConfig, LlamaForCausalLM
from ftlab.models.loading import load_model, random_llama
from ftlab.models.noise import Noise, disturb
from ftlab.models.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from ftlab.operators import select
from ftlab.optim.adamw import build_optimizer
from ftlab.startup import without_collector
from ftlab.training.averaging import Averaging
from ftlab.training.hooks import Hook, Logged
from ftlab.training.loop import Climb
from ftlab.training.parallel import LossSum, Ranks
from ftlab.training.precision import Precision, carried_out, dtype_of
from ftlab.training.sharpness import climbed
from ftlab.training.unfreezing import Unfreezing

__all__ = [
    "FIRST_ADAPTER",
    "Built",
    "DataSet",
    "base_location",
    "build_base",
    "build_data",
    "build_hooks",
    "build_loader",
    "build_measurer",
    "build_model",
    "build_tokenizer",
    "build_training",
    "causal",
    "check_metric",
    "check_texts",
    "export_folder",
    "fingerprints",
    "foreseen",
    "loss_sum_of",
    "model_facts",
    "total_steps",
    "with_absolute_paths",
]

FIRST_ADAPTER = "first adapter"  # its name among the fingerprints


@dataclass
class DataSet:
    """Everything made from the data group: records, their tokens, and how they are laid out."""

    source: SourceInfo
    splits: Splits
    template: ChatTemplate | None  # None: labels, and no conversation
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    notes: tuple[str, ...] = ()  # what the user should know of the data as loaded
    labels: LabelSet | None = None
    replayed: list[Example] = field(default_factory=list)  # of earlier runs, to draw from


@dataclass
class Built:
    """The objects of a training run."""

    model: AnyModel
    method: Method
    rows: list[ParameterRow]
    precision: Precision
    penalties: list[Penalty]
    optimizer: torch.optim.Optimizer
    cache: ActivationCache | None
    objective: LossSum
    climb: Climb | None  # where the step's gradient is taken, if not where the weights stand
    kernels: str  # a line that says who computes between the matrix products
    notes: tuple[str, ...] = ()  # what the user should know of the objects as built
    first_head: dict[str, torch.Tensor] = field(default_factory=dict)  # what it was before an adapter's

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Before the first step: inside the context the model is the pretrained one, as `open_run` makes it."""
        if not self.method.keeps_base:
            yield  # a whole model has not moved yet
            return
        head = head_parameters(self.model) if self.first_head else {}
        begun = {name: parameter.detach().clone() for name, parameter in head.items()}
        with self.method.disabled(self.model):
            _fill(head, self.first_head)
            try:
                yield
            finally:
                _fill(head, begun)


@torch.no_grad()
def _fill(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@without_collector()
def build_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of model.tokenizer (`bytes`: one token a byte), or the one that comes with the weights."""
    wanted = config.model.tokenizer
    if wanted == "bytes":
        return byte_tokenizer()
    if wanted is not None:
        return load_tokenizer(resolve(wanted))
    if isinstance(config.model, PretrainedConfig):
        path = resolve(config.model.location)
        if path.is_dir() and not (path / "tokenizer.json").exists():
            raise ConfigError(
                f"model.tokenizer is null, but {config.model.location} has no tokenizer.json; give the location of the "
                "tokenizer that it was trained with"
            )
        return load_tokenizer(path)
    raise ConfigError("model.tokenizer is null, but this model brings none; give a location, or model.tokenizer=bytes")


def build_model(
    config: Config, tokenizer: Tokenizer, ranks: Ranks, *, dtype: torch.dtype, labelled: bool = False
) -> LlamaForCausalLM:
    """The untouched base model, with its weights stored in `dtype`; labelled: the decoder of a classifier will do."""
    if isinstance(config.model, PretrainedConfig):
        path = resolve(config.model.location)
        if is_bert(path):
            raise ConfigError(
                f"model: {config.model.name} is an encoder, which gives no text; give data with labels and no "
                "data.instruction"
            )
        classifier = head_in(path) is not None
        if classifier and not labelled:
            raise ConfigError(
                f"model.location: {config.model.location} is a classifier, which gives labels and no text; give data "
                "with labels and no data.instruction, or a language model"
            )
        model = load_model(path, dtype=dtype, device=ranks.device, classifier=classifier)
        tokenizer.check_rows(model.config.vocab_size, config.model.location)
        return model
    if isinstance(config.model, RandomBertConfig):
        raise ConfigError(f"model: {config.model.name} is an encoder, which gives no text; give data with labels")
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


def build_base(config: Config, tokenizer: Tokenizer, ranks: Ranks, labels: LabelSet | None) -> tuple[AnyModel, Method]:
    """The untouched base model and the method that is to change it, which settles the dtype of the stored weights.

    labels: what a classifier tells apart; None: a language model.
    """
    method = make_method(config.method, seed=config.training.seed)
    dtype = dtype_of(carried_out(config.precision, ranks.device).frozen if method.keeps_base else "fp32")
    if labels is None:
        return build_model(config, tokenizer, ranks, dtype=dtype), method
    base = classify.encoder(config, tokenizer, ranks, dtype) or build_model(
        config, tokenizer, ranks, dtype=dtype, labelled=True
    )
    return classify.classifier(config, base, labels, tokenizer), method


@without_collector()
def build_data(config: Config, tokenizer: Tokenizer) -> DataSet:
    """Records, split and tokenised. Every example has something supervised, or this raises with its id."""
    template, labels = None, None
    if makes_classifier(config.data):
        source, splits, labels, encoded = classify.labelled_data(config, tokenizer)
    else:
        splits, source = load_records(config.data)
        template = ChatTemplate.load(config.data.template, tokenizer)
        encode = functools.partial(encode_all, template=template, tokenizer=tokenizer, config=config.data)
        encoded = (encode(splits.train), encode(splits.validation), encode(splits.test))
    train, validation, test = encoded
    if not train:
        raise FtlabError(f"{source.name} has no training example left; look at data.max_length and data.too_long")
    sides = ((splits.train, train), (splits.validation, validation), (splits.test, test))
    kept = [_kept(records, examples) for records, examples in sides]
    notes = list(source.notes)
    if dropped := sum(len(records) - len(examples) for records, examples in sides):
        notes.append(f"{dropped} records are longer than data.max_length={config.data.max_length} and were dropped")
    if cut := sum(example.truncated for side in (train, validation, test) for example in side):
        labelled = isinstance(config.data, LabelledDataConfig)
        what = "texts were cut" if labelled else "prompts were cut from the left"
        notes.append(f"{cut} {what} to data.max_length={config.data.max_length}")
    replayed = replay.earlier_examples(config, tokenizer, template, labels)
    if replayed:
        notes.append(replay.replay_note(config, len(train), len(replayed)))
    return DataSet(source, Splits(*kept), template, train, validation, test, tuple(notes), labels, replayed)


def _kept(records: list[Record], examples: list[Example]) -> list[Record]:
    """The records that became examples, in the same order, so that loss and answers are measured on the same ones."""
    ids = {example.id for example in examples}
    return [record for record in records if record.id in ids]


def build_training(config: Config, model: AnyModel, method: Method, precision: Precision) -> Built:
    """Method, dtypes, penalties and optimizer around a base model."""
    table = method.apply(model)
    precision.store(model)  # before an adapter is read, whose head would be rounded to the dtype of a frozen base
    first_head = {}
    if (start := _start_from(config)) is not None:
        first_head = {name: parameter.detach().clone() for name, parameter in head_parameters(model).items()}
        method.load(model, start)
        if isinstance(model, Classifier):
            model.new_head = False  # the adapter brought it
    operators, kernels = select(config.kernels, precision.device, compiled=config.training.compile)
    model.use(operators)
    model.checkpoint_blocks = config.training.activation_checkpointing
    disturb(model, Noise.of(config.regularizer))
    base = resolve(config.model.location) if isinstance(config.model, PretrainedConfig) else None
    penalties = build_penalties(config.regularizer, model, base)
    pulls = {p: pull for each in penalties if isinstance(each, DecoupledL2SP) for p, pull in each.pulls(model).items()}
    optimizer = build_optimizer(config.optimizer, model, table, path=operators.path, pulls=pulls)
    gib = config.training.activation_cache_gib
    cache = ActivationCache(causal(model), int(gib * 2**30)) if gib > 0 else None
    if config.training.compile:
        for block in model.blocks:
            block.compile(dynamic=not config.data.pad_rows)
    rows = [*table.rows(model), *quantised_rows(model)]
    objective = _objective(config, model, cache)
    climb = _climb(config)
    notes = tuple(line for penalty in penalties if isinstance(penalty, EWC) for line in penalty.left_out)
    return Built(
        model, method, rows, precision, penalties, optimizer, cache, objective, climb, kernels, notes, first_head
    )


def build_hooks(config: Config, built: Built, total_steps: int) -> list[Hook]:
    """What acts between the steps of the loop."""
    hooks: list[Hook] = []
    if isinstance(config.method, GradualUnfreezeConfig):
        hooks.append(Unfreezing(config.method, built.method.stages))
    if config.regularizer.average.kind != "none":
        hooks.append(Averaging(config.regularizer.average, total_steps))
    if isinstance(built.objective, Mixout):
        hooks.append(Logged("mixout/distance", built.objective.distance))
    return hooks


def _climb(config: Config) -> Climb | None:
    rho = config.regularizer.sam
    return functools.partial(climbed, rho=rho) if rho > 0 else None


def loss_sum_of(config: Config) -> Any:
    """What evaluation measures: (model, batch) -> summed nats, whatever the run is regularized by."""
    if makes_classifier(config.data):
        return classify.objective(config)
    return functools.partial(supervised_cross_entropy, chunk=config.training.head_chunk)


def _objective(config: Config, model: AnyModel, cache: ActivationCache | None) -> LossSum:
    """What training lowers: the same sum as it is regularized, from cached activations if there are any."""
    chunk, hidden_states = config.training.head_chunk, None if cache is None else cache.hidden_states
    smoothing, agreement = config.regularizer.label_smoothing, config.regularizer.r_drop
    settings: dict[str, Any] = {"chunk": chunk, "hidden_states": hidden_states, "smoothing": smoothing}
    objective: Any = functools.partial(supervised_cross_entropy, **settings)
    if makes_classifier(config.data):
        objective = classify.objective(config, smoothing, agreement)
    elif agreement > 0:
        objective = functools.partial(r_drop, strength=agreement, **settings)
    if (lwf := config.regularizer.lwf).strength > 0:
        if isinstance(model, Classifier):
            objective = LabelLwF(model, lwf, objective, model.head.labels.kind)
        else:
            objective = TokenLwF(model, lwf, objective, chunk, hidden_states)
    if config.regularizer.mixout > 0:
        objective = Mixout(model, config.regularizer.mixout, objective)
    # partial objects have no type that says what they are called with
    return objective  # type: ignore[no-any-return]


def build_loader(config: Config, data: DataSet, tokenizer: Tokenizer) -> RowLoader:
    """The training rows."""
    seed, pad_id = config.training.seed, tokenizer.pad_id
    replayed = Replay(data.replayed, config.regularizer.replay.share) if data.replayed else None
    if data.labels is not None:
        assert makes_classifier(config.data)
        return LabelledLoader(data.train, config.data, seed, pad_id, data.labels, replayed)
    return RowLoader(data.train, config.data, seed, pad_id, replayed)


def foreseen(config: Config, built: Built, loader: RowLoader, steps: int) -> str | None:
    """What a run of so many steps will not come to, as far as its settings tell."""
    if not isinstance(config.method, GradualUnfreezeConfig):
        return None
    return Unfreezing(config.method, built.method.stages).foreseen(steps, loader)


def total_steps(config: Config, loader: RowLoader) -> int:
    """Optimizer steps of the whole run: max_steps if it is given, else what the epochs come to."""
    if config.training.max_steps is not None:
        return config.training.max_steps
    assert config.training.epochs is not None  # validate refuses a run without an end
    return max(1, loader.total_steps(config.training.epochs))


def _start_from(config: Config) -> Path | None:
    """The folder of the adapter that training begins with."""
    method = config.method
    return Path(method.start_from) if isinstance(method, LoRAConfig) and method.start_from is not None else None


def fingerprints(config: Config, data: DataSet, tokenizer: Tokenizer, *, trained: bool = False) -> dict[str, str]:
    """Hashes of the contents a run depends on and that a path does not tell: model file, tokenizer, template, data.

    trained: leave out the adapter that training began with, which a finished run does not read again.
    """
    digest = hashlib.sha256()
    for side in (data.train, data.validation, data.test):
        for example in side:
            digest.update(repr(example.content).encode())
        digest.update(b"|")
    hashes = {"tokenizer": tokenizer.fingerprint, "data": digest.hexdigest()}
    if data.replayed:
        contents = hashlib.sha256(repr([example.content for example in data.replayed]).encode())
        hashes["replayed data"] = contents.hexdigest()
    if data.template is not None:
        hashes["chat template"] = data.template.fingerprint
    if data.labels is not None:
        hashes["labels"] = hashlib.sha256(repr(data.labels).encode()).hexdigest()
    if isinstance(config.model, PretrainedConfig):
        hashes["base model"] = str(describe(config.model.location)["sha256"])
    if not trained and (start := _start_from(config)) is not None:
        hashes[FIRST_ADAPTER] = sha256_file(start / "adapter_model.safetensors")
    return {name: value[:16] for name, value in hashes.items()}


def model_facts(config: Config, model: AnyModel) -> dict[str, Any]:
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
        if key == "start_from" and node is not None:
            return str(Path(node).expanduser().absolute())
        if key == "template" and isinstance(node, str) and node.endswith((".jinja", ".j2")):
            return str(Path(node).expanduser().absolute())
        return node

    groups: dict[str, Any] = {name: settle(resolved[name]) for name in ("model", "data", "method") if name in resolved}
    for name in ("ewc", "replay"):  # not those of `extra`, whose keys are the user's
        if sources := resolved.get("regularizer", {}).get(name, {}).get("source"):
            runs = [str(Path(source).expanduser().absolute()) for source in sources]
            group = groups.setdefault("regularizer", dict(resolved["regularizer"]))
            group[name] = {**group[name], "source": runs}
    return {**resolved, **groups}


def build_measurer(
    config: Config,
    tokenizer: Tokenizer,
    precision: Precision,
    ranks: Ranks,
    labels: LabelSet | None,
    evaluation: EvaluationConfig | None = None,
) -> Measures:
    """What scores the model; `evaluation` in place of the configuration's own."""
    settings = evaluation or config.evaluation
    if labels is not None:
        return LabelMeasurer(settings, labels, tokenizer.pad_id, precision.autocast, ranks)
    return Measurer(settings, tokenizer, loss_sum_of(config), precision.autocast, ranks)


def check_metric(config: Config, data: DataSet) -> None:
    """Errors: ConfigError if validation cannot measure what the best weights are chosen by."""
    metric = config.checkpoint.metric
    if data.labels is None or not data.validation or not (config.evaluation.times or config.evaluation.every_steps):
        return
    if metric not in (names := measured_names(data.validation, data.labels)):
        raise ConfigError(
            f"checkpoint.metric: the {len(data.validation)} validation texts and their labels do not settle {metric}; "
            f"give others, or one of {', '.join(sorted(names))}"
        )


def check_texts(data: DataSet, model: AnyModel) -> None:
    """Errors: FtlabError naming a text that an encoder cannot read."""
    if isinstance(model, Classifier):
        classify.check_texts([*data.train, *data.validation, *data.test, *data.replayed], model)


def causal(model: AnyModel) -> LlamaForCausalLM:
    """The model, if it gives tokens. Errors: ConfigError for a classifier, which gives labels."""
    if isinstance(model, Classifier):
        raise ConfigError(
            "this run is a classifier: it gives labels, not text; python -m ftlab.evaluate run=DIR out=FILE.json "
            "scores it and writes its answers"
        )
    return model


def base_location(config: Config) -> str:
    """What an adapter's configuration calls its base."""
    return config.model.location if isinstance(config.model, PretrainedConfig) else config.model.name


def export_folder(run_dir: Path, method: Method) -> Path:
    """Where what was trained is exported: adapter/ for what sits on a base, model/ for a whole model."""
    return run_dir / ("adapter" if method.keeps_base else "model")
