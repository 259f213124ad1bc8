"""Make the models of a bundle, and what goes with them."""

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from bca_deploy.bundle.manifest import FORMAT, PARITY_FILE, SELFTEST_FILE, Manifest, ModelEntry, ParityEntry
from bca_deploy.bundle.write import seal, write_json
from bca_deploy.errors import ParityError
from bca_deploy.exporter.plan import Plan
from bca_deploy.exporter.source import Made, package_version
from bca_deploy.layers.isolation import plain_torch
from bca_deploy.parity.verdict import Verdict, report, significant
from bca_deploy.progress import Clock
from bca_deploy.spec import Lowering, Precision, Runtime
from bca_deploy.timing.onnx_files import opened, side_by_side
from bca_deploy.timing.turns import ratios

# The forms to choose from; how often they are compared, for how long each; and what is no difference.
_CHOICE: tuple[Lowering, ...] = ("fused", "reference")
_ROUNDS, _TURN_MS, _NOISE = 15, 5.0, 1.03

# Whose versions the manifest keeps.
_MADE_BY = ("bca-deploy", "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")


@plain_torch()
def add_model(plan: Plan, directory: Path, manifest: Manifest, precision: Precision, clock: Clock) -> Manifest:
    """Make the model of one more precision in a staged bundle, under the same parity rule as the others.

    Returns:
        The manifest with the model.

    Raises:
        InputError: the bundle's opset does not take the precision.
        ParityError: the new model is not the same function.
    """
    plan.source.check_precision(precision, plan.recipe.opset)
    entry, verdict = make_model(plan, precision, "portable", directory, clock)
    refuse_failures([verdict])
    models = (*manifest.models, entry)
    write_selftest(plan, directory, models, clock)
    reports = json.loads((directory / PARITY_FILE).read_text(encoding="utf-8"))["models"]
    write_json(directory / PARITY_FILE, {"models": [*reports, report(verdict)]})
    return seal(directory, manifest.model_copy(update={"models": models}))


@dataclass(frozen=True)
class Tuned:
    """What was measured to choose the form of the graph for the CPU.

    Attributes:
        lowering: the choice.
        sizes: of each dimension, those to tune for.
        threads: that onnxruntime had.
        fused_ms: median over the rounds; ``reference_ms`` that of the literal form.
        ratio: how many times as long as the literal form the fused one took, median over the rounds.
        quartiles: of that ratio.
    """

    lowering: Lowering
    sizes: dict[str, int]
    threads: int
    fused_ms: float
    reference_ms: float
    ratio: float
    quartiles: tuple[float, float]


def tune(plan: Plan, clock: Clock) -> tuple[Plan, Tuned | None]:
    """Measure here which form the float32 graph for the CPU should take: each at the sizes to tune for, in turn.

    Returns:
        The plan with the choice, and what was measured; None where there is nothing to choose.
    """
    source = plan.source
    if not source.has_choice or "fp32" not in plan.recipe.precision:
        return plan, None
    with clock.stage("tune"), tempfile.TemporaryDirectory(prefix="bca-tune-") as folder:
        threads = len(os.sched_getaffinity(0))
        sessions = []
        for lowering in _CHOICE:
            candidate, path = source.on_cpu(lowering), Path(folder) / f"{lowering}.onnx"
            candidate.write(*candidate.forms(["fp32"])[-1], path, plan.recipe)
            sessions.append(opened(path, threads))
        times = side_by_side(sessions, source.usual_inputs(), _ROUNDS, _TURN_MS)
    found = _tuned(times, source.signature.dims.at("opt"), threads)
    return (replace(plan, source=source.on_cpu("reference")) if found.lowering == "reference" else plan), found


def _tuned(times: list[list[float]], sizes: dict[str, int], threads: int) -> Tuned:
    fused, reference = times
    low, middle, high = (round(float(q), 3) for q in np.percentile(ratios(fused, reference), (25, 50, 75)))
    chosen: Lowering = "reference" if middle > _NOISE else "fused"
    return Tuned(chosen, sizes, threads, round(median(fused), 4), round(median(reference), 4), middle, (low, high))


def refuse_failures(verdicts: Iterable[Verdict]) -> None:
    """Raise where a model is not the same function.

    Raises:
        ParityError: with the first failures.
    """
    failures = [failure for verdict in verdicts for failure in verdict.failures]
    if failures:
        shown = "\n  ".join(failures[:8])
        raise ParityError(f"the exported model is not the PyTorch model ({len(failures)} failures):\n  {shown}")


def make_model(plan: Plan, precision: Precision, runtime: Runtime, directory: Path, clock: Clock) -> tuple[ModelEntry, Verdict]:
    """Trace, write and judge one model of a staged bundle."""
    name = precision if runtime == "portable" else f"{precision}.{runtime}"
    path = directory / "models" / f"{name}.onnx"
    path.parent.mkdir(exist_ok=True)
    made = plan.source.make(precision, runtime, path, plan.recipe, clock)
    return model_entry(plan, precision, runtime, path, made), made.verdict


def model_entry(plan: Plan, precision: Precision, runtime: Runtime, path: Path, made: Made) -> ModelEntry:
    """Return what the manifest says of a model."""
    data = path.with_name(f"{path.name}.data")
    recipe, verdict = plan.recipe, made.verdict
    return ModelEntry(
        file=f"models/{path.name}",
        runtime=runtime,
        opset=recipe.opset,
        precision=precision,
        lowering=plan.source.lowering_for(runtime),
        keep_io_types=recipe.keep_io_types,
        nodes=made.nodes,
        external_data=f"models/{data.name}" if data.exists() else None,
        parity=ParityEntry(
            passed=bool(verdict),
            scope=recipe.parity,
            cases=verdict.cases,
            runtimes=tuple(dict.fromkeys(result.runtime for result in verdict.results)),
            worst_ratio=significant(verdict.worst_ratio),
        ),
    )


def write_selftest(plan: Plan, directory: Path, models: tuple[ModelEntry, ...], clock: Clock) -> None:
    """Write the cases with which a machine without PyTorch proves the models."""
    with clock.stage("self-test"):
        precisions = list(dict.fromkeys(model.precision for model in models))
        arrays = plan.source.selftest(precisions)
        np.savez(directory / SELFTEST_FILE, **arrays)  # type: ignore[arg-type]


def finish(plan: Plan, made: list[tuple[ModelEntry, Verdict]], directory: Path, clock: Clock) -> Manifest:
    """Write what goes with the models, and last the manifest that lists it all.

    Returns:
        The manifest; it holds no engines yet.
    """
    entries = tuple(entry for entry, _ in made)
    write_selftest(plan, directory, entries, clock)
    write_json(directory / PARITY_FILE, {"models": [report(verdict) for _, verdict in made]})
    manifest = Manifest(
        format=FORMAT,
        source=plan.source.name,
        trust=plan.source.trust,
        layers=plan.source.layers,
        interface=plan.source.interface,
        signature=plan.source.signature,
        models=entries,
        engines=(),
        versions={name: package_version(name) for name in _MADE_BY},
        files={},
    )
    return seal(directory, manifest)
