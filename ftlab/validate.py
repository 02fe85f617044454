"""What no single type can say: ranges, choices, and values that contradict one another.

Runs before anything is downloaded or loaded, without torch. Every error names the key, the reason and what to do.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ftlab.assets import parse_location, resolve
from ftlab.config import (
    Config,
    FilesDataConfig,
    FreezeConfig,
    GradualUnfreezeConfig,
    HPODataConfig,
    LabelledDataConfig,
    LinearProbeConfig,
    LoRAConfig,
    PretrainedConfig,
    RandomBertConfig,
    RandomConfig,
    WSDConfig,
    makes_classifier,
)
from ftlab.errors import ConfigError, FtlabError
from ftlab.files import one_place
from ftlab.patterns import block_ranges, pattern_and_factor, pattern_numbers
from ftlab.schema import suggestion

__all__ = ["GENERATION_METRICS", "LABEL_METRICS", "LOSS_METRICS", "TEMPLATES", "validate"]

LOSS_METRICS = ("loss", "perplexity")
GENERATION_METRICS = ("exact_match", "token_f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL")
LABEL_METRICS = {
    "single": ("loss", "accuracy", "macro_f1", "micro_f1", "mcc", "auroc", "ece"),
    "multi": ("loss", "subset_accuracy", "macro_f1", "micro_f1", "auroc", "ece"),
    "regression": ("loss", "mse", "pearson", "spearman"),
}
TEMPLATES = ("model", "chatml", "plain")
TARGET = "_target_"


def validate(config: Config) -> None:
    """Raise ConfigError for the first value out of range, or the first contradiction."""
    check_values(config, "")
    for check in CHECKS:
        check(config)


# --- values one by one ------------------------------------------------------------------------------------------------


def check_values(node: Any, prefix: str) -> None:
    """Ranges and choices of every field, at every depth."""
    for item in fields(node):
        path, value = f"{prefix}{item.name}", getattr(node, item.name)
        if is_dataclass(value):
            check_values(value, f"{path}.")
            continue
        check_finite(value, path)
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_range(value, path, item.metadata)
        choices = item.metadata.get("choices", ())
        if choices and value is not None and value not in choices:
            near = suggestion(str(value), choices, f"{path}={{}}")
            raise ConfigError(f"{path}: {value!r} is none of {', '.join(choices)}{near}")


def check_finite(value: Any, path: str) -> None:
    """Refuse NaN and infinity, also inside lists and mappings."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: {value} is not a finite number")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_finite(inner, f"{path}.{key}")
    if isinstance(value, list):
        for number, inner in enumerate(value):
            check_finite(inner, f"{path}.{number}")


def check_range(value: float, path: str, metadata: Any) -> None:
    """Refuse a number outside low <= value <= high, above < value < below."""
    limits: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
        ("low", "at least", lambda number, limit: number >= limit),
        ("above", "more than", lambda number, limit: number > limit),
        ("high", "at most", lambda number, limit: number <= limit),
        ("below", "less than", lambda number, limit: number < limit),
    )
    present = [(words, metadata[name], holds) for name, words, holds in limits if metadata.get(name) is not None]
    if all(holds(value, limit) for _, limit, holds in present):
        return
    raise ConfigError(f"{path}: {value} is out of range, must be {' and '.join(f'{w} {n}' for w, n, _ in present)}")


# --- groups against themselves and one another ------------------------------------------------------------------------


def check_run(config: Config) -> None:
    """Name, folder, resume."""
    if not config.name or "/" in config.name or "\\" in config.name or config.name in (".", ".."):
        raise ConfigError(f"name: {config.name!r} cannot be part of a folder's name; give name=... without slashes")
    for key in ("output_dir", "run_dir"):
        value = getattr(config, key)
        if value is not None and not value.strip():
            raise ConfigError(f"{key}: it is empty; give a folder")
    if config.resume not in ("auto", "never") and not Path(config.resume).exists():
        raise ConfigError(f"resume: {config.resume} does not exist; give auto, never, or the path of a checkpoint")


def check_model(config: Config) -> None:
    """Dimensions of a random model, and that a tokenizer can be found."""
    model = config.model
    if isinstance(model, PretrainedConfig):
        check_location(model.location, "model.location")
    if model.tokenizer is not None and model.tokenizer != "bytes":
        check_location(model.tokenizer, "model.tokenizer")
    if not isinstance(model, RandomConfig | RandomBertConfig):
        return
    if model.tokenizer is None:
        raise ConfigError("model.tokenizer: random weights bring none; give model.tokenizer=bytes or a location")
    if model.hidden_size % model.num_heads:
        raise ConfigError(
            f"model.hidden_size: {model.hidden_size} is not a multiple of model.num_heads={model.num_heads}; change one"
        )
    if isinstance(model, RandomBertConfig):
        return
    if model.hidden_size // model.num_heads % 2:
        raise ConfigError(
            f"model.num_heads: a head of {model.hidden_size // model.num_heads} dimensions cannot be rotated in pairs; "
            "hidden_size / num_heads must be even"
        )
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads: {model.num_kv_heads} does not divide model.num_heads={model.num_heads}; change one"
        )


def check_data(config: Config) -> None:
    """Lengths, batches, splits, files."""
    data = config.data
    if (data.packing or data.pad_rows) and data.row_length < data.max_length:
        raise ConfigError(
            f"data.row_length: a row of {data.row_length} tokens cannot hold an example of data.max_length="
            f"{data.max_length}; raise row_length or lower max_length"
        )
    if data.micro_batch_size > data.batch_size:
        raise ConfigError(
            f"data.micro_batch_size: {data.micro_batch_size} is more than data.batch_size={data.batch_size}; lower it"
        )
    if data.share_prefix and data.pad_rows:
        raise ConfigError(
            "data.share_prefix: rows of one length (data.pad_rows=true) leave no place for a prefix that stands once; "
            "set one of the two to false"
        )
    if data.validation_fraction + data.test_fraction >= 1:
        raise ConfigError(
            f"data.validation_fraction: {data.validation_fraction} and data.test_fraction={data.test_fraction} leave "
            "nothing to train on; lower one"
        )
    if data.template not in TEMPLATES and not Path(data.template).is_file():
        near = suggestion(data.template, TEMPLATES, "data.template={}")
        raise ConfigError(
            f"data.template: {data.template!r} is none of {', '.join(TEMPLATES)} and no such file exists{near}"
        )
    if isinstance(data, HPODataConfig):
        check_location(data.location, "data.location")
    if isinstance(data, FilesDataConfig | LabelledDataConfig):
        for key in ("train", "validation", "test"):
            if getattr(data, key) is not None:
                check_location(getattr(data, key), f"data.{key}")


def check_labels(config: Config) -> None:
    """Data with labels make a classifier: settings of conversations do not apply, and those of heads only here."""
    data, head = config.data, config.head
    if isinstance(data, LabelledDataConfig):
        check_labelled(config, data)
    if not makes_classifier(data):
        changed = [f"head.{item.name}" for item in fields(head) if getattr(head, item.name) != item.default]
        if changed:
            raise ConfigError(f"{changed[0]}: a head of labels needs data with labels and no data.instruction")
        if isinstance(config.model, RandomBertConfig):
            raise ConfigError("model: an encoder gives no text; give data with labels and no data.instruction")
        return
    idle = {
        "data.packing": (data.packing, "each text is a row of its own; set it to false"),
        "data.share_prefix": (data.share_prefix, "texts share no prefix; set it to false"),
        "data.system": (data.system is not None, "texts with labels have no system message; leave it null"),
        "data.template": (data.template != "model", "texts with labels go through no chat template; leave it out"),
        "regularizer.r_drop": (
            config.regularizer.r_drop > 0 and data.labels == "regression",
            "R-Drop compares distributions, and a number has none; set it to 0",
        ),
        "regularizer.lwf.strength": (
            config.regularizer.lwf.strength > 0 and data.labels == "regression",
            "LwF compares distributions, and a number has none; set it to 0",
        ),
        "training.activation_cache_gib": (
            config.training.activation_cache_gib > 0,
            "a classifier keeps none; set it to 0",
        ),
    }
    for key, (given, advice) in idle.items():
        if given:
            raise ConfigError(f"{key}: {advice}")


def check_labelled(config: Config, data: LabelledDataConfig) -> None:
    """What texts with labels need, whether a head or a language model learns them."""
    if data.instruction is not None and not data.instruction.strip():
        raise ConfigError("data.instruction: it is empty; give a text, or null for a classifier")
    if data.labels != "single" and data.source not in ("files", "hpo_organ"):
        raise ConfigError(f"data.labels: each record of source={data.source} has one label; give single")
    if data.labels == "multi" and not data.separator:
        raise ConfigError("data.separator: it is empty; give what stands between the labels of a CSV cell, as |")
    if data.labels == "regression":
        if data.instruction is not None:
            raise ConfigError("data.instruction: a number is no answer to learn as text; set it to null")
        if data.source == "hpo_organ":
            raise ConfigError("data.labels: organ systems are no numbers; give single or multi")
        if data.min_per_label > 1:
            raise ConfigError("data.min_per_label: numbers have no labels to leave out; set it to 1")
        if data.shots is not None:
            raise ConfigError("data.shots: numbers have no classes to take shots of; give data.limit_train")
        if config.regularizer.label_smoothing > 0:
            raise ConfigError(
                "regularizer.label_smoothing: there is no label to smooth with data.labels=regression; set it to 0"
            )
    if data.source != "files" and (data.validation is not None or data.test is not None):
        raise ConfigError(f"data.validation, data.test: source={data.source} splits its records; leave them null")
    if data.shots is not None and data.limit_train is not None:
        raise ConfigError("data.shots: data.limit_train would take shots away again; give one of the two")


def check_location(location: str, key: str) -> None:
    """The form of a location, and that a local file is there."""
    try:
        if parse_location(location).kind in ("file", "builtin"):
            resolve(location)
    except FtlabError as error:
        raise ConfigError(f"{key}: {error}") from error


def check_method(config: Config) -> None:
    """Rates have a form and act; unfreezing keeps no activations and may need validation; LoRA needs targets."""
    if isinstance(config.method, LinearProbeConfig) and config.method.layer_decay != 1:
        raise ConfigError(
            f"method.layer_decay: {config.method.layer_decay} sets the rates of blocks, and with method=linear_probe a "
            "head alone trains; leave it at 1, and give the head a rate of its own by method.rates"
        )
    if isinstance(config.method, GradualUnfreezeConfig):
        if config.training.activation_cache_gib > 0:
            raise ConfigError(
                "training.activation_cache_gib: with method=gradual_unfreeze what is kept would change from stage to "
                "stage; set it to 0"
            )
        if config.method.trigger == "stall" and not (config.evaluation.times or config.evaluation.every_steps):
            raise ConfigError("method.trigger: stall needs validation; give evaluation.every_steps or evaluation.times")
    if isinstance(config.method, FreezeConfig) and config.method.layers is not None:
        block_ranges(config.method.layers)
    for entry in config.method.rates:
        pattern_and_factor("method.rates", entry)
    if isinstance(config.method, LoRAConfig):
        targets = config.method.targets
        if not targets or not all(target.strip() for target in targets):
            raise ConfigError("method.targets: it names no layer; give for example 'method.targets=[q_proj,v_proj]'")
        check_variants(config.method)
        check_quantised(config, config.method)


def check_variants(method: LoRAConfig) -> None:
    """What of the LoRA family goes together, and the form of ranks and alphas."""
    if method.init == "pissa" and method.dora:
        raise ConfigError("method.dora: it starts from B = 0, method.init=pissa does not; set one of them back")
    if method.start_from is not None and not (Path(method.start_from) / "adapter_config.json").exists():
        raise ConfigError(
            f"method.start_from: {method.start_from} is not an adapter's folder: it has no adapter_config.json; give "
            "one that PEFT wrote, or adapter/ of a run"
        )
    for key in ("ranks", "alphas"):
        pattern_numbers(key, getattr(method, key))


def check_quantised(config: Config, method: LoRAConfig) -> None:
    """Adapters beside NF4 have no kernel, and NF4 changes the weights that PiSSA and DoRA take apart."""
    if method.quantize is None:
        return
    for key, default, other in (("init", "default", method.init == "pissa"), ("dora", "false", method.dora)):
        if other:
            raise ConfigError(f"method.{key}: it does not go with method.quantize=nf4; give method.{key}={default}")
    if config.kernels in ("native", "triton"):
        raise ConfigError(
            f"kernels: {config.kernels} has no kernel for the adapters of method.quantize=nf4; use kernels=auto, which "
            "leaves them to torch"
        )
    if config.training.compile:
        raise ConfigError("training.compile: true does not go with method.quantize=nf4; give training.compile=false")


def check_kernels(config: Config) -> None:
    """A path that was asked for must be one that this device and torch.compile leave."""
    kernels, device = config.kernels, config.parallel.device
    if kernels in ("triton", "native", "check") and config.training.compile:
        raise ConfigError(
            f"kernels: {kernels} and training.compile=true both fuse what lies between the matrix products; use "
            "kernels=auto, which then leaves it to torch.compile, or training.compile=false"
        )
    if (kernels, device) == ("native", "cuda"):
        raise ConfigError("kernels: native is for a CPU and does not run with parallel.device=cuda; use kernels=auto")


def check_regularizer(config: Config) -> None:
    """L2-SP's rules; EWC's runs; entries of `extra`: importable, with arguments that the class takes."""
    for rule in config.regularizer.l2_sp.rules:
        pattern_and_factor("regularizer.l2_sp.rules", rule)
    if config.regularizer.l2_sp.beta > 0 and not makes_classifier(config.data):
        raise ConfigError(
            "regularizer.l2_sp.beta: it pulls what has no pretrained value, a classifier's head, and here is none; set "
            "it to 0"
        )
    check_earlier_runs(config)
    ewc = config.regularizer.ewc
    for source in ewc.source if ewc.strength > 0 else ():
        if not (Path(source) / "fisher.safetensors").exists():
            raise ConfigError(
                f"regularizer.ewc.source: {source} has no Fisher information yet; make it by "
                f"python -m ftlab.fisher run={source}"
            )
    for name, entry in config.regularizer.extra.items():
        key = f"regularizer.extra.{name}"
        if not isinstance(entry, dict) or not isinstance(entry.get(TARGET), str):
            raise ConfigError(f"{key}: it needs {TARGET}: module.Class and that class's arguments")
        check_arguments(entry, key, import_target(entry[TARGET], f"{key}.{TARGET}"))
        strength = entry.get("strength")
        if isinstance(strength, int | float) and strength < 0:
            raise ConfigError(f"{key}.strength: {strength} is out of range, must be at least 0")


def check_earlier_runs(config: Config) -> None:
    """What learns of earlier runs names some, and they are run folders."""
    ewc, replay = config.regularizer.ewc, config.regularizer.replay
    for name, zero, strength, sources in (
        ("ewc", "strength", ewc.strength, ewc.source),
        ("replay", "share", replay.share, replay.source),
    ):
        if strength == 0:
            continue
        key = f"regularizer.{name}.source"
        if not sources:
            raise ConfigError(f"{key}: it names no earlier run; give '{key}=[runs/...]', or {zero} 0")
        if twice := one_place(sources):
            raise ConfigError(f"{key}: it names a run twice, {twice[0]} and {twice[1]}; name each once")
        for source in sources:
            if not (Path(source) / "run.json").exists():
                raise ConfigError(f"{key}: {source} is not a run folder: it has no run.json")


def check_noise(config: Config) -> None:
    """What disturbs the model in training needs the model to be computed, and by something that can."""
    regularizer = config.regularizer
    places = {f"dropout.{item.name}": getattr(regularizer.dropout, item.name) for item in fields(regularizer.dropout)}
    below_head = {name: p for name, p in places.items() if name != "dropout.head"}
    below_head |= {"stochastic_depth": regularizer.stochastic_depth, "neftune": regularizer.neftune}
    for name, strength in below_head.items():
        if strength > 0 and config.training.activation_cache_gib > 0:
            raise ConfigError(
                f"regularizer.{name}: {strength} makes activations random, and training.activation_cache_gib keeps "
                "them; set one of the two to 0"
            )
    if regularizer.neftune > 0 and config.data.share_prefix:
        raise ConfigError(
            "regularizer.neftune: with data.share_prefix=true the shared tokens have no length of their own document; "
            "set data.share_prefix=false or neftune=0"
        )
    if regularizer.mixout > 0:
        if isinstance(config.method, LoRAConfig):
            raise ConfigError(
                f"regularizer.mixout: {regularizer.mixout} mixes trained with pretrained weights, and the factors of "
                "method=lora have none; give method=full or method=freeze, or method.dropout instead"
            )
        for key in ("activation_checkpointing", "compile"):
            if getattr(config.training, key):
                raise ConfigError(
                    f"regularizer.mixout: training.{key}=true would run blocks on other weights than the mixed ones; "
                    f"set training.{key}=false or mixout=0"
                )
    labelled = makes_classifier(config.data)
    # Not mixout: both passes of a step have its one mixture.
    masks = [*places.values(), *below_head.values(), getattr(config.method, "dropout", 0)]
    if regularizer.r_drop > 0 and not any(masks):
        raise ConfigError(
            f"regularizer.r_drop: {regularizer.r_drop} compares two passes, which are the same without dropout; give "
            "regularizer.dropout.residual (or another place), method.dropout with method=lora, or r_drop=0"
        )
    smoothing = 0.0 if labelled else regularizer.label_smoothing  # a classifier's loss goes through no kernel
    attention = 0.0 if labelled else places["dropout.attention"]  # `classify` knows whether it is an encoder's
    without_kernel = {"label_smoothing": smoothing, "dropout.attention": attention}
    without = ("label_smoothing", "dropout.attention") if config.kernels == "native" else ("dropout.attention",)
    for name in without if config.kernels in ("native", "triton") else ():
        if without_kernel[name] > 0:
            raise ConfigError(
                f"kernels: {config.kernels} has no kernel with regularizer.{name}={without_kernel[name]}; use "
                "kernels=auto, which leaves that to torch"
            )


def import_target(target: str, key: str) -> Any:
    """The callable at a dotted path; what lies in the current folder is found too."""
    module_name, _, attribute = target.rpartition(".")
    if not module_name:
        raise ConfigError(f"{key}: {target!r} is not a dotted path; give module.Class")
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ConfigError(f"{key}: {module_name} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, attribute, None)):
        names = [name for name, value in vars(module).items() if callable(value)]
        raise ConfigError(f"{key}: {module_name} has no {attribute}{suggestion(attribute, names, module_name + '.{}')}")
    return getattr(module, attribute)


def check_arguments(entry: dict[str, Any], key: str, target: Callable[..., Any]) -> None:
    """Every argument has a parameter and every parameter without a default its argument; the first is the model."""
    parameters = list(inspect.signature(target).parameters.values())[1:]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    names = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_POSITIONAL]
    for argument in entry:
        if argument != TARGET and argument not in names:
            near = suggestion(str(argument), names, key + ".{}")
            raise ConfigError(f"{key}.{argument}: {entry[TARGET]} has no such parameter{near}")
    for parameter in parameters:
        if parameter.name in names and parameter.default is inspect.Parameter.empty and parameter.name not in entry:
            raise ConfigError(
                f"{key}.{parameter.name}: {entry[TARGET]} needs a value; give +{key}.{parameter.name}=..."
            )


def check_schedule(config: Config) -> None:
    """A run with an end, and phases that fit into one of any length.

    Where the number of steps is known, `ftlab.compose` also makes the schedule itself.
    """
    schedule, training = config.schedule, config.training
    if training.epochs is None and training.max_steps is None:
        raise ConfigError("training.epochs: the run has no end; give training.epochs or training.max_steps")
    if not isinstance(schedule, WSDConfig) or schedule.warmup_steps is not None:
        return
    if schedule.warmup_fraction + schedule.decay_fraction > 1:
        raise ConfigError(
            f"schedule.decay_fraction: {schedule.decay_fraction} and schedule.warmup_fraction="
            f"{schedule.warmup_fraction} are more than the whole run; lower one"
        )


def check_precision(config: Config) -> None:
    """Half precision where it can work."""
    precision = config.precision
    if precision.compute == "fp16" and config.parallel.device == "cpu":
        raise ConfigError(
            "precision.compute: fp16 needs a CUDA GPU and parallel.device=cpu; give precision=bf16 or fp32"
        )
    if precision.frozen == "fp16" and precision.compute != "fp16":
        raise ConfigError(
            f"precision.frozen: fp16 goes with precision.compute=fp16, not {precision.compute}; give precision.frozen="
            f"{precision.compute}"
        )


def check_evaluation(config: Config) -> None:
    """Whatever depends on validation needs one, and a metric that it measures."""
    evaluation, checkpoint = config.evaluation, config.checkpoint
    if evaluation.times == 0 and evaluation.every_steps is None:
        for key in ("load_best", "patience"):
            value = getattr(checkpoint, key)
            if value:
                raise ConfigError(
                    f"checkpoint.{key}: {str(value).lower()} needs validation, and evaluation.times is 0; give "
                    f"evaluation.times, or checkpoint.{key}={'false' if key == 'load_best' else 'null'}"
                )
    method = config.method
    stall = method.every if isinstance(method, GradualUnfreezeConfig) and method.trigger == "stall" else None
    if stall is not None and checkpoint.patience is not None and checkpoint.patience <= stall:
        raise ConfigError(
            f"checkpoint.patience: {checkpoint.patience} validations without a better one end the run before "
            f"method.every={stall} of them let more train (method.trigger=stall); give more than method.every"
        )
    own_files = isinstance(config.data, FilesDataConfig | LabelledDataConfig)
    named = own_files and getattr(config.data, "validation", None) is not None
    needing: list[tuple[str, int | str, str]] = []
    if checkpoint.patience is not None:
        needing.append(("checkpoint.patience", checkpoint.patience, "null"))
    if stall is not None:
        needing.append(("method.trigger", "stall", "epoch"))
    for key, value, instead in needing if config.data.validation_fraction == 0 and not named else ():
        files = " or data.validation" if own_files else ""
        raise ConfigError(
            f"{key}: {value} needs validation, and data.validation_fraction is 0; give "
            f"data.validation_fraction{files}, or {key}={instead}"
        )
    every: tuple[str, ...] = (*LOSS_METRICS, *GENERATION_METRICS)
    if makes_classifier(config.data):
        every = LABEL_METRICS[config.data.labels]
    if checkpoint.metric not in every:
        near = suggestion(checkpoint.metric, every, "checkpoint.metric={}")
        raise ConfigError(f"checkpoint.metric: {checkpoint.metric!r} is none of {', '.join(every)}{near}")
    if checkpoint.metric in GENERATION_METRICS and not evaluation.generate:
        raise ConfigError(
            f"checkpoint.metric: {checkpoint.metric} needs generation; give evaluation.generate=true or "
            "checkpoint.metric=loss"
        )


CHECKS: tuple[Callable[[Config], None], ...] = (
    check_run,
    check_model,
    check_data,
    check_labels,
    check_method,
    check_kernels,
    check_regularizer,
    check_noise,
    check_schedule,
    check_precision,
    check_evaluation,
)
