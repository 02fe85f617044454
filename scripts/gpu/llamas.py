"""Llamas with random weights that are made on the device, and a training step of each contestant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu import peers
from gpu.goals import DecoderShape
from gpu.measure import Unavailable
from gpu.missing import stand_in

stand_in()

from ftlab.config import AdamWConfig, LoRAConfig, PrecisionConfig, TrainingConfig  # noqa: E402
from ftlab.data.loader import IGNORE, Batch  # noqa: E402
from ftlab.losses.cross_entropy import supervised_cross_entropy  # noqa: E402
from ftlab.methods.lora import LoRA, lora_leaves  # noqa: E402
from ftlab.models.attention import Documents  # noqa: E402
from ftlab.models.configuration import LlamaConfig, RopeScaling  # noqa: E402
from ftlab.models.llama import LlamaForCausalLM  # noqa: E402
from ftlab.operators import describe, select  # noqa: E402
from ftlab.optim.adamw import build_optimizer  # noqa: E402
from ftlab.training.loop import train_step  # noqa: E402
from ftlab.training.parallel import Ranks, Replica  # noqa: E402
from ftlab.training.precision import Precision  # noqa: E402

__all__ = ["LLAMAS", "SMOKE_LLAMA", "FtlabRun", "HfRun", "Llama", "batch_of"]

RANK, ALPHA, CLIP, LR = 16, 32.0, 1.0, 1e-4


@dataclass(frozen=True)
class Llama:
    """A configuration of ftlab's."""

    config: LlamaConfig

    @property
    def shape(self) -> DecoderShape:
        """What its work depends on."""
        c = self.config
        sizes = (c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads)
        return DecoderShape(*sizes, c.num_key_value_heads, c.head_dim, c.vocab_size)


def _llama3(width: int, hidden: int, layers: int, head: int, **more: Any) -> Llama:
    scaling = RopeScaling("llama3", more.pop("factor"), 1.0, 4.0, 8192)
    common: dict[str, Any] = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": scaling}
    common |= {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
    common |= {"max_position_embeddings": 131072, "head_dim": head, **more}
    return Llama(LlamaConfig(hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, **common))


LLAMAS = {
    "llama 1B": _llama3(2048, 8192, 16, 64, factor=32.0, tie_word_embeddings=True),  # Llama-3.2-1B
    "llama 8B": _llama3(4096, 14336, 32, 128, factor=8.0),  # Llama-3.1-8B
}
SMOKE_LLAMA = _llama3(
    *(32, 48, 1, 16), factor=8.0, vocab_size=61, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True
)


def batch_of(config: LlamaConfig, rows: int, tokens: int, lengths: Sequence[int], device: torch.device) -> Batch:
    """Random tokens [rows, tokens] in documents of these lengths, each token to be predicted but a document's first."""
    ids = torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor(lengths).cumsum(0) - 1
    labels = ids.flatten().roll(-1)
    labels[ends] = IGNORE
    documents = Documents.from_lengths(lengths)
    return Batch(
        input_ids=ids,
        labels=labels.view(rows, tokens),
        position_ids=documents.position_ids.view(rows, tokens),
        documents=documents,
        example_ids=tuple(f"document {n}" for n in range(len(lengths))),
        num_tokens=rows * tokens,
        num_supervised=int((labels != IGNORE).sum()),
    ).to(device)


def fill(model: LlamaForCausalLM, device: torch.device, scale: float) -> None:
    """bf16 memory on the device, matrices N(0, scale^2), norms 1."""
    model.to(torch.bfloat16)  # on the meta device: no memory yet
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, scale, generator=generator)
            else:
                parameter.fill_(1.0)


class FtlabRun:
    """ftlab's model with LoRA on all linear layers: one set of weights for all of its steppers."""

    def __init__(self, llama: Llama, device: torch.device, dropout: float) -> None:
        self.llama, self.device = llama, device
        self.model = LlamaForCausalLM(llama.config)
        fill(self.model, device, llama.config.initializer_range)
        self.table = LoRA(LoRAConfig(rank=RANK, alpha=ALPHA, dropout=dropout)).apply(self.model)
        self.precision = Precision(PrecisionConfig(compute="bf16", frozen="bf16"), device)
        self.precision.store(self.model)
        for layer in lora_leaves(self.model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.02)  # as after some training: products with zeros are faster
        self.model.train()
        self._operators: dict[str, Any] = {}

    def stepper(self, kernels: str, batch: Batch) -> Callable[[], float]:
        """A call that takes an optimizer step by these kernels and returns the mean loss."""
        operators, _ = select(kernels, self.device)
        self._operators[kernels] = operators
        config = AdamWConfig(lr=LR, max_grad_norm=CLIP)
        optimizer = build_optimizer(config, self.model, self.table, path=operators.path)
        loss_sum = functools.partial(supervised_cross_entropy, chunk=TrainingConfig().head_chunk)
        replica = Replica(self.model, loss_sum, Ranks(0, 1, self.device))

        def step() -> float:
            self.model.use(operators)
            result = train_step(replica, optimizer, [batch], precision=self.precision, max_grad_norm=CLIP)
            return result.nats / result.supervised

        return step

    def taken(self) -> dict[str, Any]:
        """Which way each operation went."""
        return {name: describe(operators) for name, operators in self._operators.items()}

    def frozen(self) -> dict[str, Tensor]:
        """The base's weights by the names of the checkpoint."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if "lora_" not in name}


class HfRun:
    """transformers' llama over the same frozen weights, adapted by PEFT, without autocast."""

    def __init__(
        self, shared: FtlabRun, dropout: float, *, liger: bool = False, compiled: bool = False, smoke: bool = False
    ) -> None:
        if not peers.has("transformers"):
            raise Unavailable("transformers is not installed")
        import transformers

        fields = shared.llama.config.to_hf("bfloat16")
        fields = {name: value for name, value in fields.items() if name not in ("architectures", "torch_dtype")}
        fields |= {"use_cache": False, "attn_implementation": "sdpa"}
        config = transformers.LlamaConfig(**fields)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        state = shared.frozen()
        if "lm_head.weight" not in state:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True, assign=True)
        # What is computed from the configuration is on the meta device too.
        with torch.device(shared.device):
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            # Its RoPE would replace that of every model of this process; compiled, torch's is one pass as well.
            apply_liger_kernel_to_llama(rope=False, rms_norm=True, swiglu=True, model=model)
        names = [name for name, each in model.named_modules() if name.endswith("_proj") and hasattr(each, "weight")]
        self.how = peers.adapted_by_peft(model, names, RANK, dropout)
        if compiled:
            for block in model.model.layers:
                block.compile(dynamic=False, backend="eager" if smoke else "inductor")
        self.model = model.train()

    def stepper(self, batch: Batch) -> Callable[[], float]:
        """A call that takes an optimizer step and returns the mean loss; the labels are shifted by the model."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
        ids = batch.input_ids

        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            return float(loss.detach())

        return step
