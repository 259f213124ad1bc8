"""What the tool itself costs: time and peak memory of each stage of an export and of `bca verify`, beside PyTorch's own export.

python benchmarks/cost.py [--models layer stack] [--parity full] [--json FILE]

Of each model three things, each in a process of its own, imports included: `bca_deploy.export`, `bca_deploy.verify` of what
came out, and `torch.onnx.export(..., verify=True)` of the same model, which compares one run with PyTorch. A stage begins where
the progress says so. Memory is the largest resident one within the stage, in 10**6 bytes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bca_deploy.timing import memory
from bca_deploy.timing.machine import machine

if TYPE_CHECKING:
    from torch import Tensor, nn

WHOLE = ("stack", "encoders", "maps", "policy")
#: Bare layers: dim, context_dim, heads, features of a head.
LAYERS = {"layer": (512, 386, 8, 64), "tiny": (8, 8, 2, 4)}
Row = dict[str, Any]


@dataclass
class Stages:
    """A progress that measures each stage until the next one begins."""

    rows: list[Row] = field(default_factory=list)
    _began: float = field(default_factory=time.perf_counter)

    def stage(self, name: str) -> None:
        """End the running stage and begin this one; of two with one name the second is another stage."""
        self.end()
        self.rows.append({"stage": name})
        memory.forget_peak()
        self._began = time.perf_counter()

    def steps(self, done: int, total: int) -> None:
        """Ignore it."""

    def end(self) -> None:
        """End the running stage, where there is one."""
        if self.rows:
            seconds = time.perf_counter() - self._began
            self.rows[-1] |= {"seconds": round(seconds, 3), "peak_mb": round(memory.peak_rss_mb(), 1)}


@dataclass(frozen=True)
class Case:
    """A model: how it is given to `bca_deploy.export`, and a sample and axes for PyTorch's."""

    make: Callable[[], "nn.Module"]
    given: Mapping[str, Any]
    sample: Mapping[str, "Tensor"]
    axes: Mapping[str, Any]


def case(name: str) -> Case:
    return _layer(*LAYERS[name]) if name in LAYERS else _whole(name)


def _layer(dim: int, context_dim: int, heads: int, dim_head: int) -> Case:
    import torch

    from bca_deploy.layers.reference import build
    from bca_deploy.spec import LAYER_DIMS, Interface, LayerSpec, layer_signature
    from bca_deploy.timing.inputs import padded_inputs

    spec = LayerSpec(dim=dim, context_dim=context_dim, heads=heads, dim_head=dim_head, prenorm=True)
    signature = layer_signature(spec, Interface(), LAYER_DIMS)
    arrays = padded_inputs(signature, {"batch": 3, "x_len": 6, "context_len": 5})
    sample = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return Case(lambda: build(spec).eval(), {}, sample, {tensor.name: tensor.axes for tensor in signature.inputs})


def _whole(name: str) -> Case:
    from models import kinds

    kind = kinds()[name]
    given = {"inputs": kind.pair(), "dims": dict(kind.dims), "axes": kind.axes, "masks": dict(kind.masks)}
    return Case(kind.make, given, kind.pair()[0], kind.axes)


# ---- one process each


def export(name: str, folder: Path, parity: str, stages: Stages) -> None:
    import bca_deploy

    made = case(name)
    bca_deploy.export(made.make(), folder / "bundle", **made.given, parity=parity, force=True, progress=stages).close()


def verify(name: str, folder: Path, parity: str, stages: Stages) -> None:
    import bca_deploy

    model = None if name in LAYERS else case(name).make()
    bca_deploy.verify(folder / "bundle", model=model, scope=parity, progress=stages)  # type: ignore[arg-type]


def torch_export(name: str, folder: Path, parity: str, stages: Stages) -> None:
    from bca_deploy.benchmarking.torch_forms import plain_export

    made = case(name)
    stages.stage("torch.onnx.export, verify=True")
    plain_export(made.make(), made.sample, made.axes, folder / "plain.onnx", verify=True)


STEPS: dict[str, Callable[[str, Path, str, Stages], None]] = {"export": export, "verify": verify, "torch": torch_export}


def run_step(step: str, name: str, folder: Path, parity: str) -> list[Row]:
    """Do one step in this process."""
    stages = Stages()
    stages.stage("imports and what no stage is named for")
    STEPS[step](name, folder, parity, stages)
    stages.end()
    return stages.rows


def in_own_process(step: str, name: str, folder: Path, parity: str) -> list[Row]:
    command = [sys.executable, __file__, "--step", step, name, str(folder), "--parity", parity]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{step} of {name}:\n{done.stderr}")
    found: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- the table


def lines(name: str, found: Mapping[str, list[Row]]) -> list[str]:
    shown = ((step, row) for step, rows in found.items() for row in (*rows, total(rows)))
    return [f"| {name} | {step} | {row['stage']} | {row['seconds']:.2f} | {row['peak_mb']:.0f} |" for step, row in shown]


def total(rows: list[Row]) -> Row:
    seconds, peak = sum(row["seconds"] for row in rows), max(row["peak_mb"] for row in rows)
    return {"stage": "all", "seconds": seconds, "peak_mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*LAYERS, *WHOLE], default=["layer", *WHOLE])
    parser.add_argument("--parity", choices=["quick", "full"], default="quick")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # one step, in this process; prints JSON
    options = parser.parse_args()
    if options.step:
        step, name, folder = options.step
        print(json.dumps(run_step(step, name, Path(folder), options.parity)))
        return
    report: Row = {"machine": asdict(machine()), "parity": options.parity, "models": {}}
    print("| model | what | stage | s | peak MB |\n| --- | --- | --- | --- | --- |")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            found = {step: in_own_process(step, name, Path(folder), options.parity) for step in STEPS}
        report["models"][name] = found
        print("\n".join(lines(name, found)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
