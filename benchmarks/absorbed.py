"""GroundingDINO's fusion layer with absorbed projections: memory and time of each form, beside the plain torch.onnx export.

python benchmarks/absorbed.py [--memory] [--latency] [--lengths 22223x256 5000x64] [--json FILE]

The rule of bca_deploy/layers/absorbed.py rests on these tables. Memory is the scratch memory of TensorRT-RTX engines for sm89,
fp16 with fp16 edges, without a second stream, at batch 1 and 4; no GPU needed. Latency is float32's on onnxruntime's CPU
provider at batch 1, two threads, medians of 15 rounds in which every file runs in turn.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

if TYPE_CHECKING:
    from torch import nn

Row = dict[str, Any]
MEMORY, LATENCY = (
    ("5000x16", "5000x64", "5000x128", "22223x16", "22223x64", "22223x128", "22223x256"),
    ("5000x256", "5000x64", "5000x16"),
)
BATCHES, THREADS, ROUNDS = (1, 4), 2, 15
AXES = {
    "vision": ("batch", "vision_len", None),
    "text": ("batch", "text_len", None),
    "vision_mask": ("batch", "vision_len"),
    "text_mask": ("batch", "text_len"),
}


@dataclass(frozen=True)
class Size:
    """So many rows of the image, and of the text."""

    vision: int
    text: int

    @classmethod
    def read(cls, text: str) -> "Size":
        """Return what ``22223x256`` says."""
        return cls(*map(int, text.split("x")))


def model() -> "nn.Module":
    """Return the layer at full size."""
    from support.grounding_dino_layer import Fusion, fusion_layer

    return Fusion(fusion_layer(dim=256, heads=4, wide=8)).eval()


def write(size: Size, precision: str, folder: Path) -> dict[str, Path]:
    """Write the plain export and every form."""
    from support.grounding_dino_layer import sample

    from bca_deploy.benchmarking.torch_forms import plain_export
    from bca_deploy.exporter.model_source import read_model
    from bca_deploy.exporter.recipe import read_recipe
    from bca_deploy.layers.isolation import plain_torch
    from bca_deploy.progress import Silent
    from bca_deploy.spec import AbsorbedForm

    pair = [sample(2, 9, 5, dim=256), sample(3, 11, 7, seed=1, dim=256)]
    dims = {
        "batch": (1, 1, max(BATCHES)),
        "vision_len": (1, size.vision // 2, size.vision),
        "text_len": (1, size.text // 2, size.text),
    }
    recipe = read_recipe(
        None, {"dims": dims, "precision": [precision], "keep_io_types": precision == "fp32", "model": {"allow_none": False}}
    )
    files = {"literal": folder / "literal.onnx"}
    plain, inputs = model(), pair[0]
    if precision == "fp16":
        plain, inputs = plain.half(), {n: t.half() if t.is_floating_point() else t for n, t in inputs.items()}
    plain_export(plain, inputs, AXES, files["literal"])
    with plain_torch():
        for form in get_args(AbsorbedForm):
            source = read_model(model(), pair, recipe, Silent(), {"layer.attn": (form, None)})
            files[form] = folder / f"{form}.onnx"
            source.write(precision, "portable", files[form], recipe)
    return files


def scratch_mb(path: Path, size: Size, batch: int) -> float:
    """Compile for this batch and these lengths at most."""
    from models import compiled_mb

    at = [(1, 1, 1), (1, size.vision // 2, max(1, size.text // 2)), (batch, size.vision, size.text)]
    shapes = {"vision": [[b, n, 256] for b, n, _ in at], "text": [[b, m, 256] for b, _, m in at]}
    shapes |= {"vision_mask": [[b, n] for b, n, _ in at], "text_mask": [[b, m] for b, _, m in at]}
    return round(compiled_mb(path, shapes), 1)


def memory(size: Size) -> list[Row]:
    """Return the scratch memory of every form."""
    with tempfile.TemporaryDirectory() as folder:
        files = write(size, "fp16", Path(folder))
        return [
            {"size": f"{batch}x{size.vision}x{size.text}"}
            | {name: scratch_mb(path, size, batch) for name, path in files.items()}
            for batch in BATCHES
        ]


def latency(size: Size) -> Row:
    """Return the median milliseconds of every form."""
    from support.grounding_dino_layer import sample

    from bca_deploy.timing.onnx_files import opened, side_by_side

    with tempfile.TemporaryDirectory() as folder:
        files = write(size, "fp32", Path(folder))
        sessions = [opened(path, THREADS) for path in files.values()]
        feeds = {name: tensor.numpy() for name, tensor in sample(1, size.vision, size.text, dim=256).items()}
        times = side_by_side(sessions, feeds, ROUNDS)
    found = {name: round(median(each), 1) for name, each in zip(files, times, strict=True)}
    return {"size": f"1x{size.vision}x{size.text}"} | found


def table(title: str, rows: list[Row]) -> None:
    """Print rows of one shape."""
    if rows:
        print(f"\n{title}\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(str(value) for value in row.values())} |")


def main() -> None:
    """Measure what was asked for, both without a word."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--lengths", nargs="*", help="such as 22223x256")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    both = not (given.memory or given.latency)
    found: dict[str, list[Row]] = {"memory": [], "latency": []}
    if given.memory or both:
        found["memory"] = [row for text in given.lengths or MEMORY for row in memory(Size.read(text))]
        table("Scratch memory, fp16, MB", found["memory"])
    if given.latency or both:
        found["latency"] = [latency(Size.read(text)) for text in given.lengths or LATENCY]
        table("CPU, fp32, ms", found["latency"])
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
