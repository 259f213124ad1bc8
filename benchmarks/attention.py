"""Time the default layer side by side: PyTorch three ways, the literal graph, the portable model, OpenVINO, the session.

python benchmarks/attention.py [--shapes 1x64x64 1x512x512 ...] [--threads 2] [--seconds 3] [--json FILE]

What `bca bench` does, for the layer of docs/benchmarks.md: fp32, dims 512/386, 8 heads of 64, both masks.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from bca_deploy.benchmarking.grid import Asked, parse_shapes
from bca_deploy.benchmarking.suite import bench
from bca_deploy.cli import console

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "build" / "bench"
SHAPES = ["1x64x64", "1x512x512", "1x2048x2048", "8x64x64", "8x512x512", "8x2048x2048"]


def make_bundle() -> Path:
    """Export the default layer."""
    command = [sys.executable, "-c", "from bca_deploy.cli import main_export; main_export()"]
    subprocess.run([*command, "--out", str(BUNDLE), "--force"], check=True, stdout=subprocess.DEVNULL)
    return BUNDLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--contenders", nargs="+", default=())
    parser.add_argument("--threads", nargs="+", type=int, default=())
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    asked = Asked(shapes=tuple(parse_shapes(options.shapes)), threads=tuple(options.threads), seconds=options.seconds)
    with console.progress() as shown:
        result = bench(make_bundle(), asked, options.contenders, progress=shown)
    console.show_bench(result, as_json=False)
    if options.json:
        options.json.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
