"""The session's own figures: overhead over bare onnxruntime, opening, peak memory at long lengths, many pairs at once.

python benchmarks/session.py [--threads 2]

Each figure is measured in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from attention import make_bundle

from bca_deploy.timing.turns import in_turn

if TYPE_CHECKING:
    from bca_deploy import Session

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, object]


def medians_us(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    return [statistics.median(times) * 1e3 for times in in_turn(runs, rounds)]


def feeds_at(session: "Session", *shape: int) -> dict[str, np.ndarray]:
    from bca_deploy.timing.inputs import padded_inputs

    signature = session.manifest.signature
    return padded_inputs(signature, signature.dims.named(shape))


def overhead(bundle: str, threads: int) -> Row:
    """Over ``InferenceSession.run`` of the very session underneath: two in one process would spin against each other."""
    import bca_deploy
    from bca_deploy.session.backends.denormals import Flushed

    with bca_deploy.open(bundle, threads=threads) as session:
        feeds, bare, names = feeds_at(session, 1, 64, 64), session._backend._session, ["out", "context_out"]

        def flushed() -> object:
            with Flushed():
                return bare.run(names, feeds)

        found = medians_us([lambda: session(**feeds), lambda: bare.run(names, feeds), flushed], 3000)
    return dict(zip(("session_us", "bare_us", "bare_with_denormals_flushed_us"), found, strict=True))


OPEN = """
import time
start = time.perf_counter()
import bca_deploy, sys
bca_deploy.open(sys.argv[1])
seconds, torch_imported = time.perf_counter() - start, "torch" in sys.modules
import json
from bca_deploy.timing.memory import peak_rss_mb
print(json.dumps({"open_s": seconds, "peak_rss_mb": peak_rss_mb(), "torch_imported": torch_imported}))
"""


def opening(bundle: str, threads: int) -> Row:
    """Of the demo bundle, imports included: in a process that has imported nothing. The median of five."""
    command = [sys.executable, "-c", OPEN, bundle]
    rows = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(5)]
    found: Row = sorted(rows, key=lambda row: row["open_s"])[2]
    return found


def long_lengths(bundle: str, threads: int) -> Row:
    """Peak memory at 1x4096x4096 over that of the process with the session open and its inputs made."""
    import bca_deploy
    from bca_deploy.timing.memory import peak_rss_mb

    with bca_deploy.open(bundle, threads=threads) as session:
        before = peak_rss_mb()
        feeds = feeds_at(session, 1, 4096, 4096)
        session(**feeds)
        return {"over_the_open_session_mb": peak_rss_mb() - before, "peak_rss_mb": peak_rss_mb()}


def many(bundle: str, threads: int) -> Row:
    """``run_many`` against one by one, 64 pairs of each spread of lengths."""
    import bca_deploy

    found: Row = {}
    with bca_deploy.open(bundle, threads=threads) as session:
        for low, high, count in ((1, 32, 64), (16, 128, 64), (16, 512, 64), (1024, 1024, 3)):
            rng = np.random.default_rng(0)
            lengths = rng.integers(low, high + 1, size=(count, 2))
            pairs = [
                (rng.standard_normal((1, i, 512), np.float32), rng.standard_normal((1, j, 386), np.float32)) for i, j in lengths
            ]
            one_by_one, together = medians_us(
                [lambda p=pairs: [session(*pair) for pair in p], lambda p=pairs: session.run_many(p)], 20
            )
            found[f"{count} pairs of {low} to {high}"] = one_by_one / together
    return found


FIGURES: dict[str, Callable[[str, int], Row]] = {
    "overhead at 1x64x64": overhead,
    "opening": opening,
    "1x4096x4096": long_lengths,
    "run_many, times as fast as one by one": many,
}


def bundles() -> dict[str, str]:
    """Return the bundle of each figure: the default layer, the demo's, and one that takes long sequences."""
    export = [sys.executable, "-c", "from bca_deploy.cli import main_export; main_export()", "--force"]
    demo, long = ROOT / "build" / "bench-demo", ROOT / "build" / "bench-long"
    digits = ["--checkpoint", str(ROOT / "examples/01_digits/matcher.safetensors"), "--prefix", "fusion.", "--heads", "4"]
    lengths = ["--x-len", "1:512:4096", "--context-len", "1:512:4096"]
    for more in ([*digits, "--out", str(demo)], [*lengths, "--out", str(long)]):
        subprocess.run([*export, *more], check=True, stdout=subprocess.DEVNULL)
    return dict.fromkeys(FIGURES, str(make_bundle())) | {"opening": str(demo), "1x4096x4096": str(long)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--figure", nargs=2, metavar=("NAME", "BUNDLE"), help="measure this one here and print JSON")
    options = parser.parse_args()
    if options.figure:
        name, bundle = options.figure
        print(json.dumps(FIGURES[name](bundle, options.threads)))
        return
    for name, bundle in bundles().items():
        command = [sys.executable, __file__, "--threads", str(options.threads), "--figure", name, bundle]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(name)
        for key, value in json.loads(done.stdout.splitlines()[-1]).items():
            print(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")


if __name__ == "__main__":
    main()
