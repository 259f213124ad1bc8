"""Draw the bar chart of one cell of a benchmark: python benchmarks/chart.py RESULT.json [--shape 1x512x512] [--out FILE.svg].

RESULT.json is what `bca bench --json` or `benchmarks/attention.py --json` wrote. One bar a contender, in milliseconds: nothing
in the picture that is not in the file. Without --out it draws docs/latency.svg, the picture in the README.
"""

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from bca_deploy.benchmarking.grid import parse_shapes
from bca_deploy.benchmarking.result import Measurement, Result

README = Path(__file__).resolve().parents[1] / "docs" / "latency.svg"
NAMES = {
    "eager": "PyTorch eager",
    "sdpa": "PyTorch fused",
    "compiled": "compiled",
    "plain": "torch.onnx.export",
    "literal": "literal graph",
    "portable": "portable model",
    "openvino": "OpenVINO",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--shape", help="which cell; default the first of batch 1 and the largest lengths")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, help="default the most that were measured")
    parser.add_argument("--out", type=Path, default=README)
    options = parser.parse_args()
    result = Result.model_validate_json(options.result.read_text(encoding="utf-8"))
    threads = options.threads or max(m.threads for m in result.measurements)
    found = [m for m in result.measurements if m.precision == options.precision and m.threads == threads]
    shape = parse_shapes([options.shape])[0] if options.shape else max((m.shape for m in found), key=_small_batch_first)
    cell = [m for m in found if m.shape == shape]
    if not cell:
        parser.error(f"no cell {options.shape} in {options.precision} on {threads} threads in {options.result}")
    draw(cell, f"{result.machine.cpu}, {threads} threads, {options.precision}", options.out)


def _small_batch_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (-shape[0], *shape[1:])


def draw(cell: list[Measurement], where: str, path: Path) -> None:
    """Draw the contenders of one cell, the slowest first."""
    mpl.rcParams.update({"svg.hashsalt": "bca-deploy", "font.size": 10, "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.28 * len(cell)), layout="constrained")
    cell = sorted(cell, key=lambda m: -m.p50_ms)
    colors = ["#3b6fb6" if m.contender == "session" else "#b9c4d3" for m in cell]
    bars = axes.barh([NAMES.get(m.contender, m.contender) for m in cell], [m.p50_ms for m in cell], color=colors)
    axes.bar_label(bars, labels=[f"{m.p50_ms:.3g}" for m in cell], padding=3)
    axes.set_xlabel(f"ms, median, {' x '.join(map(str, cell[0].shape))} (less is better); {where}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
