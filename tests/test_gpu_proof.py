"""`make gpu-proof`: nothing where there is no GPU; where there is one, a report that says what failed."""

import importlib.util
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FINDINGS: list[dict[str, Any]] = [
    {"name": "TensorRT", "ok": True, "found": "11.4.0", "enables": "", "fix": ""},
    {"name": "CUDA driver", "ok": True, "found": "580.95.05", "enables": "", "fix": ""},
    {"name": "GPU 0", "ok": True, "found": "NVIDIA L4, sm89", "enables": "", "fix": ""},
]


@pytest.fixture
def proof(repository: Path) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_proof", repository / "benchmarks" / "gpu_proof.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_proof"] = module  # its dataclass asks for it
    spec.loader.exec_module(module)
    return module


def with_a_gpu(monkeypatch: pytest.MonkeyPatch, proof: ModuleType, tests: tuple[int, str], benchmark: tuple[int, str]) -> None:
    """The commands end with these codes and outputs."""
    ends = {proof.DOCTOR: (0, json.dumps(FINDINGS)), proof.TESTS: tests, proof.BENCHMARK: benchmark}

    def python(arguments: tuple[str, ...], check: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, ends[arguments][0], stdout=ends[arguments][1])

    monkeypatch.setattr(proof, "python", python)


def test_without_a_gpu_nothing_is_written(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("raise ImportError", encoding="utf-8")  # on a machine with a GPU as well
    script, out = repository / "benchmarks" / "gpu_proof.py", tmp_path / "new" / "proof.md"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script, "--out", out], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "no GPU here, so nothing to prove and nothing written: nvidia-ml-py is not installed; run: pip install nvidia-ml-py; "
        "run it on a machine with one\n"
    )
    assert not out.parent.exists()


def test_the_report_holds_the_gpu_the_date_and_both_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proof: ModuleType
) -> None:
    with_a_gpu(monkeypatch, proof, (0, "24 passed in 60.00s\n"), (0, "scratch 12 MB\n"))
    out = tmp_path / "build" / "proof.md"
    assert proof.main(["--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert text.startswith(f"# GPU proof\n\n{datetime.now(UTC):%Y-}")
    assert " UTC, NVIDIA L4, sm89\n" in text
    assert "- TensorRT: 11.4.0\n" in text
    assert ": passed\n\n```text\n24 passed in 60.00s\n```\n" in text
    assert "## python benchmarks/engines.py: passed\n\n```text\nscratch 12 MB\n```\n" in text


@pytest.mark.parametrize(
    ("tests", "benchmark", "failed"),
    [
        ((1, "1 failed, 23 passed"), (0, ""), "-m pytest -m gpu"),
        ((0, "24 skipped"), (0, ""), "-m pytest -m gpu"),  # the library is not there, say
        ((0, "24 passed"), (1, "Traceback"), "benchmarks/engines.py"),
    ],
)
def test_what_failed_is_reported_and_ends_in_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    proof: ModuleType,
    tests: tuple[int, str],
    benchmark: tuple[int, str],
    failed: str,
) -> None:
    with_a_gpu(monkeypatch, proof, tests, benchmark)
    assert proof.main(["--out", str(tmp_path / "proof.md")]) == 1
    (line,) = [line for line in (tmp_path / "proof.md").read_text().splitlines() if "FAILED" in line]
    assert failed in line


def test_make_runs_it(repository: Path) -> None:
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.ready", "gpu-proof"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ".venv/bin/python benchmarks/gpu_proof.py"
