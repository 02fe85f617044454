"""EWC: the Fisher information against closed forms and autograd, the penalty, and the run that uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab import fisher as command
from ftlab.compose import compose
from ftlab.config import EWCConfig, FreezeConfig, FullConfig, L1SPConfig, L2Config, LoRAConfig, RegularizerConfig
from ftlab.data.loader import Batch, collate_rows
from ftlab.errors import ConfigError, FtlabError
from ftlab.losses.ewc import EWC
from ftlab.losses.fisher import FILE, FisherFacts, diagonal_fisher, read_fisher, save_fisher
from ftlab.losses.penalties import build_penalties
from ftlab.methods import make_method
from ftlab.methods.lora import lora_leaves
from ftlab.models.llama import LlamaForCausalLM
from ftlab.open_run import open_run
from ftlab.session import train
from tests.helpers.training import ragged_examples, tiny_llama

NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"]


def batches(count: int = 4) -> list[Batch]:
    return [collate_rows([[example]], 1) for example in ragged_examples(count)]


# --- Fisher information -----------------------------------------------------------------------------------------------


def test_empirical_is_the_mean_of_squared_gradients_of_single_examples() -> None:
    model = tiny_llama().requires_grad_(False)
    found = diagonal_fisher(model, NAMES, batches(), kind="empirical")
    assert not any(p.requires_grad for p in model.parameters()), "as it was"
    model.double().requires_grad_(True)
    expected = {name: torch.zeros_like(model.get_parameter(name)) for name in NAMES}
    for batch in batches():
        logits = model(batch.input_ids)[0]
        nats = F.cross_entropy(logits, batch.labels[0], ignore_index=-100, reduction="sum")
        for name, gradient in zip(
            NAMES, torch.autograd.grad(nats, [model.get_parameter(n) for n in NAMES]), strict=True
        ):
            expected[name] += gradient.square() / 4
    for name in NAMES:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(
            found[name].double(), expected[name], rtol=1e-4, atol=1e-6 * float(expected[name].max())
        )


def test_true_is_the_expectation_over_the_models_own_labels() -> None:
    """Of one supervised token: sum over the vocabulary of p(y) (d log p(y))^2, by enumeration."""
    model = tiny_llama()
    example = ragged_examples(2)[1]  # one supervised token
    batch = collate_rows([[example]], 1)
    assert batch.num_supervised == 1
    name = "model.norm.weight"
    at = int(torch.nonzero(batch.labels[0] != -100))
    log_p = model(batch.input_ids)[0, at].log_softmax(-1)
    exact = torch.zeros_like(model.get_parameter(name))
    for y in range(len(log_p)):
        (gradient,) = torch.autograd.grad(log_p[y], [model.get_parameter(name)], retain_graph=True)
        exact += log_p[y].exp().detach() * gradient.square()
    drawn = diagonal_fisher(model, [name], [batch] * 3000, kind="true", seed=1)[name]
    empirical = diagonal_fisher(model, [name], [batch], kind="empirical")[name]
    off = float((drawn - exact).norm() / exact.norm())
    assert off < 0.1
    assert float((empirical - exact).norm() / exact.norm()) > 3 * off, "another quantity"


def test_squares_are_summed_in_fp32_whatever_the_model_is_stored_in() -> None:
    """In bf16 a sum stops growing where an example adds less than 1/256 of it."""
    model = tiny_llama()
    many = batches(4) * 300
    exact = diagonal_fisher(model, NAMES, many, kind="empirical")
    half = diagonal_fisher(model.bfloat16(), NAMES, many, kind="empirical")
    for name in NAMES:
        assert half[name].dtype == torch.float32
        assert float((half[name] - exact[name]).norm()) < 0.1 * float(exact[name].norm())


def test_dropout_is_off_and_the_seed_decides() -> None:
    model = tiny_llama()
    make_method(LoRAConfig(rank=2, dropout=0.5)).apply(model)
    model.train()
    names = ["model.layers.0.mlp.up_proj.lora_B"]
    first, again, other = (diagonal_fisher(model, names, batches(), seed=seed)[names[0]] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_file_holds_it(tmp_path: Path) -> None:
    model = tiny_llama()
    fisher = diagonal_fisher(model, NAMES, batches())
    facts = FisherFacts("true", 4, 0)
    save_fisher(tmp_path / FILE, fisher, dict(model.named_parameters()), facts)
    read, anchors, same = read_fisher(tmp_path / FILE)
    assert same == facts
    for name in NAMES:
        assert torch.equal(anchors[name], model.get_parameter(name))
        torch.testing.assert_close(read[name].float(), fisher[name], rtol=2**-8, atol=0)
    (tmp_path / FILE).write_bytes(b"half a file")
    with pytest.raises(FtlabError, match="holds no Fisher information"):
        read_fisher(tmp_path / FILE)
    with pytest.raises(FtlabError, match="at least one example"):
        diagonal_fisher(model, NAMES, [])


# --- the penalty ------------------------------------------------------------------------------------------------------


def saved(folder: Path, model: LlamaForCausalLM, seed: int = 0) -> str:
    """A folder with random Fisher information of every matrix, as if a run had ended at these weights."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    fisher = {name: torch.rand(p.shape, generator=generator) for name, p in weights.items()}
    save_fisher(folder / FILE, fisher, weights, FisherFacts("true", 1, 0))
    return str(folder)


def expected_value(model: LlamaForCausalLM, folders: list[str], strength: float) -> Tensor:
    """By the effective weights, formed."""
    deltas = {f"{name}.weight": leaf.delta_weight().double() for name, leaf in lora_leaves(model).items()}
    total = torch.zeros((), dtype=torch.float64)
    for folder in folders:
        fisher, anchors, _ = read_fisher(Path(folder) / FILE)
        for name, parameter in model.named_parameters():
            if name in fisher and (parameter.requires_grad or name in deltas):
                distance = parameter.double() + deltas.get(name, 0) - anchors[name].double()
                total = total + (fisher[name].double() * distance.square()).sum()
    return strength / 2 * total


@pytest.mark.parametrize("base_moved", [False, True])
@pytest.mark.parametrize("method", [FullConfig(), FreezeConfig(frozen_fraction=0.5), LoRAConfig(rank=3, alpha=6.0)])
def test_value_and_gradient_of_two_tasks(
    method: FullConfig | FreezeConfig | LoRAConfig, base_moved: bool, tmp_path: Path
) -> None:
    folders = [saved(tmp_path / "a", tiny_llama(0)), saved(tmp_path / "b", tiny_llama(5 if base_moved else 0), seed=1)]
    model = tiny_llama()
    make_method(method).apply(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    parameters = [p for p in model.parameters() if p.requires_grad]
    penalty = EWC(model, EWCConfig(0.7, folders))
    value, exact = penalty.value(model), expected_value(model, folders, 0.7)
    assert float(value.detach()) > 0
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0)
    ours = torch.autograd.grad(value, parameters, allow_unused=True)
    theirs = torch.autograd.grad(exact, parameters, allow_unused=True)
    assert sum(g is not None for g in ours) >= 4
    for mine, reference in zip(ours, theirs, strict=True):
        if reference is not None:
            torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-5 * float(reference.abs().max()))
    if isinstance(method, LoRAConfig) and not base_moved:
        assert all(held.offset is None for held in penalty.held), "the frozen weight is the anchor: none is kept"


def test_nothing_to_protect_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", tiny_llama())
    model = tiny_llama()
    make_method(FreezeConfig(frozen_fraction=1.0)).apply(model)
    with pytest.raises(FtlabError, match="nothing that trains here"):
        EWC(model, EWCConfig(1.0, [folder]))
    other = tmp_path / "b"
    other.mkdir()
    save_fisher(other / FILE, {"x": torch.ones(2)}, {"x": torch.ones(2)}, FisherFacts("true", 1, 0))
    with pytest.raises(FtlabError, match="another model"):
        EWC(model, EWCConfig(1.0, [str(other)]))


def test_fingerprints_tell_tasks_apart(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", tiny_llama()), saved(tmp_path / "b", tiny_llama(), seed=1)
    model = tiny_llama()
    prints = {EWC(model, EWCConfig(1.0, sources)).fingerprint() for sources in ([a], [b], [a, b], [a])}
    assert len(prints) == 3


def test_the_optimum_on_a_quadratic_is_the_closed_form(tmp_path: Path) -> None:
    """min 1/2 a |w - t|^2 + s/2 F |w - w*|^2 lies at (a t + s F w*) / (a + s F)."""
    model = tiny_llama()
    name = NAMES[0]
    anchor = model.get_parameter(name).detach().clone()
    generator = torch.Generator().manual_seed(3)
    fisher = torch.rand(anchor.shape, generator=generator).to(torch.bfloat16).float()
    target = torch.randn(anchor.shape, generator=generator)
    folder = tmp_path / "task"
    folder.mkdir()
    save_fisher(folder / FILE, {name: fisher}, {name: anchor}, FisherFacts("true", 1, 0))
    penalty = EWC(model, EWCConfig(2.0, [str(folder)]))
    weight = model.get_parameter(name)
    optimizer = torch.optim.LBFGS([weight], lr=1.0, max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * 1.5 * (weight - target).square().sum() + penalty.value(model)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)  # type: ignore[arg-type]
    expected = (1.5 * target + 2.0 * fisher * anchor) / (1.5 + 2.0 * fisher)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-4)


# --- its simpler relatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FullConfig(), LoRAConfig(rank=3, alpha=6.0)])
def test_l1_sp_and_l2(method: FullConfig | LoRAConfig) -> None:
    model = tiny_llama()
    make_method(method).apply(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalties = build_penalties(RegularizerConfig(l1_sp=L1SPConfig(0.3), l2=L2Config(0.2)), model)
    assert [penalty.name for penalty in penalties] == ["l1_sp", "l2"]
    assert penalties[0].value(model).item() == 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves = lora_leaves(model)
    l1 = (
        sum(leaf.delta_weight().abs().sum() for leaf in leaves.values())
        if leaves
        else sum((p - start[name]).abs().sum() for name, p in trained.items())
    )
    l2 = sum(p.square().sum() for p in trained.values())
    for penalty, expected in zip(penalties, (0.3 * l1, 0.2 * l2), strict=True):
        value = penalty.value(model)
        torch.testing.assert_close(value, expected)
        ours = torch.autograd.grad(value, list(trained.values()))
        theirs = torch.autograd.grad(expected, list(trained.values()))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- runs -------------------------------------------------------------------------------------------------------------


def run(folder: Path, *words: str) -> dict[str, Tensor]:
    fixed = ["+experiment=full_tiny", "evaluation=none", "tracking=disabled", "training.preflight=false"]
    assert train(*compose([*fixed, "training.max_steps=8", f"run_dir={folder}", *words])) == 0
    from safetensors.torch import load_file

    (file,) = [*folder.glob("model/model.safetensors"), *folder.glob("adapter/adapter_model.safetensors")]
    return load_file(file)


def effective(folder: Path) -> dict[str, Tensor]:
    return dict(open_run(folder, base=False).plain().state_dict())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_from_one_run_to_the_next(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tmp_path / "first"
    run(first, f"method={method}")
    words = [f"method={method}", "regularizer=ewc", f"regularizer.ewc.source=[{first}]", "training.seed=1"]
    with pytest.raises(ConfigError, match=r"python -m ftlab\.fisher"):
        compose(["+experiment=full_tiny", *words])
    assert command.main([f"run={first}", "examples=8"]) == 0
    assert "written to" in capsys.readouterr().out
    fisher, _, facts = read_fisher(first / FILE)
    assert facts.examples == 8
    assert any(bool((values > 0).any()) for values in fisher.values())
    plain = run(tmp_path / "plain", f"method={method}", "training.seed=1")
    zero = run(tmp_path / "zero", *words, "regularizer.ewc.strength=0")
    assert all(torch.equal(plain[name], zero[name]) for name in plain), "strength 0 is bitwise the run without it"
    run(tmp_path / "held", *words, "regularizer.ewc.strength=1e6")
    lines = [json.loads(line) for line in (tmp_path / "held" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert all("penalty/ewc" in line for line in lines if line["split"] == "train")
    _, anchors, _ = read_fisher(first / FILE)
    away = {
        name: sum(float((ends[key] - anchors[key]).square().mul(fisher[key]).sum()) for key in fisher)
        for name, ends in (("plain", effective(tmp_path / "plain")), ("held", effective(tmp_path / "held")))
    }
    assert away["held"] < 0.5 * away["plain"], "held, a run ends nearer to where the first one ended"
    assert command.main([f"run={tmp_path / 'held'}", "examples=4", "decay=0.5"]) == 0
    assert read_fisher(tmp_path / "held" / FILE)[2].tasks == 2


def test_the_anchor_of_a_run_in_bf16_is_not_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLAB_BF16", "always")
    first, words = tmp_path / "first", ["method=lora", "precision=bf16", "optimizer.lr=1e-2", "training.max_steps=3"]
    run(first, *words)
    assert command.main([f"run={first}", "examples=8"]) == 0
    _, anchors, _ = read_fisher(first / FILE)
    leaves = lora_leaves(open_run(first, base=False).model)
    assert anchors.keys() == {f"{name}.weight" for name in leaves}
    for name, leaf in leaves.items():
        assert leaf.weight.dtype == torch.bfloat16
        ended = leaf.weight.float() + leaf.scale * (leaf.lora_B @ leaf.lora_A)
        torch.testing.assert_close(anchors[f"{name}.weight"], ended, rtol=1e-6, atol=1e-8)
        assert not torch.equal(ended, ended.bfloat16().float())
    ewc = [f"regularizer.ewc.source=[{first}]", "regularizer.ewc.strength=1e3", "data.split_seed=3"]
    ewc += [f"method.start_from={first / 'adapter'}", "tracking.log_every_steps=1"]
    run(tmp_path / "second", *words, *ewc)
    lines = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text("utf-8").splitlines()]
    values = [line["penalty/ewc"] for line in lines if line["split"] == "train"]
    assert abs(values[0]) < 1e-4 * max(values), "a run that goes on begins where it is held to"


def test_online_ewc_keeps_what_only_an_earlier_run_moved(tmp_path: Path) -> None:
    """Only the newest run is named afterwards, so its file must hold what it left alone."""
    first, then = tmp_path / "first", tmp_path / "then"
    short = ["training.max_steps=2", "evaluation.generate=false"]
    run(first, *short, "method=full")
    assert command.main([f"run={first}", "examples=2"]) == 0
    run(then, *short, "method=lora", "regularizer=ewc", f"regularizer.ewc.source=[{first}]", "training.seed=1")
    assert command.main([f"run={then}", "examples=2"]) == 0
    moved, ends, _ = read_fisher(then / FILE)
    assert command.main([f"run={then}", "examples=2", "decay=0.25"]) == 0
    earlier, first_ends, _ = read_fisher(first / FILE)
    both, anchors, facts = read_fisher(then / FILE)
    assert facts.tasks == 2
    assert both.keys() == earlier.keys() > moved.keys(), "full fine-tuning moves more than LoRA adapts"
    base = open_run(then, base=True).model
    for name in earlier.keys() - moved.keys():
        assert torch.equal(both[name], 0.25 * earlier[name]), "a power of 2: nothing is rounded"
        assert torch.equal(anchors[name], base.get_parameter(name)), "where this run's model has it"
        assert not torch.equal(anchors[name], first_ends[name])
    for name, values in moved.items():
        expected = values.float() + 0.25 * earlier[name].float()
        torch.testing.assert_close(both[name].float(), expected, rtol=2**-7, atol=0)
        assert torch.equal(anchors[name], ends[name])


def test_online_ewc_refuses_another_model(tmp_path: Path) -> None:
    save_fisher(tmp_path / FILE, {"x": torch.ones(2)}, {"x": torch.ones(2)}, FisherFacts("true", 1, 0))
    with pytest.raises(FtlabError, match=r"another model \(x \[2\] is not here\)"):
        command._with_earlier({}, 0.5, [str(tmp_path)], tiny_llama())


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["kind=exact"], "give true or empirical"),
        (["examples=0"], "examples"),
        (["decay=2"], "above 0 and up to 1"),
        (["decay=0.5"], "held to no earlier task"),
        (["seed=-1"], "seed=-1: give a whole number from 0 to 9223372036854775807"),
        (["seed=100000000000000000000"], "seed=100000000000000000000: give a whole number from 0"),
        (["example=3"], "example"),
    ],
)
def test_the_command_refuses(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words == ["decay=0.5"]:
        run(tmp_path / "run", "regularizer.ewc.strength=0", "regularizer.ewc.source=[absent]")  # held to nothing
    assert command.main([f"run={tmp_path / 'run'}", *words]) != 0
    assert complaint in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"run"}


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no earlier run"):
        compose(["+experiment=full_tiny", "regularizer=ewc"])
    with pytest.raises(ConfigError, match="not a run folder"):
        compose(["+experiment=full_tiny", "regularizer=ewc", f"regularizer.ewc.source=[{tmp_path}]"])
