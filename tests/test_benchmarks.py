"""The training step's benchmark, as it runs where only JAX, Haiku and Optax are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small

ROOT = Path(__file__).parent.parent

WITHOUT = """
import runpy, sys
for package in ("ray", "tensorflow", "orbax", "rich", "lm_eval"):
    sys.modules[package] = None  # importing it raises
sys.argv[1:] = sys.argv[2:]
runpy.run_path("benchmarks/train_step.py", run_name="__main__")
"""


@pytest.mark.slow
def test_the_step_is_timed_without_packages_for_data_and_clusters(tmp_path: Path) -> None:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(small.KEYS))
    command = [sys.executable, "-c", WITHOUT, "-", "--config", str(file), "--steps", "2"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["tokens_per_second"] > 0 and measured["step_ms_min"] <= measured["step_ms"]
    assert measured["mfu"] is None and measured["peak_flops_per_device"] is None  # of a CPU
