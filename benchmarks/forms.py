"""Where on the CPU the fused form of a layer loses to the literal one.

python benchmarks/forms.py [--json benchmarks/forms.json]

Layers of several widths and heads, fp32, both masks, padded, at batch 1 and equal lengths. Of each three graphs: the literal
one (one similarity, two softmaxes), the portable fused one, and the fused one for onnxruntime alone, which a session runs on
the CPU. All three run in turn in one process, without spinning, denormals flushed; a figure is the median over the rounds of
the ratio within a round, so that a busy machine disturbs both sides alike.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import quantiles
from typing import Any

from bca_deploy.timing.machine import machine
from bca_deploy.timing.onnx_files import opened, side_by_side
from bca_deploy.timing.turns import ratios

Row = dict[str, Any]
#: dim, context_dim, heads, features of a head.
LAYERS = (
    (32, 32, 1, 32),
    (64, 48, 4, 16),
    (128, 128, 4, 32),
    (128, 128, 2, 64),
    (256, 256, 8, 32),
    (256, 256, 4, 64),
    (512, 386, 8, 64),
    (512, 512, 16, 32),
    (1024, 1024, 16, 64),
)
LENGTHS, THREADS = (16, 32, 64, 128, 256, 512), (1, 2)
#: By file: lowering, runtime.
FORMS = {
    "literal": ("reference", "portable"),
    "fused": ("fused", "portable"),
    "for onnxruntime": ("fused", "onnxruntime-cpu"),
}
TURN_MS = 3.0


def write_forms(layer: tuple[int, int, int, int], folder: Path) -> dict[str, Path]:
    """Write the three graphs of a layer with seeded weights."""
    import torch

    from bca_deploy.layers.checkpoint import from_module
    from bca_deploy.layers.lowered_model import lower
    from bca_deploy.layers.reference import build
    from bca_deploy.spec import LAYER_DIMS, Interface, LayerSpec, layer_signature
    from bca_deploy.tracing.graph import trace, write

    dim, context_dim, heads, dim_head = layer
    torch.manual_seed(0)
    spec = LayerSpec(dim=dim, context_dim=context_dim, heads=heads, dim_head=dim_head, prenorm=True)
    checkpoint, signature = from_module(build(spec)), layer_signature(spec, Interface(), LAYER_DIMS)
    for name, (lowering, runtime) in FORMS.items():
        lowered = lower(checkpoint, lowering, runtime=runtime)  # type: ignore[arg-type]
        write(trace(lowered, signature, 17, runtime=runtime), folder / f"{name}.onnx")  # type: ignore[arg-type]
    return {name: folder / f"{name}.onnx" for name in FORMS}


def measure(layer: tuple[int, int, int, int], rounds: int) -> list[Row]:
    """Return a row for each length and number of threads."""
    from bca_deploy.spec import LAYER_DIMS, Interface, LayerSpec, layer_signature
    from bca_deploy.timing.inputs import padded_inputs

    dim, context_dim, heads, dim_head = layer
    signature = layer_signature(LayerSpec(dim=dim, context_dim=context_dim, heads=heads), Interface(), LAYER_DIMS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = write_forms(layer, Path(folder))
        for threads, length in product(THREADS, LENGTHS):
            sessions = [opened(path, threads) for path in paths.values()]
            feeds = padded_inputs(signature, {"batch": 1, "x_len": length, "context_len": length})
            times = dict(zip(paths, side_by_side(sessions, feeds, rounds, TURN_MS), strict=True))
            what = {"dim": dim, "context_dim": context_dim, "heads": heads, "dim_head": dim_head}
            rows.append({**what, "length": length, "threads": threads, **figures(times)})
    return rows


def figures(times: dict[str, list[float]]) -> Row:
    """Return the quickest round of the literal graph, and of each other form its ratio to it: quartiles over the rounds."""
    found: Row = {"literal_ms": min(times["literal"])}
    for name, ours in times.items():
        if name != "literal":
            found[name] = [round(value, 3) for value in quantiles(ratios(ours, times["literal"]), n=4)]
    return found


def line(row: Row) -> str:
    layer = f"{row['dim']}/{row['context_dim']}, {row['heads']} x {row['dim_head']}"
    shown = (f"{row[name][1]:.2f} ({row[name][0]:.2f} to {row[name][2]:.2f})" for name in list(FORMS)[1:])
    return "| " + " | ".join([layer, str(row["threads"]), str(row["length"]), f"{row['literal_ms']:.3g}", *shown]) + " |"


def as_json(rows: list[Row]) -> str:
    """Return machine and rows, a line each."""
    shown = ",\n".join(map(json.dumps, rows))
    return f'{{"machine": {json.dumps(asdict(machine()))},\n"rows": [\n{shown}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--layers", type=int, nargs="+", default=range(len(LAYERS)), help="their numbers in LAYERS")
    options = parser.parse_args()
    print("| layer | threads | length | literal ms | fused / literal | for onnxruntime / literal |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for index in options.layers:
        found = measure(LAYERS[index], options.rounds)
        rows += found
        print("\n".join(map(line, found)), flush=True)
    if options.json:
        options.json.write_text(as_json(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
