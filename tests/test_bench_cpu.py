"""The benchmark of the CPU path runs in its small form, and its record has every part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_small_form_leaves_a_whole_record(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    command = [sys.executable, str(ROOT / "scripts/bench_cpu.py"), "--tiny", "--repeats", "1", "--rounds", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text("utf-8"))
    assert {"add_rms_norm", "rope", "swiglu", "causal_attention", "nf4_dequantise"} <= record["operations"].keys()
    assert set(record["steps"]) == {"torch", "native", "native+prefix", "upper", "upper+cache"}
    assert all(row["ratio"] > 0 for row in record["steps"].values())
