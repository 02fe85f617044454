"""A finished run as a model again, for the commands that evaluate, generate and export."""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlab import build
from ftlab.config import Config, FullConfig, ParallelConfig, from_plain
from ftlab.errors import ConfigError, FtlabError
from ftlab.methods import Method
from ftlab.methods.lora import LoRA, lora_leaves
from ftlab.methods.peft_folder import config_of
from ftlab.models.heads import AnyModel, Classifier
from ftlab.models.labels import LabelSet
from ftlab.models.tokenizer import Tokenizer
from ftlab.operators import select
from ftlab.startup import settle_math
from ftlab.training.parallel import Ranks
from ftlab.training.precision import Precision, readable
from ftlab.training.state import changed_inputs

__all__ = ["OpenRun", "open_run", "read_config"]


@dataclass
class OpenRun:
    """A run's configuration and its model with what was trained in place (or the untouched base)."""

    run_dir: Path
    config: Config
    record: dict[str, Any]
    model: AnyModel
    method: Method
    tokenizer: Tokenizer
    precision: Precision

    @property
    def labels(self) -> LabelSet | None:
        """What a classifier tells apart; None for a language model."""
        return self.model.head.labels if isinstance(self.model, Classifier) else None

    def plain(self) -> AnyModel:
        """The model in fp32 with its adapters folded into their weights; it keeps nothing else from then on.

        Widened first: a weight that is stored in bf16 would round what is added to it.
        """
        self.model.float()
        if not self.method.keeps_base or lora_leaves(self.model):  # an untouched base has no adapters
            self.method.merge(self.model)
            self.method.merged(self.model)
        return self.model

    def data(self) -> build.DataSet:
        """The run's data, read again.

        Raises:
            FtlabError: the data, the template, the tokenizer or the base model are not those of the run.
        """
        data = build.build_data(self.config, self.tokenizer)
        inputs = build.fingerprints(self.config, data, self.tokenizer, trained=True)
        before = {
            name: value for name, value in self.record.get("inputs", inputs).items() if name != build.FIRST_ADAPTER
        }
        if changed := changed_inputs(before, inputs):
            raise FtlabError(
                f"the {' and the '.join(changed)} changed since the run in {self.run_dir}, so scores could not be "
                "compared with its own; restore what it was"
            )
        return data


def read_config(run_dir: Path) -> tuple[Config, dict[str, Any]]:
    """The typed configuration and the record of the run in `run_dir`.

    Raises:
        FtlabError: it is not a run folder, or was written by an incompatible version.
    """
    path = run_dir / "run.json"
    if not path.exists():
        runs = [entry.name for entry in run_dir.parent.glob("*/") if (entry / "run.json").exists()]
        near = difflib.get_close_matches(run_dir.name, runs, n=1, cutoff=0.3)
        hint = f"; did you mean {run_dir.parent / near[0]}?" if near else ""
        raise FtlabError(f"{run_dir} is not a run folder: it has no run.json{hint}")
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return from_plain(record["config"], record["classes"]), record
    except (KeyError, ValueError, TypeError) as error:
        raise FtlabError(f"{path} cannot be read by this version of ftlab: {error}") from None


def open_run(
    run_dir: Path,
    *,
    base: bool,
    ranks: Ranks | None = None,
    adapter: Path | None = None,
    whole: Path | None = None,
) -> OpenRun:
    """Load the model of a run; with `base` the pretrained one, untouched.

    adapter: a folder of ftlab's or PEFT's, whose adapter the pretrained model gets in place of what the run trained.
    whole: a folder of a whole model of the run's architecture, whose weights are read in place of that. With `base` the
        pretrained weights are stored as those would be.
    """
    config, record = read_config(run_dir)
    if ranks is None:  # who joins ranks has settled it
        settle_math()
        ranks = Ranks()
    tokenizer = build.build_tokenizer(config)
    labels = LabelSet.from_dict(record["labels"]) if record.get("labels") else None
    # A whole model is stored like weights that trained themselves, and so is the base that it is compared with.
    read_in = readable(config.precision, ranks.device)
    held = replace(config, precision=read_in, method=config.method if whole is None else FullConfig())
    model, method = build.build_base(held, tokenizer, ranks, labels)
    precision = Precision(read_in, ranks.device)
    if base:
        model.requires_grad_(False)
        if not method.keeps_base:
            method.apply(model)  # what is stored in which dtype follows who trains
        elif isinstance(method, LoRA) and method.config.quantize is not None:
            method.apply(model)  # the base that the adapter sits on is the quantised one
            method.switch_off(model)
    elif adapter is not None:
        # The adapter sits on what the run's own sat on.
        quantize = method.config.quantize if isinstance(method, LoRA) else None
        method = LoRA(replace(config_of(adapter, model), quantize=quantize))
        method.apply(model)
        precision.store(model)  # a head that trained in fp32 is read in fp32
        method.load(model, adapter)
    else:
        folder = whole or build.export_folder(run_dir, method)
        if not folder.exists():
            raise FtlabError(f"{run_dir} has no {folder.name}/: the run is {record.get('status')}; finish it first")
        method.apply(model)
        precision.store(model)
        method.load(model, folder)
    if ranks.is_main and precision.dtypes != (then := record.get("dtypes", precision.dtypes)):
        now = " and ".join(precision.dtypes)
        print(f"{run_dir}: products and frozen weights were {' and '.join(then)}, here they are {now}", file=sys.stderr)
    precision.store(model)
    model.use(select("auto", ranks.device)[0])  # whatever the run was trained with: this may be another machine
    model.requires_grad_(False)
    model.eval()
    return OpenRun(run_dir, config, record, model, method, tokenizer, precision)


def parallel_of(config: Config, device: str | None) -> ParallelConfig:
    """The run's parallel settings, on another device if one was asked for."""
    if device not in (None, "auto", "cpu", "cuda"):
        raise ConfigError(f"device={device}: give auto, cpu or cuda")
    return ParallelConfig(device or config.parallel.device, config.parallel.threads, config.parallel.timeout_seconds)
