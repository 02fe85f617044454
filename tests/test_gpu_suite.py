"""The suite of measurements on a GPU: its records, its table, its driver, and all of it in Triton's interpreter."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.gpu_scripts import SCRIPTS, SECTIONS, module

ROOT = Path(__file__).parent.parent


def suite(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command, in the interpreter."""
    words = ["bash", str(SCRIPTS / "gpu_suite.sh"), "--smoke", "--out", str(out), *arguments]
    inherited = {name: value for name, value in os.environ.items() if name not in ("OUT", "TRITON_INTERPRET")}
    everything = {**inherited, "PYTHON": sys.executable, **environment}
    return subprocess.run(words, env=everything, cwd=out.parent, capture_output=True, text=True, check=False)


def record(out: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / f"{name}.json").read_text("utf-8"))
    return content


# --- records and the table --------------------------------------------------------------------------------------------


def test_without_a_record_the_table_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = module("gpu_table")
    assert table.page(table.load(tmp_path)) == "Not yet measured on a GPU.\n"
    (tmp_path / "lora.json").write_text("{ broken", "utf-8")
    assert table.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out == table.NOT_MEASURED


def a_record(section: str, **more: Any) -> dict[str, Any]:
    head = {"format": 1, "name": "gpu_suite", "section": section, "status": "finished", "smoke": False, "seconds": 12.3}
    origin = {"commit": "0123456789abcdef", "dirty": False, "packages": {"torch": "2.11.0", "triton": "3.6.0"}}
    device = {"device": {"kind": "cuda", "name": "NVIDIA H100"}, "limits": {"copy_bytes_per_second": 3.02e12}}
    return {**head, **origin, **device, "items": {}, "verdicts": [], "errors": {}, "skipped": {}, **more}


def test_the_table_shows_times_steps_failures_and_verdicts(tmp_path: Path) -> None:
    table, goals, records = module("gpu_table"), module("gpu.goals"), module("gpu.records")
    times = {"median": 0.8, "p20": 0.79, "p80": 0.82, "rounds": 30}
    item = {
        "times": {
            "ours": {"wall": times, "graph": times},
            "PEFT": {"wall": times, "graph": None},
            "x": {"error": "e|f"},
        },
        "ratios": {"PEFT / ours": {"median": 1.45}},
    }
    judged = goals.verdicts("lora", {"G1b 4096x4096": 1.45, "G1a 4096x4096": 0.2}, 3.02e12, 790e12, {"G3a": "no time"})
    steps = {
        "ftlab, triton": {"tokens_per_second": 15600.0, "mfu": 0.533, "peak_bytes": 50 << 30},
        "HF": {"error": "full"},
    }
    tests = {"counts": {"passed": 9, "failed": 1}, "collected": 10, "failed": {"test_a.py::test_b[bf16]": "a is wrong"}}
    found = [
        a_record("correctness", items={"tests": tests, "same bits": {"operations": {"rope": "results [1] differ"}}}),
        a_record("lora", items={"linear": item}, verdicts=judged, errors={"mlp": "Traceback\nValueError: no"}),
        a_record(
            "end_to_end", items={"llama 8B": {"contestants": steps}}, status="timed out", problem="stopped after 120 s"
        ),
    ]
    for each in found:
        records.write(tmp_path / f"{each['section']}.json", each)
    text = table.page(table.load(tmp_path))
    assert "NVIDIA H100; torch 2.11.0, triton 3.6.0; commit 0123456789." in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert ["lora: linear", "PEFT", "-", "0.8 (0.79 to 0.82)", "1.45"] in rows
    assert ["lora: linear", "x: e/f", "-", "-", "-"] in rows
    assert ["llama 8B", "ftlab, triton", "15,600", "53.3 %", "50.0"] in rows
    assert ["end_to_end", "timed out", "stopped after 120 s", "12.3"] in rows
    assert "Tests on the device: 1 failed, 9 passed of 10." in text
    assert "- failed: test_a.py::test_b[bf16]: a is wrong" in text
    assert "- not the same bits twice: rope: results [1] differ" in text
    verdict_of = {row[0]: row[2:5] for row in rows if row[0].startswith("G")}
    assert verdict_of["G1b 4096x4096"] == ["met", "1.45", ">= 1.4"]
    assert verdict_of["G1a 4096x4096"] == ["MISSED", "0.2", "<= 0.16"]
    assert verdict_of["G3a"][0] == "no time"
    assert "Goals: 1 met, 1 missed, 15 without a verdict." in text
    widths = {len(line) for line in text.splitlines() if line.startswith("| G")}
    assert len(widths) == 1, "aligned as text"


def test_numbers_that_are_not_finite_do_not_break_a_record() -> None:
    section = module("gpu.section")
    assert section.plain({"a": [float("nan"), float("inf"), 1.5], 2: (True, None)}) == {
        "a": [None, None, 1.5],
        "2": [True, None],
    }


def test_tests_are_counted_by_outcome_file_and_dtype() -> None:
    correctness = module("gpu.correctness")
    lines = [
        {"kind": "collected", "count": 5},
        {"kind": "test", "name": "t/test_a.py::test_x[1-bfloat16]", "outcome": "passed", "seconds": 2.0, "why": None},
        {"kind": "test", "name": "t/test_a.py::test_x[1-float16]", "outcome": "failed", "seconds": 1.0, "why": "wrong"},
        {"kind": "test", "name": "t/test_b.py::test_y", "outcome": "skipped", "seconds": 0.0, "why": None},
    ]
    found = correctness.summarize(lines)
    assert (found["collected"], found["ran"]) == (5, 3)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["by_dtype"] == {"float16": {"failed": 1}, "bfloat16": {"passed": 1}}
    assert found["by_file"]["test_a.py"] == {"passed": 1, "failed": 1}
    assert found["failed"] == {"t/test_a.py::test_x[1-float16]": "wrong"}
    assert next(iter(found["slowest"])).endswith("bfloat16]")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 0),
        ({"status": "timed out"}, 1),
        ({"items": {}}, 1),
        ({"items": {"tests": {"exit": 1, "failed": {"a": "wrong"}}}}, 1),
        ({"verdicts": [{"met": False}]}, 1),
        ({"verdicts": [{"met": None}, {"met": True}]}, 0),
    ],
)
def test_the_exit_status_says_whether_it_is_correct(change: dict[str, Any], status: int) -> None:
    driver = module("gpu_suite")
    right = a_record("correctness", items={"tests": {"exit": 0, "failed": {}}}) | change
    assert driver.exit_status({"correctness": right}) == status
    slow = a_record("lora", verdicts=[{"met": False}])
    assert driver.exit_status({"correctness": right, "lora": slow}) == status, "a missed goal is no failure"
    broken = a_record("lora", status="failed")
    assert driver.exit_status({"correctness": right, "lora": broken}) == (status or 3)
    assert driver.exit_status({"lora": broken}) == 3


# --- the driver -------------------------------------------------------------------------------------------------------

FAKE = """
    import json, pathlib, sys, time
    words = sys.argv[1:]
    name, out = words[words.index("--section") + 1], pathlib.Path(words[words.index("--out") + 1])
    print("began", name, flush=True)
    if name == "device":
        raise RuntimeError("this section is broken")
    content = {"name": "gpu_suite", "section": name, "status": "running", "items": {"first": {}}, "verdicts": []}
    (out / f"{name}.json").write_text(json.dumps(content))
    if name == "lora":
        time.sleep(60)
    (out / f"{name}.json").write_text(json.dumps({**content, "status": "finished"}))
"""


def test_a_section_that_fails_or_hangs_leaves_a_record_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    driver = module("gpu_suite")
    fakes, out = tmp_path / "scripts", tmp_path / "out"
    fakes.mkdir()
    (fakes / "gpu_suite.py").write_text(textwrap.dedent(FAKE), "utf-8")
    monkeypatch.setattr(driver, "SCRIPTS", fakes)
    status = driver.main(["--out", str(out), "--only", "device", "lora", "adamw", "--limit", "lora=2"])
    assert status == 3
    broken, hanging, fine = (record(out, name) for name in ("device", "lora", "adamw"))
    assert (broken["status"], broken["problem"]) == ("failed", "ended with status 1")
    assert broken["output"][-1] == "RuntimeError: this section is broken"
    assert (hanging["status"], hanging["problem"]) == ("timed out", "stopped after 2 s")
    assert hanging["items"] == {"first": {}}, "what was measured before stays"
    assert fine["status"] == "finished"
    shown = capfd.readouterr().out
    assert "began adamw" in shown, "the sections' output is shown"
    assert "| device  | failed" in shown
    assert (out / "table.md").read_text("utf-8") in shown
    # A second call measures what did not finish, and only that.
    capfd.readouterr()
    driver.main(["--out", str(out), "--only", "device", "adamw"])
    said = capfd.readouterr()
    assert "adamw: measured already" in said.err
    assert "began device" in said.out
    driver.main(["--out", str(out), "--only", "adamw", "--again"])
    assert "began adamw" in capfd.readouterr().out


def test_mistakes_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    driver = module("gpu_suite")
    for words in (["--only", "loar"], ["--limit", "loar=3"], ["--limit", "lora"], ["--limit", "lora=x"]):
        with pytest.raises(SystemExit) as stopped:
            driver.main([*words, "--out", str(tmp_path)])
        assert stopped.value.code == 2
    capsys.readouterr()


def test_the_driver_imports_neither_torch_nor_the_kernels() -> None:
    code = "import sys; sys.path.insert(0, 'scripts'); import gpu_suite; "
    code += "sys.exit(any(name.split('.')[0] in ('torch', 'triton', 'ftlab', 'ftlab_kernels') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_a_machine_for_measurements_lacks_is_not_needed() -> None:
    """Neither hydra nor wandb, nor what reads GGUF: the sections and the kernels' tests import without them."""
    code = """
        import importlib.abc, sys
        MISSING = {"hydra", "omegaconf", "antlr4", "wandb", "gguf", "rouge_score", "sacrebleu", "matplotlib"}
        MISSING |= {"peft", "transformers", "accelerate", "liger_kernel", "bitsandbytes", "rich", "huggingface_hub"}
        class Absent(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in MISSING:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] in MISSING else real(name, *more)
        sys.path[:0] = [".", "kernels", "scripts"]
        import gpu.pytest_lines
        from gpu import adamw, correctness, device, end_to_end, head, lora, pointwise
        import tests.conftest, tests.helpers.training, tests.kernels.harness
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        **{"cwd": ROOT, "env": {**os.environ, "TRITON_INTERPRET": "1"}, "capture_output": True, "text": True},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# --- for real ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Every section, by the real command."""
    out = tmp_path_factory.mktemp("measured") / "out"
    return out, suite(out)


def test_every_section_runs_without_an_error(measured: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = measured
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(path.name for path in out.iterdir()) == sorted([*(f"{n}.json" for n in SECTIONS), "table.md"])
    for name in SECTIONS:
        content = record(out, name)
        assert (content["status"], content["errors"], content["skipped"]) == ("finished", {}, {}), name
        assert content["smoke"] is True
        assert {line["met"] for line in content["verdicts"]} <= {None}, "a smoke run judges nothing"
    assert done.stdout.endswith((out / "table.md").read_text("utf-8") + "\n")
    assert "SMOKE RUN, its figures mean nothing" in done.stdout


def contestants(out: Path, section: str, item: str) -> dict[str, Any]:
    times: dict[str, Any] = record(out, section)["items"][item]["times"]
    return times


@pytest.mark.parametrize(
    ("section", "item", "names"),
    [
        ("device", "tricks 48x32", ["mm", "mm, K + 16", "addmm, out=summand", "linear, fwd+bwd"]),
        ("lora", "linear 4096x4096", ["frozen", "ours", "ours, cublas", "ours, triton", "ours, augmented", "PEFT"]),
        ("lora", "compiled 4096x4096", ["ours", "torch.compile(PEFT)"]),
        ("lora", "p=0", ["frozen", "ours", "PEFT", "Unsloth-style"]),
        ("lora", "mlp", ["ours", "Unsloth-style", "PEFT + HF"]),
        ("adamw", "fp32", ["ours", "torch fused"]),
        ("adamw", "fp32, L2-SP, clip", ["ours", "foreach + clip + fused"]),
        ("adamw", "448 LoRA tensors", ["ours", "clip_grad_norm_ + fused"]),
        ("adamw", "bf16, split", ["ours", "torch fused fp32 + cast"]),
        ("adamw", "bf16, 8-bit states", ["ours"]),
        ("head", "frozen", ["ours", "torch"]),
        ("head", "half ignored", ["all", "half"]),
        ("head", "compiled", ["torch.compile"]),
        ("pointwise", "add_rms_norm", ["ours", "torch", "torch.compile"]),
        ("pointwise", "swiglu", ["ours", "torch", "torch.compile"]),
        ("pointwise", "rope", ["ours", "torch", "torch.compile"]),
        ("pointwise", "attention", ["ours", "one call a document"]),
    ],
)
def test_every_contestant_ran(
    measured: tuple[Path, subprocess.CompletedProcess[str]], section: str, item: str, names: list[str]
) -> None:
    times = contestants(measured[0], section, item)
    for name in names:
        assert "error" not in times[name], times[name]
        assert times[name]["wall"]["median"] == statistics.median(times[name]["rounds"]["wall"]) > 0


def test_training_steps_of_every_contestant(measured: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    items = record(measured[0], "end_to_end")["items"]
    for name in ("tiny, p=0.0, rows", "tiny, p=0.1, documents", "tiny, p=0.0, rows, compiled"):
        found = items[name]["contestants"]
        ran = {who for who, entry in found.items() if "tokens_per_second" in entry}
        assert "ftlab, triton" in ran, found
        assert ran >= {"HF + PEFT, compiled"} if "compiled" in name else {"ftlab, reference"}, found
        losses = [entry["loss"] for who, entry in found.items() if who in ran and who.startswith("ftlab")]
        assert all(abs(loss - 4.1) < 0.5 for loss in losses), "about log 61"
        taken = items[name]["ftlab"]["kernels"]["triton"]
        assert set(taken["lora_linears"]) == {"triton"}, "nothing was left to torch"
    assert "HF + PEFT, eager SDPA" in items["tiny, p=0.0, rows"]["contestants"]
    assert "error" not in items["tiny, p=0.0, rows"]["contestants"]["HF + PEFT, eager SDPA"]


def test_memory_bits_and_masks(measured: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = measured
    kept = record(out, "lora")["items"]["memory 4096x4096"]["kept_bytes"]
    rows, columns, rank = 24, 64, 16
    assert kept["ours, p=0"] == 2 * rows * rank, "s in bf16"
    assert kept["ours"] == rows * columns / 8 + 2 * rows * rank, "and a bit an element"
    assert kept["PEFT"] == 4 * rows * columns + 2 * rows * rank, "the dropped x, a mask of its dtype on a CPU, and A x"
    correctness = record(out, "correctness")["items"]
    assert set(correctness["same bits"]["operations"].values()) == {"equal"}
    assert set(correctness["same masks"]["differing"].values()) == {0}
    assert correctness["tests"]["counts"]["passed"] == correctness["tests"]["collected"] > 3


def test_finished_sections_are_left_out_of_a_second_run(
    measured: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = measured
    before = {name: (out / f"{name}.json").read_bytes() for name in SECTIONS}
    again = suite(out)
    assert again.returncode == 0
    assert [line for line in again.stderr.splitlines() if "measured already" not in line] == []
    assert {name: (out / f"{name}.json").read_bytes() for name in SECTIONS} == before


def test_only_one_section(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = suite(out, "--only", "device", FTLAB_COMMIT="abc")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["device.json", "table.md"]


def test_without_a_gpu_the_real_run_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "out"
    words = ["bash", str(SCRIPTS / "gpu_suite.sh"), "--out", str(out), "--only", "device"]
    done = subprocess.run(
        words, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    content = record(out, "device")
    assert content["status"] == "failed"
    assert "torch sees no GPU here" in content["output"][-1]


def test_the_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    records = module("gpu.records")

    def absent(*words: str) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(records, "_git", absent)
    monkeypatch.setenv("FTLAB_COMMIT", "0123abc")
    assert records.commit() == {"commit": "0123abc", "dirty": None}
    monkeypatch.delenv("FTLAB_COMMIT")
    assert records.commit() == {"commit": None, "dirty": None}
