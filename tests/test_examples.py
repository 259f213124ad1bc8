"""The digits examples: the matcher learns, and what is exported of it, the layer or the whole, predicts the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HERE, WHOLE = EXAMPLES / "01_digits", EXAMPLES / "02_model"


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


@pytest.mark.slow
def test_the_whole_matchers_readme_runs_and_its_predictions_are_pytorchs(tmp_path: Path) -> None:
    """In this process without torch, and through a server."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = ""
    for command in "".join(re.findall(r"```sh\n(.*?)```", readme(), flags=re.DOTALL)).strip().splitlines():
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed += done.stdout
    found = re.findall(r"equal predictions\s+(\d+) of (\d+)\n.*\ntorch was imported +no", printed)
    assert found == [("900", "900")] * 2
    assert re.search(r"rtx-fp16\.engine .*\n.* fused|rtx-fp16\.engine .* fused", printed)
    committed_is_what_the_script_writes(tmp_path / "build" / "02_model")


def readme() -> str:
    return (WHOLE / "README.md").read_text(encoding="utf-8")


def committed_is_what_the_script_writes(made: Path) -> None:
    for name in ("few.npz", "many.npz", "held_out.npz"):
        with np.load(WHOLE / name) as committed, np.load(made / name) as new:
            assert set(committed) == set(new)
            for key in committed:
                np.testing.assert_allclose(committed[key], new[key], rtol=0, atol=1e-4, err_msg=f"{name}: {key}")
