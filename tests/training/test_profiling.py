"""The profile of a run: files, table, report, and no effect on what is learnt."""

from __future__ import annotations

import gzip
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlab.compose import compose
from ftlab.evaluation.measure import Measured, Measurer
from ftlab.session import train
from ftlab.studies.report import write_report
from ftlab.training import loop
from ftlab.training.profiling import OperatorTime, StepProfiler, Window, heaviest, table, window

WORDS = [
    *("+experiment=full_tiny", "method=lora", "method.dropout=0.1", "evaluation=none", "tracking=disabled"),
    *(
        "evaluation.times=0",
        "training.preflight=false",
        "data.limit_train=32",
        "data.batch_size=2",
        "data.micro_batch_size=2",
    ),
]


def run(folder: Path, *extra: str) -> dict[str, torch.Tensor]:
    assert train(*compose([*WORDS, f"run_dir={folder}", *extra])) == 0
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_profiled_run(tmp_path: Path) -> None:
    steps = "training.max_steps=8"
    plain = run(tmp_path / "plain", steps)
    profiled = run(tmp_path / "profiled", steps, "tracking.profile=true")
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)
    assert not (tmp_path / "plain" / "profile").exists()
    folder = tmp_path / "profiled" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["top.txt", "trace.json.gz"]
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    rows = json.loads((tmp_path / "profiled" / "run.json").read_text("utf-8"))["profile"]
    assert len(rows) == 20
    assert rows[0]["milliseconds"] == max(row["milliseconds"] for row in rows) > 0
    assert 0 < sum(row["share"] for row in rows) <= 1
    assert rows[0]["operator"] in (tmp_path / "profiled" / "report.html").read_text("utf-8")
    assert rows[0]["operator"][:48] in (folder / "top.txt").read_text("utf-8")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_too_short_for_the_whole_window_is_profiled_all_the_same(steps: int, tmp_path: Path) -> None:
    run(tmp_path, f"training.max_steps={steps}", "tracking.profile=true")
    assert (tmp_path / "profile" / "trace.json.gz").exists()


def test_the_window_begins_with_the_fourth_step_and_fits_into_the_run() -> None:
    assert window(100) == Window(2, 1, 4)
    assert [window(steps) for steps in (1, 2, 3, 4, 5)] == [
        Window(0, 0, 1),
        Window(0, 1, 1),
        Window(1, 1, 1),
        Window(2, 1, 1),
        Window(2, 1, 2),
    ]


@pytest.mark.parametrize(
    "steps, validated, expected",
    [
        (309, {154, 309}, (4, 7)),
        (100, {7}, (4, 7)),  # after the last recorded step nothing is recorded
        (100, {3}, (5, 8)),
        (10, {5, 10}, (7, 10)),
        (8, {4, 8}, (6, 8)),
        (100, set(range(2, 100, 2)), (4, 4)),
        (6, set(range(1, 7)), (4, 6)),  # no step without one: they are recorded too
    ],
)
def test_no_validation_lies_in_the_window(steps: int, validated: set[int], expected: tuple[int, int]) -> None:
    found = window(steps, validated)
    first = found.wait + found.warmup + 1
    assert (first, first + found.active - 1) == expected


@pytest.mark.parametrize("broken", [False, True], ids=["as it is", "a window that knows no validations"])
def test_no_operator_of_a_validation_is_recorded(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Measurer.measure

    def marked(*arguments: Any, **named: Any) -> Measured:
        torch.special.bessel_j0(torch.ones(1))  # which no training step does
        return own(*arguments, **named)

    monkeypatch.setattr(Measurer, "measure", marked)
    if broken:
        monkeypatch.setattr("ftlab.session.window", lambda steps, validated: window(steps))
    run(tmp_path, "training.max_steps=10", "evaluation.times=2", "tracking.profile=true")
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("aten::_fused_adamw_") == 4
    assert ("aten::special_bessel_j0" in names) == broken


def test_an_interruption_inside_the_window_leaves_what_was_seen(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path / "profile", torch.device("cpu"), window(100))

    def interrupted() -> None:
        with profiler:
            for step in range(5):
                torch.ones(3) @ torch.ones(3)
                profiler.on_step(step, None, ())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["top.txt", "trace.json.gz"]
    assert profiler.rows


@pytest.mark.parametrize("last, seen", [(1, False), (5, True)], ids=["before the window", "inside it"])
def test_a_run_stopped_and_resumed_ends_as_the_undisturbed_one(
    last: int, seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["training.max_steps=12", "tracking.profile=true"]
    undisturbed = run(tmp_path / "undisturbed", "training.max_steps=12")
    own, steps = loop.train_step, iter(range(1, 100))

    def stopped(*arguments: Any, **named: Any) -> loop.StepResult:
        result = own(*arguments, **named)
        if next(steps) == last:
            signal.raise_signal(signal.SIGTERM)
        return result

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", stopped)
        assert train(*compose([*WORDS, f"run_dir={folder}", *words])) == 128 + signal.SIGTERM
    left = sorted(path.name for path in folder.glob("profile/*"))
    assert left == (["top.txt", "trace.json.gz"] if seen else [])
    assert ("profile" in json.loads((folder / "run.json").read_text("utf-8"))) == seen
    resumed = run(folder, *words)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert len(json.loads((folder / "run.json").read_text("utf-8"))["profile"]) == 20


def test_a_profile_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    tmp_path.joinpath("profile").write_text("in the way")
    run(tmp_path, "training.max_steps=5", "tracking.profile=true")
    record = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert record["status"] == "finished"
    assert [line for line in record["warnings"] if line.startswith("the profile could not be written: ")]
    assert len(record["profile"]) == 20


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table() -> None:
    text = table([OperatorTime("aten::mm", 12.5, 0.5, 3)])
    assert [line.split() for line in text.splitlines()] == [
        ["operator", "ms", "share", "calls"],
        ["aten::mm", "12.50", "50.0%", "3"],
    ]
    text = table([OperatorTime("aten::mm", 12.5, 0.5, 3, 7.25)])
    assert [line.split() for line in text.splitlines()] == [
        ["operator", "ms", "GPU", "ms", "share", "calls"],
        ["aten::mm", "12.50", "7.25", "50.0%", "3"],
    ]


def average(key: str, cpu: float, gpu: float, *, kernel: bool = False, mark: bool = False) -> SimpleNamespace:
    """A row of the profiler's averages; times in microseconds."""
    where = torch.autograd.DeviceType.CUDA if kernel else torch.autograd.DeviceType.CPU
    times = {"self_cpu_time_total": cpu, "self_device_time_total": gpu}
    return SimpleNamespace(key=key, count=2, device_type=where, is_user_annotation=mark, **times)


ON_GPU = [
    average("ProfilerStep*", 500, 0, mark=True),
    average("ProfilerStep*", 0, 900, kernel=True, mark=True),
    average("aten::mm", 100, 3000),
    average("aten::add", 700, 1000),
    average("gemm_kernel", 0, 3000, kernel=True),
    average("add_kernel", 0, 1000, kernel=True),
    average("launched_by_no_operator", 0, 4000, kernel=True),
]


def test_on_a_gpu_operators_are_ranked_by_its_time_and_kernels_are_counted_once() -> None:
    assert heaviest(ON_GPU, torch.device("cuda")) == [
        OperatorTime("aten::mm", 0.1, 3 / 8, 2, 3.0),
        OperatorTime("aten::add", 0.7, 1 / 8, 2, 1.0),
    ]


def test_on_a_cpu_they_are_ranked_by_the_cpus_time() -> None:
    rows = [row for row in ON_GPU if row.device_type == torch.autograd.DeviceType.CPU]
    assert heaviest(rows, torch.device("cpu")) == [
        OperatorTime("aten::add", 0.7, 700 / 800, 2),
        OperatorTime("aten::mm", 0.1, 100 / 800, 2),
    ]


def test_the_report_shows_the_gpus_time_where_there_is_one(tmp_path: Path) -> None:
    run(tmp_path, "training.max_steps=1")
    record = json.loads((tmp_path / "run.json").read_text("utf-8"))
    for device, heads in ((None, ["ms", "share", "calls"]), (7.25, ["ms", "GPU ms", "share", "calls"])):
        row = {"operator": "aten::mm", "milliseconds": 12.5, "share": 0.5, "calls": 3000, "device_milliseconds": device}
        (tmp_path / "run.json").write_text(json.dumps({**record, "profile": [row]}), "utf-8")
        page = write_report(tmp_path).read_text("utf-8")
        assert "".join(f'<th class="number">{head}</th>' for head in heads) in page
        assert '<td class="number">50.0 %</td><td class="number">3,000</td>' in page
        assert ('<td class="number">7.25</td>' in page) == (device is not None)
