"""benchmarks/chart.py: the picture holds the file's figures and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from bca_deploy.benchmarking.result import Measurement, Ratio, Result
from bca_deploy.timing.machine import machine

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chart.py"


@pytest.fixture
def result(tmp_path: Path) -> Path:
    def cell(contender: str, shape: tuple[int, ...], ms: float) -> Measurement:
        times = {"min_ms": ms, "p50_ms": ms, "p90_ms": ms, "p99_ms": ms}
        how = {"contender": contender, "shape": shape, "precision": "fp32", "threads": 2, "runs": 7, "interleaved": True}
        memory = {"peak_rss_mb": 1.0, "call_mb": 0.0, "pairs_per_s": 1.0}
        return Measurement(**how, **times, **memory, ratio=Ratio(median=1, low=1, high=1, rounds=7))  # type: ignore[arg-type]

    times = (("plain", 0.125), ("session", 0.0625))
    cells = [cell(who, shape, ms * shape[1]) for shape in ((1, 64, 64), (1, 512, 512), (8, 512, 512)) for who, ms in times]
    dims = ("batch", "x_len", "context_len")
    found = Result(model="layer", dims=dims, machine=machine(), backend="", measurements=tuple(cells), growth=(), left_out={})
    path = tmp_path / "result.json"
    path.write_text(found.model_dump_json(), encoding="utf-8")
    return path


@pytest.mark.parametrize(("more", "shown"), [((), ("64", "32")), (("--shape", "1x64x64"), ("8", "4"))])
def test_a_cell_becomes_a_bar_chart(result: Path, tmp_path: Path, more: tuple[str, ...], shown: tuple[str, str]) -> None:
    out = tmp_path / "chart.svg"
    subprocess.run([sys.executable, SCRIPT, result, "--out", out, *more], check=True)
    text = out.read_text(encoding="utf-8")
    assert "torch.onnx.export" in text
    for figure in shown:
        assert f">{figure}</text>" in text


def test_a_cell_that_was_not_measured_is_refused(result: Path, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, result, "--out", tmp_path / "chart.svg", "--shape", "1x2x3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no cell 1x2x3 in fp32 on 2 threads" in done.stderr
    assert not (tmp_path / "chart.svg").exists()
