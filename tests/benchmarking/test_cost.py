"""benchmarks/cost.py: every stage of export and verify is there with its time and memory, and PyTorch's export beside them."""

import json
import subprocess
import sys
from pathlib import Path

from cost import Stages, total

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cost.py"


def test_a_stage_lasts_until_the_next_begins() -> None:
    stages = Stages()
    stages.stage("one")
    stages.steps(1, 2)
    stages.stage("two")
    stages.stage("one")
    stages.end()
    assert [row["stage"] for row in stages.rows] == ["one", "two", "one"]
    assert all(row["seconds"] >= 0 and row["peak_mb"] > 1 for row in stages.rows)


def test_all_is_the_sum_of_the_times_and_the_largest_memory() -> None:
    rows = [{"stage": "a", "seconds": 1.5, "peak_mb": 9.0}, {"stage": "b", "seconds": 2.0, "peak_mb": 4.0}]
    assert total(rows) == {"stage": "all", "seconds": 3.5, "peak_mb": 9.0}


def test_a_tiny_layer_is_measured_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--models", "tiny", "--json", tmp_path / "cost.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))
    stages = {step: [row["stage"] for row in rows] for step, rows in report["models"]["tiny"].items()}
    assert {"weights", "trace fp32", "parity fp32", "self-test"} <= set(stages["export"])
    assert len(stages["verify"]) > 1
    assert stages["torch"][-1] == "torch.onnx.export, verify=True"
    assert "| tiny | export | trace fp32 |" in done.stdout
    assert "| tiny | torch | all |" in done.stdout
