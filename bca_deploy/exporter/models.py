"""Make one model, or put new weights into it, and judge it."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from bca_deploy.bundle.manifest import (
    EXPECT_FILE,
    FORMAT,
    PARITY_FILE,
    SELFTEST_FILE,
    Manifest,
    ModelEntry,
    ParityEntry,
)
from bca_deploy.bundle.write import seal, write_json
from bca_deploy.errors import ParityError
from bca_deploy.exporter.plan import Plan
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.isolation import plain_torch
from bca_deploy.layers.lowered_model import graph_state, lower
from bca_deploy.parity import selftest_cases, user_sample
from bca_deploy.parity.rule import Subject, judge, judge_inputs
from bca_deploy.parity.verdict import Verdict, report, significant
from bca_deploy.progress import Clock
from bca_deploy.spec import Precision, Runtime
from bca_deploy.tracing.graph import attach, check_precision, trace, write

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
    check_precision(precision, plan.recipe.opset, plan.checkpoint.spec)
    entry, verdict = make_model(plan, precision, "portable", directory, clock)
    refuse_failures([verdict])
    models = (*manifest.models, entry)
    write_selftest(plan, directory, models, clock)
    reports = json.loads((directory / PARITY_FILE).read_text(encoding="utf-8"))["models"]
    write_json(directory / PARITY_FILE, {"models": [*reports, report(verdict)]})
    return seal(directory, manifest.model_copy(update={"models": models}))


def refuse_failures(verdicts: Iterable[Verdict]) -> None:
    """Raise where a model is not the same function.

    Raises:
        ParityError: with the first failures.
    """
    failures = [failure for verdict in verdicts for failure in verdict.failures]
    if failures:
        shown = "\n  ".join(failures[:8])
        raise ParityError(f"the exported model is not the PyTorch layer ({len(failures)} failures):\n  {shown}")


def refit_model(plan: Plan, model: ModelEntry, directory: Path, clock: Clock) -> tuple[ModelEntry, Verdict]:
    """Put the plan's weights into a staged model of the same layer, and judge it; no trace is needed."""
    import onnx_ir as ir

    path = directory / model.file
    with clock.stage(f"weights {model.precision}"):
        graph = ir.external_data.load_to_model(ir.load(path))  # nothing may still read from the file to be written
        masked = plan.recipe.interface.masked
        attach(graph, graph_state(plan.checkpoint, model.lowering, model.precision, model.runtime, masked))
        write(graph, path, plan.recipe.external_data_bytes)
    return _judge(plan, model.precision, model.runtime, path, len(graph.graph), clock)


def write_weights(checkpoint: Checkpoint, path: Path) -> None:
    """Write the original weights under the seed's names."""
    from safetensors.torch import save_file

    save_file(checkpoint.state, path)


def make_model(plan: Plan, precision: Precision, runtime: Runtime, directory: Path, clock: Clock) -> tuple[ModelEntry, Verdict]:
    """Lower, trace, write and judge one model of a staged bundle."""
    recipe = plan.recipe
    name = precision if runtime == "portable" else f"{precision}.{runtime}"
    path = directory / "models" / f"{name}.onnx"
    path.parent.mkdir(exist_ok=True)
    with clock.stage(f"trace {name}"):
        maps = recipe.interface.attention_maps
        masked = recipe.interface.masked
        lowered = lower(plan.checkpoint, plan.lowering, precision, recipe.keep_io_types, maps, runtime, masked)
        model = trace(lowered, plan.signature, recipe.opset, _metadata(plan, precision), runtime)
        write(model, path, recipe.external_data_bytes)
    return _judge(plan, precision, runtime, path, len(model.graph), clock)


def _judge(
    plan: Plan, precision: Precision, runtime: Runtime, path: Path, nodes: int, clock: Clock
) -> tuple[ModelEntry, Verdict]:
    recipe, spec = plan.recipe, plan.checkpoint.spec
    subject = Subject(path, plan.checkpoint, recipe.interface, recipe.ranges, precision, recipe.keep_io_types)
    with clock.stage(f"parity {path.stem}"):
        verdict = judge(subject, recipe.parity, clock.progress.steps, yardstick=plan.yardstick(precision))
        if plan.expected:
            inputs = user_sample.inputs_of(plan.expected, spec, recipe.interface)
            verdict = verdict.joined(judge_inputs(subject, {EXPECT_FILE: inputs}))
    return _model_entry(plan, precision, runtime, path, nodes, verdict), verdict


def _metadata(plan: Plan, precision: Precision) -> dict[str, str]:
    return {
        "producer": f"bca-deploy {package_version('bca-deploy')}",
        "layer": json.dumps(asdict(plan.checkpoint.spec), sort_keys=True),
        "lowering": plan.lowering,
        "precision": precision,
        "dead_rows": "a row that is masked, or that has no live key, is the mean over all values",
    }


def _model_entry(plan: Plan, precision: Precision, runtime: Runtime, path: Path, nodes: int, verdict: Verdict) -> ModelEntry:
    data = path.with_name(f"{path.name}.data")
    recipe = plan.recipe
    return ModelEntry(
        file=f"models/{path.name}",
        runtime=runtime,
        opset=recipe.opset,
        precision=precision,
        lowering=plan.lowering,
        keep_io_types=recipe.keep_io_types,
        nodes=nodes,
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
        arrays = selftest_cases.make(plan.checkpoint, plan.recipe.interface, plan.recipe.ranges, precisions)
        np.savez(directory / SELFTEST_FILE, **arrays)  # type: ignore[arg-type]


def package_version(package: str) -> str:
    """Return the installed version; onnxruntime's under either of its names."""
    names = ("onnxruntime", "onnxruntime-gpu") if package == "onnxruntime" else (package,)
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def finish(plan: Plan, made: list[tuple[ModelEntry, Verdict]], directory: Path, clock: Clock) -> Manifest:
    """Write what goes with the models, and last the manifest that lists it all.

    Returns:
        The manifest; it holds no engines yet.
    """
    entries = tuple(entry for entry, _ in made)
    write_selftest(plan, directory, entries, clock)
    if plan.expected:
        np.savez(directory / EXPECT_FILE, **plan.expected)  # type: ignore[arg-type]
    write_json(directory / PARITY_FILE, {"models": [report(verdict) for _, verdict in made]})
    manifest = Manifest(
        format=FORMAT,
        layer=plan.checkpoint.spec,
        interface=plan.recipe.interface,
        signature=plan.signature,
        models=entries,
        engines=(),
        versions={name: package_version(name) for name in _MADE_BY},
        files={},
    )
    return seal(directory, manifest)
