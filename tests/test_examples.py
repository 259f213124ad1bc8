"""The digits example: it learns, and the exported layer predicts the same."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "examples" / "01_digits"


def run_example(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_training_reaches_the_accuracy_and_shuffled_context_is_chance(tmp_path: Path) -> None:
    printed = run_example(str(HERE / "train.py"), "--out", str(tmp_path), "--seed", "1")
    figures = dict(re.findall(r"^\s*(.+?)\s+(\d\.\d+)$", printed, flags=re.MULTILINE))
    assert float(figures["held-out accuracy"]) >= 0.82
    assert 0.43 <= float(figures["context shuffled"]) <= 0.57
    assert {path.name for path in tmp_path.iterdir()} >= {"matcher.safetensors", "sample.npz"}


@pytest.mark.slow
def test_the_exported_layer_predicts_what_pytorch_predicts(tmp_path: Path) -> None:
    printed = run_example(str(HERE / "run.py"), "--work", str(tmp_path))
    equal, total = re.search(r"equal predictions\s+(\d+) of (\d+)", printed).groups()  # type: ignore[union-attr]
    assert equal == total
    assert int(total) >= 400
