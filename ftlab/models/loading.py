"""Models with values: read from a checkpoint, or random."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ftlab.errors import FtlabError
from ftlab.models.checkpoint import SafetensorsFolder, TensorFiles, TensorSource, describe_names
from ftlab.models.configuration import LlamaConfig
from ftlab.models.gguf import GGUFLlama, is_gguf
from ftlab.models.llama import LlamaForCausalLM, RMSNorm

__all__ = ["initialise", "load_model", "open_checkpoint", "random_llama"]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CLASSIFIER_HEAD = "score.weight"
# Rotary frequencies that old checkpoints carry; they follow from the configuration.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def open_checkpoint(path: str | Path) -> TensorSource:
    """A GGUF file, or a folder with config.json and safetensors; no weight is read yet."""
    path = Path(path)
    if path.is_dir():
        return SafetensorsFolder(path)
    if not path.exists():
        raise FtlabError(f"{path}: no such file or folder")
    if is_gguf(path):
        return GGUFLlama(path)
    raise FtlabError(f"{path}: neither a GGUF file nor a folder with config.json and safetensors")


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    classifier: bool = False,
) -> LlamaForCausalLM:
    """Build a llama and fill it from a GGUF file or a folder, every weight converted to `dtype` as it is read.

    classifier: the folder is one of `LlamaForSequenceClassification`, whose head is left out; the model then has no LM
    head either.

    Each weight is read slice by slice into its final place, so little more than the final weights is ever held.
    Missing, unexpected or misshapen tensors, and values that are not finite (in the file, or in `dtype`), raise
    FtlabError with the names.
    """
    source = open_checkpoint(path)
    model = LlamaForCausalLM(source.config)
    if classifier:
        model.lm_head = None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_names(source, expected, CLASSIFIER_HEAD if classifier else None)
    state = {name: read_tensor(source, name, dtype, device) for name in expected}
    model.load_state_dict(state, strict=True, assign=True)
    if source.config.tie_word_embeddings and HEAD in source.shapes:
        check_tied(source, state[EMBEDDING])
    return model


def check_names(source: TensorSource, expected: dict[str, tuple[int, ...]], left_out: str | None = None) -> None:
    """Compare what the file holds, but for a tensor that is left out, with what the configuration asks for."""
    found = {name for name in source.shapes if not DERIVED.fullmatch(name)}
    if source.config.tie_word_embeddings:
        found.discard(HEAD)
    if left_out is not None:
        found.discard(left_out)
    compare_names(source, found, expected)


def compare_names(source: TensorFiles, found: set[str], expected: dict[str, tuple[int, ...]]) -> None:
    """FtlabError unless the tensors `found` in `source` are those expected, in name and shape."""
    problems = []
    if missing := expected.keys() - found:
        problems.append(f"missing {describe_names(missing)}")
    if unexpected := found - expected.keys():
        problems.append(f"unexpected {describe_names(unexpected)}")
    wrong = {
        f"{name} {source.shapes[name]} instead of {expected[name]}"
        for name in found & expected.keys()
        if source.shapes[name] != expected[name]
    }
    if wrong:
        problems.append(f"misshapen {describe_names(wrong)}")
    if problems:
        raise FtlabError(f"{source.where}: the tensors do not fit the configuration: {'; '.join(problems)}")


def read_tensor(source: TensorFiles, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """One tensor of a checkpoint, in `dtype`; what is held besides it is one slice."""
    out = torch.empty(source.shapes[name], dtype=dtype, device=device)
    flat = out.view(-1)
    filled = 0
    for chunk in source.chunks(name):
        part = flat[filled : filled + chunk.numel()]
        part.copy_(chunk.reshape(-1))
        if not all_finite(part):
            raise FtlabError(f"{source.where}: tensor {name} has values that are not finite in {dtype}")
        filled += chunk.numel()
    if filled != out.numel():
        raise FtlabError(f"{source.where}: tensor {name} gave {filled} of {out.numel()} values")
    return out


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: NaN passes through the extremes, which take one pass and no memory."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def check_tied(source: TensorSource, embedding: Tensor) -> None:
    """A checkpoint that says it is tied and stores a head all the same must store the embedding twice."""
    if not torch.equal(read_tensor(source, HEAD, embedding.dtype, embedding.device), embedding):
        raise FtlabError(
            f"{source.where}: the configuration ties {HEAD} to {EMBEDDING} but they differ; "
            "set tie_word_embeddings to false"
        )


def initialise(model: LlamaForCausalLM, seed: int) -> None:
    """Give every parameter its first value: matrices N(0, initializer_range^2), biases 0, norms 1.

    The one place where values are chosen. It draws from its own generator, in the order of the parameter names, and
    leaves the global one alone.
    """
    generator = torch.Generator().manual_seed(seed)
    done = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if isinstance(module, RMSNorm):
                nn.init.ones_(parameter)
            elif parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                values = torch.empty(parameter.shape).normal_(0.0, model.config.initializer_range, generator=generator)
                with torch.no_grad():
                    parameter.copy_(values)
            done.add(name)
    if forgotten := {name for name, _ in model.named_parameters()} - done:
        raise AssertionError(f"no initial value for {describe_names(forgotten)}")


def random_llama(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A llama with random fp32 weights on the CPU; the same seed gives the same weights on every machine."""
    model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    initialise(model, seed)
    return model
