"""Draw docs/latency.svg from the table in docs/benchmarks.md: python benchmarks/chart.py.

One bar a contender, in milliseconds, at one shape: nothing in the picture that is not in the table.
"""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).resolve().parents[1] / "docs"
SHAPE = "1 x 512 x 512"


def main() -> None:
    bars = read_row((DOCS / "benchmarks.md").read_text(encoding="utf-8"), SHAPE)
    draw(bars, Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "latency.svg")


def read_row(text: str, shape: str) -> dict[str, float]:
    """Return what one line of the table of medians says, by contender, the slowest first."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    heads = next(row for row in rows if row[0] == "median ms")
    values = next(row for row in rows if row[0] == shape)
    found = {name: float(value) for name, value in zip(heads[1:], values[1:], strict=True)}
    return dict(sorted(found.items(), key=lambda bar: -bar[1]))


def draw(bars: dict[str, float], path: Path) -> None:
    mpl.rcParams.update({"svg.hashsalt": "bca-deploy", "font.size": 10, "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    colors = ["#3b6fb6" if name == "session" else "#b9c4d3" for name in bars]
    axes.bar_label(axes.barh(list(bars), list(bars.values()), color=colors), fmt="%.1f", padding=3)
    axes.set_xlabel(f"ms, median, {SHAPE} (less is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
