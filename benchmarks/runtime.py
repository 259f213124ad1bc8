"""Measure the C++ runtime beside the bare ONNX Runtime C API and the Python session; build runtime/ first, as `make test` does.

python benchmarks/runtime.py [--rounds 5] [--threads 2] [--json FILE]

Prints what the session costs over the C API at 1x64x64 (the demo bundle, whose model takes little time itself; one thread, call
by call in turn in one process), how long the demo bundle takes to open, the size of the stripped library, 8 threads x 1,000
calls of mixed shapes, and the latency of the C++ and the Python session at 1x512x512, one process each, in turn. Medians over
the rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from attention import make_bundle

import bca_deploy
from bca_deploy.timing.inputs import padded_inputs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support import native  # noqa: E402  (where runtime/ is built)

DEMO = ROOT / "build" / "demo"
RUNS = 300
SIZES = {"batch": 1, "x_len": 512, "context_len": 512}


def python_p50_ms(bundle: Path, threads: int, sample: Path) -> float:
    """In this process: what `bca-run --bench` does."""
    with np.load(sample) as arrays:
        feeds = dict(arrays)
    with bca_deploy.open(bundle, "onnxruntime-cpu", threads=threads) as session:
        outputs = session.run(feeds)
        times_ms = []
        for number in range(RUNS + 3):
            start = time.perf_counter()
            session.run_into(feeds, outputs)
            if number >= 3:
                times_ms.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times_ms)


def cpp_p50_ms(release: Path, bundle: Path, threads: int, sample: Path) -> float:
    command: list[str | Path] = [release / "bca-run", bundle, "--input", sample, "--bench", "--repeat", str(RUNS)]
    shown: dict[str, Any] = json.loads(native.passed([*command, "--threads", str(threads), "--backend", "onnxruntime-cpu"]))
    return float(shown["p50_ms"])


def python_in_own_process(bundle: Path, threads: int, sample: Path) -> float:
    command = [sys.executable, __file__, "--python", str(bundle), str(sample), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def median_of(rounds: int, measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(rounds))


def latencies(release: Path, rounds: int, threads: int) -> dict[str, float]:
    bundle = make_bundle()
    with tempfile.TemporaryDirectory() as directory, bca_deploy.open(bundle) as session:
        sample = Path(directory) / "sample.npz"
        np.savez(sample, **padded_inputs(session.manifest.signature, SIZES))  # type: ignore[arg-type]
        pairs = [
            (cpp_p50_ms(release, bundle, threads, sample), python_in_own_process(bundle, threads, sample))
            for _ in range(rounds)
        ]
    return {"cpp_p50_ms": statistics.median(cpp for cpp, _ in pairs), "python_p50_ms": statistics.median(py for _, py in pairs)}


def overhead_us(release: Path, rounds: int) -> dict[str, float]:
    command: list[str | Path] = [release / "tests" / "overhead", DEMO, "1x64x64", str(10 * RUNS)]
    shown = [json.loads(native.passed(command)) for _ in range(rounds)]
    over = {
        f"{way}_over_bare_us": statistics.median(s[f"{way}_us"] - s["bare_us"] for s in shown) for way in ("run_into", "run")
    }
    return over | {"bare_us": statistics.median(s["bare_us"] for s in shown)}


def open_ms(release: Path) -> float:
    shown = native.passed([release / "bca-run", DEMO, "--bench", "--repeat", "1", "--shape", "1x2x2"])
    return float(json.loads(shown)["open_ms"])


def stripped_bytes(release: Path) -> int:
    with tempfile.TemporaryDirectory() as directory:
        native.passed(["strip", "-o", Path(directory) / "stripped", release / "libbca_runtime.so"])
        return (Path(directory) / "stripped").stat().st_size


def measure(rounds: int, threads: int) -> dict[str, Any]:
    release = native.build("release")
    native.passed(["make", "demo", "READY=", f"BIN={Path(sys.executable).parent}"])
    threaded = native.passed([release / "tests" / "bca_tests", "--gtest_filter=Threads.EightTimes*"])
    return {
        **overhead_us(release, rounds),
        "open_ms": median_of(rounds, lambda: open_ms(release)),
        "stripped_bytes": stripped_bytes(release),
        "eight_threads": next(line for line in threaded.splitlines() if "OK" in line).split("] ")[1].strip(),
        **latencies(release, rounds, threads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", nargs=2, type=Path, metavar=("BUNDLE", "SAMPLE"), help="time the Python session, in ms")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.python:
        bundle, sample = options.python
        print(python_p50_ms(bundle, options.threads, sample))
        return
    results = measure(options.rounds, options.threads)
    for name, value in results.items():
        print(f"{name:>24}  {value:.2f}" if isinstance(value, float) else f"{name:>24}  {value}")
    print(f"{'C++ over Python':>24}  {results['cpp_p50_ms'] / results['python_p50_ms']:.3f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
