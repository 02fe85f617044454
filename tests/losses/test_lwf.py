"""Learning without forgetting against torch's own KL divergence, between two models that really are two."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ftlab import build
from ftlab.compose import compose
from ftlab.config import (
    AdamWConfig,
    BitFitConfig,
    Config,
    FullConfig,
    LoRAConfig,
    LwFConfig,
    MethodConfig,
    PrecisionConfig,
    RegularizerConfig,
    TrainingConfig,
)
from ftlab.errors import ConfigError
from ftlab.losses.cross_entropy import supervised_cross_entropy, supervised_rows
from ftlab.losses.lwf import TokenLwF, distillation
from ftlab.losses.mixout import Mixout
from ftlab.losses.r_drop import r_drop
from ftlab.methods import make_method
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.noise import Noise, disturb
from ftlab.operators.dropout import dropout
from ftlab.session import train
from ftlab.training.parallel import Ranks
from ftlab.training.precision import Precision
from tests.helpers.training import (
    collate,
    compare_with_one_rank,
    gradients,
    gradients_of_a_step,
    ragged_examples,
    run_ranks,
    tiny_llama,
)

BATCH = collate(ragged_examples(6), 6)[0]
METHODS: dict[str, MethodConfig] = {
    "full": FullConfig(),
    "lora": LoRAConfig(rank=4, alpha=8.0),
    "dora": LoRAConfig(rank=4, alpha=8.0, dora=True),
    "pissa": LoRAConfig(rank=4, alpha=8.0, init="pissa"),
    "nf4": LoRAConfig(rank=4, alpha=8.0, quantize="nf4"),
    "bitfit": BitFitConfig(train_norms=True),
}
STRENGTH, T = 20.0, 3.0


def by_torch(old_logits: Tensor, new_logits: Tensor, temperature: float) -> Tensor:
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (old_logits, new_logits))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def logits(model: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
    """Of the supervised positions of the batch, by the plain forward pass; and their labels."""
    found = model(BATCH.input_ids, BATCH.position_ids, BATCH.documents).flatten(0, 1)
    labels = BATCH.labels.flatten()
    return found[labels != -100], labels[labels != -100]


def moved(model: LlamaForCausalLM, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def built(method: MethodConfig, *, chunk: int = 5, start: int | None = None) -> tuple[LlamaForCausalLM, TokenLwF]:
    """A model with a method, and LwF around its plain loss; start: what trains has moved before the old model is."""
    model = tiny_llama()
    make_method(method, seed=0).apply(model)
    if start is not None:
        moved(model, start)
    plain = functools.partial(supervised_cross_entropy, chunk=chunk)
    return model, TokenLwF(model, LwFConfig(STRENGTH, T), plain, chunk)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_torchs(chunk: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    old, old_head, new, head = (torch.randn(rows, 8, generator=generator) for rows in (11, 23, 11, 23))
    new.requires_grad_()
    head.requires_grad_()
    ours = distillation((old, old_head), (new, head), temperature, chunk)
    theirs = by_torch(old @ old_head.T, new @ head.T, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    found, expected = torch.autograd.grad(ours, (new, head)), torch.autograd.grad(theirs, (new, head))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("start", [None, 7])
def test_the_loss_and_its_gradient_are_those_of_two_models(name: str, start: int | None) -> None:
    """start: as method.start_from and model.location have it, the old model need not be the pretrained one."""
    model, lwf = built(METHODS[name], start=start)
    old = copy.deepcopy(model)
    moved(model)
    loss = lwf(model, BATCH)
    loss.backward()
    found = gradients(model)
    model.zero_grad()

    new_logits, labels = logits(model)
    with torch.no_grad():
        old_logits, _ = logits(old)
    divergence = by_torch(old_logits, new_logits, T)
    assert STRENGTH * float(divergence.detach()) > 1
    expected = F.cross_entropy(new_logits, labels, reduction="sum") + STRENGTH * divergence
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    expected.backward()
    assert found.keys() == gradients(model).keys()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_at_the_start_it_is_the_plain_loss(name: str) -> None:
    model, lwf = built(METHODS[name])
    torch.testing.assert_close(lwf(model, BATCH), supervised_cross_entropy(model, BATCH, 5), rtol=1e-6, atol=0)


def test_what_is_kept_is_what_trains() -> None:
    model, lwf = built(METHODS["lora"])
    assert lwf.old.keys() == {f"model.{name}" for name, p in model.named_parameters() if p.requires_grad}
    assert sum(tensor.numel() for tensor in lwf.old.values()) < 0.2 * sum(p.numel() for p in model.parameters())


def test_the_old_model_drops_nothing_and_draws_nothing() -> None:
    model, lwf = built(LoRAConfig(rank=4, alpha=8.0, dropout=0.3), start=7)
    old = copy.deepcopy(model).eval()
    disturb(model, Noise(residual=0.2))
    moved(model)
    model.train()
    torch.manual_seed(0)
    loss = lwf(model, BATCH)
    after = torch.get_rng_state()
    assert model.training
    torch.manual_seed(0)
    rows, labels = supervised_rows(model, BATCH)
    assert torch.equal(after, torch.get_rng_state()), "the same random numbers as one plain pass"
    new_logits = model.logits(rows)
    with torch.no_grad():
        old_logits, _ = logits(old)
    expected = F.cross_entropy(new_logits, labels, reduction="sum") + STRENGTH * by_torch(old_logits, new_logits, T)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


def test_with_r_drop_the_mean_of_both_passes_counts() -> None:
    model = tiny_llama().train()
    disturb(model, Noise(residual=0.2))
    inner = functools.partial(r_drop, chunk=5, strength=1.0)
    lwf = TokenLwF(model, LwFConfig(STRENGTH, T), inner, 5)
    old = copy.deepcopy(model).eval()
    moved(model)
    torch.manual_seed(0)
    loss = lwf(model, BATCH)
    torch.manual_seed(0)
    expected = inner(model, BATCH)
    torch.manual_seed(0)
    with torch.no_grad():
        old_logits, _ = logits(old)
        for _ in range(2):
            new_logits = model.logits(supervised_rows(model, BATCH)[0])
            expected = expected + STRENGTH / 2 * by_torch(old_logits, new_logits, T)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


def test_under_mixout_the_mixed_model_is_held_to_the_old_one() -> None:
    model, lwf = built(FullConfig())
    old = copy.deepcopy(model)
    mixout = Mixout(model, 0.5, lwf)
    moved(model)
    torch.manual_seed(0)
    loss = mixout(model, BATCH)
    torch.manual_seed(0)
    weights = dict(model.named_parameters())
    for key, anchor in mixout.anchors.items():
        name = key.removeprefix("model.")
        weights[name] = anchor + dropout(weights[name] - anchor, 0.5)
    mixed = tiny_llama()
    mixed.load_state_dict(weights)
    with torch.no_grad():
        (new_logits, labels), (old_logits, _) = logits(mixed), logits(old)
    expected = F.cross_entropy(new_logits, labels, reduction="sum") + STRENGTH * by_torch(old_logits, new_logits, T)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_pass_without_gradients_takes_none_away_under_autocast(name: str) -> None:
    """Autocast keeps the casts of weights; those of the old model must not be used again for the new one."""
    model, lwf = built(METHODS[name])
    old = copy.deepcopy(model)
    moved(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lwf(model, BATCH).backward()
    found = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        old_logits = logits(old)[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new_logits, labels = logits(model)
    new_logits = new_logits.float()
    (F.cross_entropy(new_logits, labels, reduction="sum") + STRENGTH * by_torch(old_logits, new_logits, T)).backward()
    assert found.keys() == gradients(model).keys()
    for key, gradient in gradients(model).items():
        assert float((found[key] - gradient).norm() / gradient.norm()) < 0.05, key


def one_step(ranks: Ranks) -> dict[str, Tensor]:
    """The gradient of a step, after the model has moved."""
    model, lwf = built(LoRAConfig(rank=4, alpha=8.0))
    moved(model)
    batches = collate(ragged_examples(8), 2)[ranks.rank :: ranks.world]
    return gradients_of_a_step(model, lwf, ranks, batches)


def test_two_ranks_make_the_step_of_one(tmp_path: Path) -> None:
    run_ranks(compare_with_one_rank, tmp_path, one_step)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch about itself
def test_compiled_blocks_run_on_the_old_weights_too() -> None:
    losses: list[list[Tensor]] = []
    for compiled in (False, True):
        model, lwf = built(LoRAConfig(rank=4, alpha=8.0))
        moved(model)
        for block in model.blocks if compiled else ():
            block.compile(dynamic=True)
        losses.append([])
        for seed in (2, 3):
            model.zero_grad()
            loss = lwf(model, BATCH)
            loss.backward()
            losses[-1] += [loss.detach(), *gradients(model).values()]
            moved(model, seed)
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_cached_activations_give_the_same() -> None:
    """The lowest blocks are the same in both models, so one cache serves both."""
    losses = []
    for gib in (0.0, 0.1):
        config = Config(
            method=LoRAConfig(rank=4, alpha=8.0, targets=[r"layers\.1\..*q_proj"]),
            optimizer=AdamWConfig(),
            regularizer=RegularizerConfig(lwf=LwFConfig(STRENGTH, T)),
            training=TrainingConfig(max_steps=1, activation_cache_gib=gib),
        )
        precision = Precision(PrecisionConfig(), torch.device("cpu"))
        made = build.build_training(config, tiny_llama(), make_method(config.method, seed=0), precision)
        model: Any = made.model
        moved(model)
        made.objective(model, BATCH).backward()
        losses.append(gradients(model))
        if made.cache is not None:
            assert made.cache.hits > 0, "the second model finds what the first one computed"
    for name, gradient in losses[0].items():
        torch.testing.assert_close(losses[1][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_no_tensor_of_rows_by_vocabulary_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graph holds for the backward pass is rows and heads; logits are of one chunk and made again."""
    generator = torch.Generator().manual_seed(0)
    old, head, new = (torch.randn(*shape, generator=generator) for shape in ((64, 8), (500, 8), (64, 8)))
    new.requires_grad_()
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = distillation((old, head), (new, head), 2.0, 16)
    assert all(size <= 500 * 8 for size in sizes), "a chunk's logits are 16 * 500"
    value.backward()


def test_a_batch_without_a_label_gives_every_parameter_a_gradient() -> None:
    model, lwf = built(FullConfig())
    moved(model)
    lwf(model, BATCH.unsupervised()).backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(bool(gradient.any()) for gradient in found.values())


def test_numbers_are_refused_and_temperatures_are_checked() -> None:
    with pytest.raises(ConfigError, match="LwF compares distributions, and a number has none"):
        compose(["data=topics", "data.labels=regression", "model=tiny_bert_random", "regularizer=lwf"])
    with pytest.raises(ConfigError, match="more than 0"):
        compose(["+experiment=full_tiny", "regularizer=lwf", "regularizer.lwf.temperature=0"])


# --- runs -------------------------------------------------------------------------------------------------------------


def run(folder: Path, *words: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The weights that a tiny run ends with, and its lines of training."""
    fixed = ["+experiment=full_tiny", "evaluation=none", "tracking=disabled", "training.preflight=false"]
    fixed += ["training.max_steps=6", "checkpoint.every_steps=3", "tracking.log_every_steps=1", f"run_dir={folder}"]
    assert train(*compose([*fixed, *words])) == 0
    (file,) = [*folder.glob("model/model.safetensors"), *folder.glob("adapter/adapter_model.safetensors")]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return load_file(file), [line for line in lines if line["split"] == "train"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_is_held_to_its_start_and_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    words = [f"method={method}", "optimizer.lr=1e-2"]
    plain, _ = run(tmp_path / "plain", *words)
    zero, _ = run(tmp_path / "zero", *words, "regularizer=lwf", "regularizer.lwf.strength=0")
    assert all(torch.equal(plain[name], zero[name]) for name in plain), "strength 0 is bitwise the run without it"
    strong = [*words, "regularizer=lwf", "regularizer.lwf.strength=3"]
    held, lines = run(tmp_path / "held", *strong)
    assert any(not torch.equal(plain[name], held[name]) for name in plain)
    assert not any(key.startswith("penalty/") for line in lines for key in line)
    checkpoint = tmp_path / "held" / "checkpoints" / "step-00000003"
    again, _ = run(tmp_path / "again", *strong, f"resume={checkpoint}")
    assert all(torch.equal(held[name], again[name]) for name in held), "the old model is that of the first start"


def test_the_old_model_is_what_start_from_gives(tmp_path: Path) -> None:
    run(tmp_path / "first", "method=lora", "optimizer.lr=1e-2")
    start = f"method.start_from={tmp_path}/first/adapter"
    words = ["method=lora", start, "regularizer=lwf", "evaluation=none", "tracking=disabled", "training.max_steps=1"]
    config, _ = compose(["+experiment=full_tiny", *words])
    tokenizer, ranks = build.build_tokenizer(config), Ranks()
    model, method = build.build_base(config, tokenizer, ranks, None)
    made = build.build_training(config, model, method, Precision(config.precision, ranks.device))
    assert isinstance(made.objective, TokenLwF)
    adapter = load_file(tmp_path / "first" / "adapter" / "adapter_model.safetensors")
    factors = [name for name in adapter if ".lora_B." in name]
    assert factors
    for name in factors:
        own = name.removeprefix("base_model.model.").replace(".lora_B.weight", ".lora_B")
        assert torch.equal(made.objective.old[f"model.{own}"], adapter[name])
        assert adapter[name].any()
