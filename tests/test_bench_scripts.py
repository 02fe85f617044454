"""The comparison with other trainers and between revisions: what their figures mean, and that both run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    return load("bench_peers")


@pytest.fixture(scope="module")
def part(peers: ModuleType) -> Callable[[str], ModuleType]:
    """The other files that the comparison is made of, by name; it makes them importable."""
    return importlib.import_module


@pytest.fixture(scope="module")
def common(part: Callable[[str], ModuleType]) -> ModuleType:
    return part("peers_common")


@pytest.fixture(scope="module")
def losses() -> ModuleType:
    return load("loss_compare")


def a_run(contestant: str, speed: float, peak: int, held_out: float = 2.0, **more: Any) -> dict[str, Any]:
    return {
        "contestant": contestant,
        "tokens_per_second": speed,
        "peak_rss": peak,
        "train_loss": 2.5,
        "held_out_loss": held_out,
        **more,
    }


# --- what the figures mean -------------------------------------------------------------------------------------------


def test_the_tail_weighs_steps_by_their_supervised_tokens(common: ModuleType) -> None:
    assert common.tail_loss([9.0] * 6 + [1.0, 4.0], [5] * 6 + [30, 10]) == pytest.approx((30 * 1 + 10 * 4) / 40)
    assert common.tail_loss([9.0, 2.0], [5, 7]) == 2.0, "fewer than four steps: the last one"


def test_every_contestant_runs_first_in_one_repeat(common: ModuleType) -> None:
    orders = [common.order(["a", "b", "c"], repeat) for repeat in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_the_summary_is_of_medians_against_the_best_peer_of_each_column(common: ModuleType) -> None:
    runs = [
        a_run("hf-fp32", 100.0, 400, 2.0),
        a_run("hf-bf16", 200.0, 800, 2.2),
        a_run("ftlab-bf16", 10.0, 9000, 2.1),
        a_run("ftlab-bf16", 300.0, 200, 2.1),
        a_run("ftlab-bf16", 400.0, 100, 2.1),
    ]
    summary = common.summarize(runs)
    assert list(summary) == ["hf-fp32", "hf-bf16", "ftlab-bf16"]
    ours = summary["ftlab-bf16"]
    assert (ours["tokens_per_second"], ours["peak_rss"]) == (300.0, 200)
    assert (ours["tokens_per_second_low"], ours["tokens_per_second_high"]) == (10.0, 400.0)
    assert ours["speed_ratio"] == pytest.approx(300 / 200)
    assert ours["memory_ratio"] == pytest.approx(200 / 400)
    assert ours["held_out_difference"] == pytest.approx(0.1)
    assert summary["hf-bf16"]["speed_ratio"] == 1.0
    assert summary["hf-fp32"]["speed_ratio"] == 0.5


def test_without_a_peer_there_is_no_ratio(common: ModuleType) -> None:
    summary = common.summarize([a_run("ftlab-fp32", 100.0, 400)])
    assert summary["ftlab-fp32"]["speed_ratio"] is None
    assert common.table(summary).splitlines()[1].split() == [
        "ftlab-fp32",
        *("100.0", "100.0", "100.0"),
        "-",
        "0.00",
        "-",
        "2.5000",
        "2.0000",
        "-",
    ]


def test_the_table_has_a_line_a_contestant(common: ModuleType) -> None:
    runs = [a_run("hf-fp32", 100.0, 2 << 30), a_run("ftlab-fp32", 1234.5, 1 << 30, 1.9)]
    head, hf, ftlab = common.table(common.summarize(runs)).splitlines()
    assert len(head) == len(hf) == len(ftlab), "columns are aligned"
    assert hf.split() == ["hf-fp32", "100.0", "100.0", "100.0", "1.00", "2.00", "1.00", "2.5000", "2.0000", "+0.0000"]
    assert ftlab.split() == ["ftlab-fp32", *["1234.5"] * 3, "12.35", "1.00", "0.50", "2.5000", "1.9000", "-0.1000"]


def test_agreement_compares_the_fp32_runs_step_by_step(common: ModuleType) -> None:
    hf, ftlab = a_run("hf-fp32", 1.0, 1, losses=[3.0, 2.0]), a_run("ftlab-fp32", 1.0, 1, losses=[3.0, 2.5])
    assert common.agreement([hf, ftlab]) == 0.5
    other = a_run("torchtune-fp32", 1.0, 1, losses=[3.75, 2.0])
    assert common.agreement([hf, ftlab, other]) == 0.75, "the two that lie furthest apart"
    assert common.agreement([hf, a_run("ftlab-bf16", 1.0, 1, losses=[3.0, 2.5])]) is None


STEPS = {
    "times": [100.0, 102.0, 104.0],
    "losses": [3.0, 2.0, 1.0],
    "tokens": [50, 60, 40],
    "supervised": [5, 6, 4],
    "peak_rss": 7,
}


def test_speed_leaves_the_first_step_out(common: ModuleType) -> None:
    found = common.figures(STEPS, {"tokens": [50, 60, 40], "supervised": [5, 6, 4]})
    assert found["tokens_per_second"] == pytest.approx((60 + 40) / 4.0)
    assert (found["tokens"], found["seconds"], found["steps"], found["train_loss"]) == (100, 4.0, 3, 1.0)


@pytest.mark.parametrize(
    "expected", [{"tokens": [60, 50, 40], "supervised": [5, 6, 4]}, {"tokens": [], "supervised": []}]
)
def test_a_run_over_other_examples_is_refused(common: ModuleType, expected: dict[str, list[int]]) -> None:
    with pytest.raises(common.BenchError, match="prepared examples"):
        common.figures(STEPS, expected)


def test_a_step_without_a_loss_is_refused(common: ModuleType) -> None:
    with pytest.raises(common.BenchError, match="3 batches, 3 steps and 2 losses"):
        common.figures({**STEPS, "losses": [3.0, 2.0]}, {"tokens": [50, 60, 40], "supervised": [5, 6, 4]})


def test_steps_are_noted_as_the_figures_want_them(common: ModuleType, tmp_path: Path) -> None:
    steps = common.Steps()
    for rows in (ROWS[:2], ROWS[2:]):
        steps.seen(rows)
        steps.ended()
        steps.losses.append(1.0)
    steps.write(tmp_path)
    read = json.loads((tmp_path / common.STEPS).read_text())
    assert (read["tokens"], read["supervised"], read["losses"]) == ([5, 2], [3, 1], [1.0, 1.0])
    assert read["times"] == sorted(read["times"])
    assert read["peak_rss"] > 1 << 20
    assert common.figures({**read, "times": [1.0, 2.0]}, common.step_sizes(ROWS, 2))["tokens_per_second"] == 2.0


def test_a_run_folder_is_read_step_by_step(part: Callable[[str], ModuleType], tmp_path: Path) -> None:
    lines = [
        {"step": step, "split": "train", "time": time, "loss": loss, "tokens": tokens, "supervised_tokens": learnt}
        | {"memory_bytes": memory}
        for step, time, loss, tokens, learnt, memory in [(1, 100.0, 3.0, 50, 5, 6), (2, 102.0, 2.0, 110, 11, 7)]
    ]
    lines.insert(1, {"step": 1, "split": "validation", "time": 101.0, "loss": 9.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert part("peers_ftlab").read_ftlab(tmp_path) == {
        "times": [100.0, 102.0],
        "losses": [3.0, 2.0],
        "tokens": [50, 60],
        "supervised": [5, 6],
        "peak_rss": 7,
    }


ROWS = [
    {"ids": [1, 2, 3], "labels": [-100, 2, 3]},
    {"ids": [4, 5], "labels": [4, 5]},
    {"ids": [6, 7], "labels": [-100, 7]},
]


def test_steps_count_no_padding_and_no_first_token(common: ModuleType) -> None:
    assert common.step_sizes(ROWS, 2) == {"tokens": [5, 2], "supervised": [3, 1]}


def test_batches_are_padded_on_the_right_and_padding_is_not_learnt(part: Callable[[str], ModuleType]) -> None:
    batch = {name: tensor.tolist() for name, tensor in part("peers_hf").padded(ROWS[:2], 0).items()}
    assert batch == {
        "input_ids": [[1, 2, 3], [4, 5, 0]],
        "labels": [[-100, 2, 3], [4, 5, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }


# --- adapters of other trainers ---------------------------------------------------------------------------------------


def an_adapter(layers: int = 2, hidden: int = 12, key_rows: int = 4, rank: int = 3) -> dict[str, torch.Tensor]:
    """LoRA in PEFT's layout: heads of 4, three of queries and one of keys."""
    rows = {"self_attn.q_proj": hidden, "self_attn.k_proj": key_rows, "self_attn.v_proj": key_rows}
    rows |= {"self_attn.o_proj": hidden, "mlp.gate_proj": 20, "mlp.up_proj": 20, "mlp.down_proj": hidden}
    state = {}
    for layer in range(layers):
        for module, out in rows.items():
            name = f"base_model.model.model.layers.{layer}.{module}.lora"
            inside = 20 if module == "mlp.down_proj" else hidden
            for matrix, shape in (("A", (rank, inside)), ("B", (out, rank))):
                state[f"{name}_{matrix}.weight"] = torch.randn(
                    shape, generator=torch.Generator().manual_seed(len(state))
                )
    return state


def test_an_adapter_goes_to_litgpt_and_back(part: Callable[[str], ModuleType]) -> None:
    adapters, state = part("peers_adapters"), an_adapter()
    there = adapters.peft_to_litgpt(state)
    joined = there["transformer.h.1.attn.qkv.lora_B"]
    assert len(there) == 2 * 5 * 2
    assert torch.equal(joined[12:16], state["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"])
    assert torch.equal(
        there["transformer.h.0.mlp.fc_2.lora_A"], state["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    )
    back = adapters.litgpt_to_peft(there, like=state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_torchtune_has_the_rows_of_a_head_in_pairs(part: Callable[[str], ModuleType]) -> None:
    state = an_adapter()
    there = part("peers_adapters").peft_to_torchtune(state, head_dim=4)
    assert len(there) == len(state)
    query = state["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    order = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]  # rotated together: i and i + 2 there, 2 i and 2 i + 1 here
    assert torch.equal(there["layers.1.attn.q_proj.lora_b.weight"], query[order])
    for theirs, ours in (
        ("layers.1.attn.q_proj.lora_a", "layers.1.self_attn.q_proj.lora_A"),
        ("layers.1.attn.v_proj.lora_b", "layers.1.self_attn.v_proj.lora_B"),
        ("layers.0.mlp.w2.lora_b", "layers.0.mlp.down_proj.lora_B"),
    ):
        assert torch.equal(there[f"{theirs}.weight"], state[f"base_model.model.model.{ours}.weight"])


# --- the record and the command --------------------------------------------------------------------------------------


def test_every_key_of_the_record_is_explained(peers: ModuleType, common: ModuleType) -> None:
    runs = [a_run("hf-fp32", 100.0, 400, losses=[1.0]), a_run("ftlab-fp32", 100.0, 400, losses=[1.25])]
    facts = {"machine": {}, "packages": {}, "guest_packages": {}, "data": {}, "model": "m"}
    content = peers.record(peers.Settings(dropout=0.0), facts, runs, peers.beginning())
    assert json.loads(json.dumps(content)) == content
    assert content["largest_fp32_loss_difference"] == 0.25
    assert peers.record(peers.Settings(), facts, runs, {})["largest_fp32_loss_difference"] is None
    found = common.figures(STEPS, {"tokens": [50, 60, 40], "supervised": [5, 6, 4]})
    explained = (ROOT / "docs" / "results" / "README.md").read_text("utf-8")
    missing = [key for key in {**content, **found, **content["summary"]["hf-fp32"]} if f"`{key}`" not in explained]
    assert not missing


def test_a_record_of_several_rounds_has_their_spread_in_the_pages(common: ModuleType) -> None:
    script = load("readme_results")
    speeds = {"hf-fp32": [100.0, 120.0, 90.0], "torchtune-bf16": [50.0, 45.0, 60.0]}
    runs = [a_run(n, speed, 1 << 30, repeat=i) for n, found in speeds.items() for i, speed in enumerate(found)]
    device = {"kind": "cpu", "name": "Some CPU", "threads": 2, "memory_bytes": 4 << 30}
    record = {"command": "python x.py", "commit": "0123456789ab", "device": device, "runs": runs}
    record |= {"summary": common.summarize(runs), "guest_packages": {"torchtune": {"torch": "2", "torchtune": "0.6"}}}
    lines = script.peers_table(record).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "| torchtune-bf16 | 0.50 | 0.45 to 0.60 | 1.00 | 2.000 |" in lines
    assert lines[-1].endswith("on Some CPU, 2 threads, 4 GiB, torchtune 0.6; 3 rounds.")
    single = script.peers_table({**record, "runs": runs[::3]}).splitlines()
    assert "lowest to highest" not in single[0]
    assert "| torchtune-bf16 | 0.50 | 1.00 | 2.000 |" in single


def test_missing_packages_are_named_in_one_line(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else object())
    assert peers.main([]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "peft missing" in error
    assert "transformers" not in error


@pytest.mark.parametrize(
    "words",
    [
        *(["--examples", "15"], ["--repeats", "0"], ["--dropout", "1"], ["--out", "nowhere/x.json"]),
        *(["--only", "hf"], ["--only", "litgpt-bf16"], ["--wait-idle", "-1"], ["--torchtune-python", "nowhere/python"]),
        ["--examples", "20", "--torchtune-python", sys.executable],
    ],
)
def test_a_mistake_is_refused_at_once(peers: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        peers.main(words)
    assert refusal.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_other_trainers_take_part_where_their_python_is_given(peers: ModuleType) -> None:
    def names(*words: str) -> list[str]:
        return [name.partition("-")[0] for name in peers.parse(words).names]

    assert set(names()) == {"hf", "ftlab"}
    assert set(names("--litgpt-python", sys.executable)) == {"hf", "litgpt", "ftlab"}
    assert names("--litgpt-python", sys.executable, "--only", "ftlab-bf16", "litgpt-bf16") == ["litgpt", "ftlab"]
    link = Path(sys.executable)
    assert peers.parse(["--litgpt-python", str(link)]).pythons == {"litgpt": link}, "a link stays one"


def test_a_python_without_the_trainer_is_one_line(peers: ModuleType, common: ModuleType) -> None:
    with pytest.raises(common.BenchError, match=r"^--torchtune-python .*No package metadata.*torchtune"):
        peers.guest_packages("torchtune", sys.executable)


def test_waiting_ends_when_the_machine_is_idle_or_the_time_is_up(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, loads = [100.0], iter([2.0, 1.0, 0.2])
    monkeypatch.setattr(peers.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(peers.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(peers.os, "getloadavg", lambda: (next(loads), 9.0, 9.0))
    assert peers.wait_idle(60.0) == 4.0
    monkeypatch.setattr(peers.os, "getloadavg", lambda: (2.0, 0.0, 0.0))
    assert peers.wait_idle(5.0) == 5.0
    assert peers.wait_idle(0.0) == 0.0


def test_a_failed_child_is_one_line(peers: ModuleType, common: ModuleType, tmp_path: Path) -> None:
    code = "import sys; print('first'); sys.exit('the last words')"
    with pytest.raises(common.BenchError, match=r"^hf-fp32-0 ended with status 1: the last words$"):
        peers.start([sys.executable, "-c", code], tmp_path, peers.Settings(), "hf-fp32-0")


def test_the_parent_stays_small() -> None:
    code = (
        "import runpy, sys; runpy.run_path('scripts/bench_peers.py'); "
        "print(sorted({'torch', 'numpy', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_both_frameworks_learn_the_same(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    command = [
        sys.executable,
        "scripts/bench_peers.py",
        "--tiny",
        "--examples",
        "24",
        "--held-out",
        "8",
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [*command, "--dropout", "0", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert len(content["runs"]) == 5
    assert content["largest_fp32_loss_difference"] < 1e-5
    summary = content["summary"]
    assert summary["ftlab-fp32"]["held_out_loss"] == pytest.approx(summary["hf-fp32"]["held_out_loss"], abs=1e-5)
    assert all(row["tokens_per_second"] > 0 and row["peak_rss"] > 1 << 26 for row in summary.values())
    losses = next(run["losses"] for run in content["runs"] if run["contestant"] == "ftlab-fp32")
    assert losses[-1] < losses[0]


# --- two revisions ---------------------------------------------------------------------------------------------------


def test_the_first_difference_is_found_bit_by_bit(losses: ModuleType) -> None:
    assert losses.first_difference([1.0, 2.0, math.nan], [1.0, 2.0, math.nan]) is None
    assert losses.first_difference([1.0, 2.0, 3.0], [1.0, math.nextafter(2.0, 3.0), 9.0]) == 1
    assert losses.first_difference([1.0, 2.0], [1.0]) == 1
    assert losses.first_difference([math.nan], [1.0]) == 0


def test_an_unknown_revision_is_one_line(losses: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert losses.main(["no-such-revision", "HEAD"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no-such-revision" in error


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of this code with three commits: as it is, with another comment, with another learning rate."""
    folder = tmp_path / "repository"
    for name in ("ftlab", "conf", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    experiment = folder / "conf" / "experiment" / "full_tiny.yaml"
    text = experiment.read_text("utf-8")

    def commit(content: str, tag: str) -> None:
        experiment.write_text(content, "utf-8")
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        for words in (["add", "."], [*identity, "commit", "-q", "-m", tag], ["tag", tag]):
            subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)

    subprocess.run(["git", "init", "-q"], cwd=folder, check=True, capture_output=True)
    commit(text, "base")
    commit(text + "# a comment\n", "comment")
    commit(text + "optimizer:\n  lr: 2e-3\n", "rate")
    return folder


@pytest.mark.slow
def test_revisions_are_compared_by_their_losses(repository: Path) -> None:
    def verdict(*revisions: str) -> tuple[int, str]:
        command = [sys.executable, "scripts/loss_compare.py", *revisions]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = verdict("base", "comment")
    assert code == 0, said
    assert "equal bit for bit" in said
    code, said = verdict("base", "rate")
    assert code == 1, said
    assert "is that of step 2" in said, "the first step's loss is measured before the rate acts"
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    assert len(worktrees.stdout.splitlines()) == 1
