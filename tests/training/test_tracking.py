from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftlab.config import TrackingConfig
from ftlab.errors import FtlabError
from ftlab.training import tracking
from ftlab.training.tracking import Tracker, read_metrics
from ftlab.training.wandb_mirror import Rows, follow

DISABLED = TrackingConfig(mode="disabled")
OFFLINE = TrackingConfig(mode="offline", project="trial", tags=["a", "b"])


def disabled(run_dir: Path, resume_step: int | None = None, enabled: bool = True) -> Tracker:
    return Tracker(run_dir, DISABLED, {}, "name", resume_step, enabled)


def steps(run_dir: Path, split: str = "train") -> list[int]:
    return [line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if line["split"] == split]


# --- metrics.jsonl -------------------------------------------------------------------------------------------------


def test_lines_are_there_at_once_and_non_finite_numbers_survive(tmp_path: Path) -> None:
    tracker = disabled(tmp_path)
    tracker.log(10, "train", {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "digest": "a\nb"})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    assert text.count("\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse)["loss"] == "nan"
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(line["loss"])
    assert (line["grad_norm"], line["low"], line["digest"]) == (math.inf, -math.inf, "a\nb")
    assert abs(line["time"] - time.time()) < 60
    tracker.sync()
    tracker.finish("finished")
    tracker.finish("finished")
    assert tracker.mirror_status() == ""


def test_a_step_cannot_repeat_within_a_split(tmp_path: Path) -> None:
    tracker = disabled(tmp_path)
    tracker.log(5, "train", {"loss": 1.0})
    tracker.log(5, "validation", {"loss": 1.0})
    for step in (5, 4):
        with pytest.raises(ValueError, match="after those of step 5"):
            tracker.log(step, "train", {"loss": 2.0})
    tracker.finish("finished")


def test_resume_removes_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    tracker = disabled(tmp_path)
    for step in (1, 2, 3, 4):
        tracker.log(step, "train", {"loss": float(step)})
    tracker.log(4, "validation", {"loss": 0.5})
    tracker.finish("interrupted")
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 2, "split": "tra')
    resumed = disabled(tmp_path, resume_step=2)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    resumed.log(2, "train", {"loss": 99.0})  # logged again on the way back in: already there
    resumed.log(2, "validation", {"loss": 0.7})  # not there yet
    resumed.log(3, "train", {"loss": 3.0})
    resumed.finish("finished")
    assert steps(tmp_path) == [1, 2, 3]
    assert steps(tmp_path, "validation") == [2]
    assert [line["loss"] for line in read_metrics(path)] == [1.0, 2.0, 0.7, 3.0]


def test_a_fresh_start_leaves_nothing_of_an_older_run(tmp_path: Path) -> None:
    first = disabled(tmp_path)
    first.log(0, "validation", {"loss": 1.0})
    first.finish("failed")
    disabled(tmp_path, resume_step=None).finish("finished")
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert read_metrics(tmp_path / "missing.jsonl") == []


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, OFFLINE, {}, "name", None, enabled=False)
    tracker.log(1, "train", {"loss": 1.0})
    tracker.sync()
    tracker.finish("finished")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs the device /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    tracker = disabled(tmp_path)
    assert tracker._file is not None
    tracker._file.close()
    tracker._file = open("/dev/full", "a", buffering=1)  # noqa: PTH123, SIM115
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        tracker.log(1, "train", {"loss": 1.0})
    tracker.finish("failed")  # closing would write the buffered line again; it must not raise
    with pytest.raises(FtlabError, match="cannot be written"):
        disabled(tmp_path / "missing")


# --- the rows of the mirror ----------------------------------------------------------------------------------------


def merged(lines: list[tuple[int, str, float]], after: int = -1) -> tuple[list[tuple[int, dict[str, Any]]], list[Any]]:
    sent: list[tuple[int, dict[str, Any]]] = []
    late: list[Any] = []
    rows = Rows(lambda step, row: sent.append((step, row)), late.append, after)
    for step, split, loss in lines:
        rows.add({"step": step, "split": split, "time": 1.0, "loss": loss})
    rows.flush()
    rows.flush()
    assert rows.sent == len(sent)
    return sent, late


def test_rows_merge_splits_and_only_rise() -> None:
    lines = [(0, "validation", 3.0), (5, "train", 2.0), (5, "validation", 2.5), (10, "train", 1.0), (5, "test", 0.5)]
    sent, late = merged(lines)
    assert sent == [
        (0, {"step": 0, "validation/loss": 3.0}),
        (5, {"step": 5, "train/loss": 2.0, "validation/loss": 2.5}),
        (10, {"step": 10, "train/loss": 1.0}),
    ]
    assert late == [{"test/loss": 0.5}]
    assert [step for step, _ in merged(lines, after=5)[0]] == [10]


def test_following_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": "nan"}\n{"step": 2, "lo')
    polls: list[int] = []

    def ended() -> bool:
        polls.append(1)
        if len(polls) == 3:
            with path.open("a") as file:
                file.write('ss": 5}\n{"step": 3')
        return len(polls) >= 3

    lines = list(follow(path, ended))
    assert [line["step"] for line in lines] == [1, 2]
    assert math.isnan(lines[0]["loss"])
    assert list(follow(tmp_path / "missing", lambda: True)) == []


def test_the_mirror_does_not_load_torch() -> None:
    code = "import sys, ftlab.training.wandb_mirror; assert not {'torch', 'wandb', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_mirror_of_an_earlier_start_leaves_the_run_alone(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    task = {"mode": "offline", "start": "second", "parent": os.getpid()}
    (tmp_path / "wandb" / "mirror.json").write_text(json.dumps(task))
    command = [sys.executable, "-m", "ftlab.training.wandb_mirror", str(tmp_path), "first"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "started again" in done.stdout
    assert not list((tmp_path / "wandb").glob("offline-run-*"))


# --- the mirror as a process ---------------------------------------------------------------------------------------


def script(path: Path, body: str) -> list[str]:
    path.write_text(textwrap.dedent(body))
    return [sys.executable, str(path)]


def test_a_mirror_that_hangs_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.5)
    command = script(tmp_path / "hang.py", "import time; time.sleep(600)")
    tracker = Tracker(tmp_path, OFFLINE, {}, "name", None, True, command)
    tracker.log(1, "train", {"loss": 1.0})
    assert tracker.mirror_status() == ""
    begin = time.monotonic()
    tracker.finish("finished")
    assert 0.4 < time.monotonic() - begin < 5
    assert "still busy" in tracker.mirror_status()
    begin = time.monotonic()
    tracker.finish("finished")  # does not wait again
    assert time.monotonic() - begin < 0.2
    assert tracker._mirror is not None
    tracker._mirror.kill()
    tracker._mirror.wait()


def test_the_end_waits_ten_seconds_at_most() -> None:
    assert tracking.FINISH_SECONDS <= 10


def test_a_mirror_that_crashes_is_one_line_in_the_summary(tmp_path: Path) -> None:
    command = script(tmp_path / "crash.py", "raise SystemExit('no such server')")
    tracker = Tracker(tmp_path, OFFLINE, {}, "name", None, True, command)
    tracker.log(1, "train", {"loss": 1.0})
    tracker.finish("finished")
    assert "failed (exit status 1)" in tracker.mirror_status()
    assert "no such server" in (tmp_path / "wandb.log").read_text()
    assert steps(tmp_path) == [1]


def test_a_mirror_that_cannot_start_is_one_line_in_the_summary(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, OFFLINE, {}, "name", None, True, [str(tmp_path / "missing")])
    tracker.log(1, "train", {"loss": 1.0})
    tracker.finish("finished")
    assert "could not be started" in tracker.mirror_status()


FAKE_WANDB = """
    import json, pathlib, types
    path = pathlib.Path(__file__).with_name("server.jsonl")
    rows = [json.loads(l) for l in path.read_text().splitlines()] if path.exists() else []
    def Settings(**options): return options
    class Run:
        resumed = bool(rows)
        step = rows[-1]["_step"] + 1 if rows else 0
        summary = {}
        def define_metric(self, name, step_metric): pass
        def log(self, row, step, commit):
            with path.open("a") as file:
                file.write(json.dumps({"_step": step, **row}) + "\\n")
        def finish(self, exit_code):
            path.with_name("exit").write_text(str(exit_code))
    def init(**options):
        path.with_name("init.json").write_text(json.dumps(options))
        return Run()
"""


def test_online_only_what_the_server_does_not_have_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, run_dir = tmp_path / "package", tmp_path / "run"
    package.mkdir()
    run_dir.mkdir()
    (package / "wandb.py").write_text(textwrap.dedent(FAKE_WANDB))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), *sys.path]))
    online = TrackingConfig(mode="online", entity="lab")
    first = Tracker(run_dir, online, {"seed": 1}, "name", None, True)
    for step in (1, 2, 3):
        first.log(step, "train", {"loss": float(step)})
    first.finish("interrupted")
    assert (package / "exit").read_text() == "1"
    second = Tracker(run_dir, online, {"seed": 1}, "name", 2, True)  # step 3 is done again
    for step in (3, 4):
        second.log(step, "train", {"loss": float(step)})
    second.finish("finished")
    assert second.mirror_status() == ""
    assert (package / "exit").read_text() == "0"
    sent = [json.loads(line) for line in (package / "server.jsonl").read_text().splitlines()]
    assert [row["_step"] for row in sent] == [1, 2, 3, 4]
    options = json.loads((package / "init.json").read_text())
    assert (options["mode"], options["resume"], options["entity"]) == ("online", "allow", "lab")
    assert options["config"] == {"seed": 1}
    assert options["id"] == (run_dir / "wandb_id").read_text().strip()


def records(path: Path) -> list[Any]:
    """Every record of a .wandb file: a LevelDB log (32 KiB blocks; crc32, length, type) after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    data, place, message, found = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is too short for a header
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            found.append(record)
            message = b""
    return found


def history(path: Path) -> list[dict[str, Any]]:
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            rows.append({**items, "_step": record.history.step.num})
    return rows


PARENT = """
    import os, signal, sys, time
    from pathlib import Path
    from ftlab.config import TrackingConfig
    from ftlab.training.tracking import Tracker
    tracker = Tracker(Path(sys.argv[1]), TrackingConfig(project="trial"), {"seed": 7}, "killed", None, True)
    for step in (10, 20, 30):
        tracker.log(step, "train", {"loss": 1.0 / step})
        tracker.log(step, "validation", {"loss": 2.0 / step})
    print(tracker._mirror.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("at_once", [False, True], ids=["later", "at once"])
def test_offline_after_a_kill_the_last_segment_has_every_step_once(tmp_path: Path, at_once: bool) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    killed = subprocess.run(
        [*script(tmp_path / "parent.py", PARENT), str(run_dir)], stdout=subprocess.PIPE, check=False, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    run_id = (run_dir / "wandb_id").read_text()
    if not at_once:  # otherwise the next start comes while the orphaned mirror may still be busy
        deadline = time.monotonic() + 60
        while psutil.pid_exists(int(killed.stdout)) and time.monotonic() < deadline:
            time.sleep(0.1)
        (orphaned,) = (run_dir / "wandb").glob("offline-run-*")
        # The orphan saw that its parent was gone, and wrote what there was.
        assert [row["_step"] for row in history(next(orphaned.glob("*.wandb")))] == [10, 20, 30]
    tracker = Tracker(run_dir, OFFLINE, {"seed": 7, "data": {"name": "hpo"}}, "resumed", 20, True)
    for step in (30, 40):
        tracker.log(step, "train", {"loss": 1.0 / step, "grad_norm": math.nan})
    tracker.log(40, "test", {"exact_match": 25.0})
    tracker.log(30, "other", {"loss": 9.0})
    begin = time.monotonic()
    tracker.finish("finished")
    assert time.monotonic() - begin < 11
    assert tracker.mirror_status() == ""
    assert tracker._mirror is not None
    assert tracker._mirror.wait(60) == 0
    assert (run_dir / "wandb_id").read_text() == run_id

    (segment,) = (run_dir / "wandb").glob("offline-run-*")
    if not at_once:
        assert len(list((run_dir / "wandb" / "superseded").glob("offline-run-*"))) == 1
    found = records(next(segment.glob("*.wandb")))
    (run,) = (r.run for r in found if r.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.display_name) == (run_id.strip(), "trial", "resumed")
    assert list(run.tags) == ["a", "b"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["data"] == {"name": "hpo"}
    rows = history(next(segment.glob("*.wandb")))
    assert [row["_step"] for row in rows] == [10, 20, 30, 40]
    assert rows[0]["train/loss"] == 0.1
    assert rows[0]["validation/loss"] == 0.2
    assert "validation/loss" not in rows[2]
    assert rows[3]["test/exact_match"] == 25.0
    assert not any(r.WhichOneof("record_type") == "stats" for r in found)
    assert not (segment / "files" / "requirements.txt").exists()
