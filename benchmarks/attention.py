"""Time the default layer side by side: PyTorch three ways, the literal graph, the portable model, OpenVINO, the session.

python benchmarks/attention.py [--shapes 1x64x64 1x512x512 ...] [--threads 2] [--seconds 3] [--json FILE]

What `bca bench` does, for the layer of docs/benchmarks.md: fp32, dims 512/386, 8 heads of 64, both masks.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from bca_deploy.cli import console
from bca_deploy.cli.bench import bench, parse_shapes

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
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shapes, progress = parse_shapes(options.shapes), console.progress()
    with progress as shown:
        report = bench(
            make_bundle(), shapes, options.contenders, threads=options.threads, seconds=options.seconds, progress=shown
        )
    console.show_bench(report, as_json=False)
    if options.json:
        options.json.write_text(report.as_json() + "\n")


if __name__ == "__main__":
    main()
