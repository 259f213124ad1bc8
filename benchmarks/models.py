"""Whole models as bundles, beside what plain torch.onnx.export makes of the same: seconds, opset, engine memory, CPU latency.

python benchmarks/models.py [--models stack maps] [--only literal] [--json FILE]

Four models that have the layer inside, at full size, and LightGlue's block with a mask of pairs; tests/support/ has their code.
Engines are TensorRT-RTX's for sm89, fp16 with fp16 edges, without a second stream, up to batch 8 and 2048 tokens a side (maps:
45 x 45); no GPU needed. Every export is the first of its process, imports of torch included. Latency is float32's at batch 1,
medians of 15 rounds in which every file runs in turn, one process for each model and number of threads.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.models import Kind

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

Row = dict[str, Any]
ROUNDS = 15
THREADS = (1, 2)
#: The files of each way, under the folder it writes to. A session runs the last on the CPU, where there is one.
FILES = {
    "literal": {"fp32": "fp32.onnx", "fp16": "fp16.onnx"},
    "bundle": {
        "fp32": "fp32/models/fp32.onnx",
        "fp16": "fp16/models/fp16.onnx",
        "fp32, onnxruntime's": "fp32/models/fp32.onnxruntime-cpu.onnx",
    },
}


@dataclass(frozen=True)
class Goal:
    """What a bundle may take at most, as a share of the literal graph; at 64 tokens it may take 3 % more time."""

    scratch: float
    latency: float
    tokens: int = 512

    def at(self, tokens: int) -> float:
        """Return the share of the time."""
        return self.latency if tokens == self.tokens else 1.03


GOALS = {
    "stack": Goal(0.13, 0.78),
    "encoders": Goal(0.08, 0.68),
    "maps": Goal(0.06, 0.42),
    "policy": Goal(0.09, 0.50),
    "lightglue": Goal(0.085, 0.50, tokens=2048),
}
EXPORT_S = 30.0


def kinds() -> dict[str, "Kind"]:
    """Return the models; imported here, for the process that prints needs no torch."""
    from support import lightglue_block, models

    long = (1, 512, 2048)
    dims = {name: {"batch": (1, 4, 8), **dict.fromkeys(lengths, long)} for name, lengths in LENGTHS.items()}
    dims["maps"] |= dict.fromkeys(LENGTHS["maps"], (1, 22, 45))
    found = (
        models.stack(models.Published, dims["stack"], 512, 386, heads=8, dim_head=64),
        models.encoders(dims["encoders"], dim=128, heads=4, depth=2),
        models.maps(dims["maps"], channels=64, heads=4, dim_head=32),
        models.policy(dims["policy"], dim=128, heads=4, dim_head=32),
        lightglue_block.lightglue(dims["lightglue"], dim=256, heads=4),
    )
    return {kind.name: kind for kind in found}


LENGTHS = {
    "stack": ("x_len", "context_len"),
    "encoders": ("signal_len", "word_len"),
    "maps": ("height", "width"),
    "policy": ("word_len", "frame_len"),
    "lightglue": ("left_len", "right_len"),
}


def sizes(name: str, tokens: int) -> dict[str, int]:
    """Return the sizes of one item with so many tokens on either side."""
    lengths = (tokens // 32, 32) if tokens > 64 else (8, 8)
    return {"batch": 1} | dict(zip(LENGTHS[name], lengths if name == "maps" else (tokens, tokens), strict=True))


# ---- files


def write_literal(kind: "Kind", folder: Path) -> float:
    """Export the untouched model as everyone does, in both precisions; return the seconds of the first."""
    from bca_deploy.benchmarking.torch_forms import plain_export

    sample = kind.pair()[0]
    start = time.perf_counter()
    plain_export(kind.make(), sample, kind.axes, folder / "fp32.onnx")
    seconds = time.perf_counter() - start
    halves = {name: value.half() if value.is_floating_point() else value for name, value in sample.items()}
    plain_export(kind.make().half(), halves, kind.axes, folder / "fp16.onnx")
    return seconds


def write_bundle(kind: "Kind", folder: Path) -> float:
    """Export to a bundle of each precision; return the seconds of the first. Edges of fp16, for the literal graph has them."""
    import bca_deploy

    given: dict[str, Any] = {"inputs": kind.pair(), "dims": dict(kind.dims), "axes": kind.axes, "masks": dict(kind.masks)}
    start = time.perf_counter()
    bca_deploy.export(kind.make(), folder / "fp32", **given, precision=["fp32"])
    seconds = time.perf_counter() - start
    bca_deploy.export(kind.make(), folder / "fp16", **given, precision=["fp16"], keep_io_types=False)
    return seconds


WAYS: dict[str, Callable[["Kind", Path], float]] = {"literal": write_literal, "bundle": write_bundle}


def facts(path: Path) -> Row:
    import onnx

    model = onnx.load(path, load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    return {"opset": opset, "nodes": len(model.graph.node)}


def export(name: str, way: str, folder: str) -> Row:
    """Write the files of one model in one way, and say what they are and what an engine of them needs."""
    kind, place = kinds()[name], Path(folder) / way
    place.mkdir()
    seconds = WAYS[way](kind, place)
    files = {label: place / file for label, file in FILES[way].items() if (place / file).exists()}
    return {"export_s": seconds, **facts(files["fp32"]), "scratch_mb": scratch_mb(kind, files["fp16"])}


# ---- what an engine needs


def scratch_mb(kind: "Kind", onnx: Path) -> float:
    """Compile for the whole range of every dimension; see benchmarks/engines.py."""
    at = [{name: found[which] for name, found in kind.dims.items()} for which in range(3)]
    shapes = {name: [[s.get(a, a) for a in given.shape] for s in at] for name, given in kind.inputs.items()}  # type: ignore[arg-type]
    return compiled_mb(onnx, shapes)


def compiled_mb(onnx: Path, shapes: Mapping[str, list[list[int]]]) -> float:
    """Compile one profile, each input's smallest, optimal and largest shape; return the scratch memory."""
    from bca_deploy.bundle.engine_options import EngineTable
    from bca_deploy.engines.builder_process import Request
    from bca_deploy.engines.compile import compile_engine

    request = Request(
        module="tensorrt_rtx",
        onnx=str(onnx),
        out=str(onnx.with_suffix(".engine")),
        profiles=[dict(shapes)],
        targets=["sm89"],
        options=EngineTable(library="rtx", aux_streams=0).model_dump(mode="json"),
    )
    return (compile_engine(request, 1800, lambda share: None).log.scratch_bytes or 0) / 1e6


# ---- latency


def latency(name: str, threads: str, folder: str) -> Row:
    """Time every float32 file, in turn."""
    from bca_deploy.timing.onnx_files import opened

    kind = kinds()[name]
    paths = {(way, label): Path(folder) / way / file for way, files in FILES.items() for label, file in files.items()}
    sessions = {key: opened(path, int(threads)) for key, path in paths.items() if key[1].startswith("fp32") and path.exists()}
    labels = [f"{way} {label}" for way, label in sessions]
    lengths = (GOALS[name].tokens, 64)
    return {str(tokens): dict(zip(labels, medians(kind, list(sessions.values()), tokens), strict=True)) for tokens in lengths}


def medians(kind: "Kind", sessions: Sequence[Any], tokens: int) -> list[float]:
    """Return the median milliseconds of each session on the same inputs."""
    from bca_deploy.timing.onnx_files import side_by_side

    feeds = {name: tensor.numpy() for name, tensor in kind.sample(0, sizes(kind.name, tokens)).items()}
    return [median(times) for times in side_by_side(sessions, feeds, ROUNDS)]


# ---- the table


STEPS: dict[str, Callable[[str, str, str], Row]] = {"export": export, "latency": latency}


def in_own_process(step: str, *arguments: str) -> Row:
    """Run a step; what the exporters say on the way is shown only where they fail."""
    command = [sys.executable, __file__, "--step", step, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{step} {' '.join(arguments)}:\n{done.stderr}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, ways: list[str]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        found: Row = {way: in_own_process("export", name, way, folder) for way in ways}
        cores = len(os.sched_getaffinity(0))
        found["latency_ms"] = {
            str(threads): in_own_process("latency", name, str(threads), folder) for threads in THREADS if threads <= cores
        }
    return found


def rows(name: str, found: Mapping[str, Row]) -> list[list[Any]]:
    """Return what was measured, a line each: what, of the literal graph, of the bundle, how much of it is allowed."""
    literal, bundle, goal = found.get("literal", {}), found.get("bundle", {}), GOALS[name]
    allowed = {"export_s": f"{EXPORT_S:g} s", "opset": "17", "scratch_mb": goal.scratch}
    table = [[what, literal.get(what), bundle.get(what), allowed.get(what)] for what in (literal or bundle)]
    for threads, lengths in found["latency_ms"].items():
        for tokens, ms in lengths.items():
            limit = goal.at(int(tokens)) if threads == "1" else None
            what = f"ms at {tokens}, {threads} thread{'s' if threads != '1' else ''}"
            forms = [label for label in ms if label.startswith("bundle")] or [None]
            table += [
                [f"{what}{form.removeprefix('bundle fp32') if form else ''}", ms.get("literal fp32"), ms.get(form), limit]
                for form in forms
            ]
    return table


def line(name: str, what: str, literal: Any, bundle: Any, allowed: Any) -> str:
    ratio = bundle / literal if literal and bundle and what != "opset" else None
    cells = (name, what, literal, bundle, ratio, allowed)
    shown = ("" if cell is None else f"{cell:.3g}" if isinstance(cell, float) and cell < 100 else cell for cell in cells)
    return "| " + " | ".join(f"{cell:.0f}" if isinstance(cell, float) else str(cell) for cell in shown) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--only", choices=WAYS, help="leave the other out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)  # one step, in this process; prints JSON
    options = parser.parse_args()
    if options.step:
        step, *arguments = options.step
        print(json.dumps(STEPS[step](*arguments)))
        return
    ways, report = [options.only] if options.only else list(WAYS), {}
    print("| model | what | literal | bundle | bundle / literal | at most |\n| --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        report[name] = measure(name, ways)
        print("\n".join(line(name, *row) for row in rows(name, report[name])), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
