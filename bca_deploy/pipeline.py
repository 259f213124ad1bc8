"""The main job: plan, lower, trace, judge, and leave a bundle. Everything that can be refused is refused before any work."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bca_deploy import engines, expect, selftest
from bca_deploy.attention import build
from bca_deploy.bundle import Bundle
from bca_deploy.checkpoint import Checkpoint, from_module, load, read
from bca_deploy.engines import EnginePlan
from bca_deploy.errors import BundleError, InputError, ParityError
from bca_deploy.isolation import plain_torch
from bca_deploy.lowering import choose, graph_state, has_cpu_form, lower
from bca_deploy.manifest import (
    DTYPE_OF,
    EXPECT_FILE,
    FORMAT,
    PARITY_FILE,
    SELFTEST_FILE,
    WEIGHTS_FILE,
    Manifest,
    ModelEntry,
    ParityEntry,
    TensorEntry,
)
from bca_deploy.onnx_graph import attach, check_opset, trace, write
from bca_deploy.ort_backend import onnxruntime
from bca_deploy.parity import Subject, judge, judge_inputs
from bca_deploy.progress import Clock, Progress, Silent
from bca_deploy.recipe import InputsTable, LayerTable, OutputsTable, Recipe, read_recipe
from bca_deploy.spec import EXTERNAL_DATA_BYTES, Axis, LayerSpec, Lowering, Precision, Runtime
from bca_deploy.store import check_target, seal, staged, write_build, write_json
from bca_deploy.verdict import Verdict, report, significant
from bca_deploy.yardstick import Yardstick

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Plan:
    """Everything decided before the work begins.

    Attributes:
        recipe: what to make.
        checkpoint: the layer and its weights.
        lowering: the form of the attention, chosen.
        out: the directory or ``.bca`` archive.
        force: replace an existing bundle.
        expected: the user's own inputs and outputs, from ``--expect`` or a live module.
        engine: what to compile after the models, where anything.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    lowering: Lowering
    out: Path
    force: bool = False
    expected: Arrays = field(default_factory=dict)
    engine: EnginePlan | None = None
    _yardsticks: dict[Precision, Yardstick] = field(default_factory=dict, init=False, repr=False, compare=False)

    def yardstick(self, precision: Precision) -> Yardstick:
        """Return what every model of a precision is held against, made on first use."""
        if precision not in self._yardsticks:
            self._yardsticks[precision] = Yardstick(self.checkpoint, self.recipe.interface, precision)
        return self._yardsticks[precision]


@plain_torch()
def export(
    module: nn.Module,
    out: str | Path,
    *,
    heads: int | None = None,
    recipe: str | Path | None = None,
    force: bool = False,
    keep_failed: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Bundle:
    """Export a live module, the seed's layer, the published package's layer or its transformer.

    The module's own outputs on a few inputs are stored in the bundle and prove that the export is the same function.

    Args:
        module: the trained module; it is not changed.
        out: the bundle's directory, or a ``.bca`` archive.
        heads: needed only where the module has no ``heads`` attribute.
        recipe: a recipe file; its ``[layer]`` must agree with the module.
        force: replace an existing bundle.
        keep_failed: leave what failed parity as ``<out>.failed``.
        progress: told about stages and cases.
        **options: keys of a recipe, nested tables as dicts: ``opset=18, precision=["fp16"], inputs={"mask": False}``.

    Returns:
        The bundle, open.

    Raises:
        BcaError: see errors.py; nothing is left at ``out``.
    """
    checkpoint = from_module(module, heads)
    read = read_recipe(Path(recipe) if recipe else None, options)
    choose(read.lowering, checkpoint.spec, read.interface)  # before the module is run, which may be impossible too
    expected = expect.from_module(module, checkpoint.spec, read.interface, read.dims)
    run(make_plan(read, checkpoint, Path(out), force, expected), progress or Silent(), keep_failed)
    return Bundle.open(out)


def load_checkpoint(recipe: Recipe, path: Path | None, heads: int | None, prefix: str = "") -> Checkpoint:
    """Return the layer from a file, or with seeded weights where there is no file.

    Raises:
        CheckpointError: see :func:`bca_deploy.checkpoint.load`.
        InputError: the recipe's ``[layer]`` does not agree with the checkpoint, or heads missing.
    """
    if heads is not None:  # the flag overrides the recipe
        recipe = recipe.model_copy(update={"layer": recipe.layer.model_copy(update={"heads": heads})})
    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return from_module(build(recipe.layer.spec()))
    given = recipe.layer.heads if "heads" in recipe.layer.model_fields_set else None
    checkpoint = load(path, given, prefix)
    _check_agreement(recipe.layer, checkpoint.spec)
    return checkpoint


def _check_agreement(layer: LayerTable, found: LayerSpec) -> None:
    """Hold the keys that the recipe gives against the checkpoint; what it leaves out is the checkpoint's to say."""
    has = asdict(found) | {"ff_expansion": (found.ff_hidden or 0) / found.dim}
    for name in sorted(layer.model_fields_set):
        asked = getattr(layer, name)
        same = int(found.dim * asked) == found.ff_hidden if name == "ff_expansion" else asked == has[name]
        if not same and not (name == "norm" and not found.prenorm):
            raise InputError(f"layer.{name} is {asked!r} in the recipe and {has[name]!r} in the checkpoint; correct the recipe")


def make_plan(recipe: Recipe, checkpoint: Checkpoint, out: Path, force: bool = False, expected: Arrays | None = None) -> Plan:
    """Decide everything and refuse what cannot be done; writes nothing.

    Raises:
        InputError: opset not on offer, a sample that does not fit, or an engine that cannot be built as asked.
        LoweringError: the lowering is impossible for this layer.
        BundleError: ``out`` may not be written.
        ParityError: the sample is not what the layer computes.
        MissingDependencyError: onnxruntime is needed to judge the export and is not installed.
    """
    check_opset(recipe.opset)
    lowering = choose(recipe.lowering, checkpoint.spec, recipe.interface)
    check_target(out, force)
    if set(recipe.precision) != {"bf16"}:
        onnxruntime()  # absent, it should not be missed only after the trace
    if expected:
        expect.fit(expected, checkpoint.spec, recipe.interface)
        expect.check(expected, checkpoint)
    if recipe.engine is None:
        if recipe.profile:
            raise InputError("an optimization profile without an engine: give --engine rtx or --engine tensorrt as well")
        return Plan(recipe, checkpoint, lowering, out, force, expected or {})
    engine = engines.plan(recipe.engine, recipe.profile, recipe.dims, recipe.precision)
    recipe = recipe.model_copy(update={"precision": tuple(dict.fromkeys((*recipe.precision, engine.precision)))})
    return Plan(recipe, checkpoint, lowering, out, force, expected or {}, engine)


def run(plan: Plan, progress: Progress, keep_failed: bool = False) -> tuple[Verdict, ...]:
    """Do the work of a plan.

    Args:
        plan: from :func:`make_plan`.
        progress: told about stages and cases.
        keep_failed: leave what failed parity beside ``plan.out``, as ``<out>.failed``.

    Returns:
        The verdict of each model; all of them passed.

    Raises:
        ExportError: the ONNX file could not be made as asked.
        ParityError: a model is not the same function; nothing is at ``plan.out``.
        EngineError: the engine could not be built; nothing is at ``plan.out``.
        BundleError: another process writes the same bundle.
    """
    clock = Clock(progress)
    with staged(plan.out, plan.force) as directory:
        with clock.stage("weights"):
            write_weights(plan.checkpoint, directory / WEIGHTS_FILE)
        made = [_make_model(plan, precision, runtime, directory, clock) for precision, runtime in _forms(plan)]
        manifest = finish(plan, made, directory, clock)
        try:
            refuse_failures([verdict for _, verdict in made])
        except ParityError as error:
            raise (ParityError(f"{error}{_keep_failed(plan, directory)}") if keep_failed else error) from None
        if plan.engine is not None:
            engines.add(directory, manifest, plan.engine, clock)
        write_build(directory, {"seconds": clock.seconds})
    return tuple(verdict for _, verdict in made)


def _forms(plan: Plan) -> list[tuple[Precision, Runtime]]:
    """Return what to make: a portable model of each precision, then what one runtime alone can run."""
    forms: list[tuple[Precision, Runtime]] = [(p, "portable") for p in dict.fromkeys(plan.recipe.precision)]
    cpu: list[tuple[Precision, Runtime]] = [
        (precision, "onnxruntime-cpu")
        for precision, _ in forms
        if has_cpu_form(plan.lowering, precision, plan.recipe.interface)
    ]
    return forms + cpu


def reopen(bundle: Bundle, force: bool = True) -> Plan:
    """Return the plan that would make this bundle again, from its manifest and weights."""
    manifest, first = bundle.manifest, bundle.manifest.models[0]
    recipe = Recipe(
        inputs=InputsTable(**{name: getattr(manifest.interface, name) for name in InputsTable.model_fields}),
        outputs=OutputsTable(attention_maps=manifest.interface.attention_maps),
        dims=manifest.dims,
        opset=first.opset,
        precision=engines.precisions(manifest),
        keep_io_types=first.keep_io_types,
        parity=first.parity.scope,
        external_data_bytes=0 if first.external_data else EXTERNAL_DATA_BYTES,
    )
    checkpoint = Checkpoint(manifest.layer, read(bundle.path(WEIGHTS_FILE)))
    expected = expect.read(bundle.path(EXPECT_FILE)) if EXPECT_FILE in manifest.files else {}
    return Plan(recipe, checkpoint, first.lowering, bundle.directory, force, expected)


@plain_torch()
def add_model(plan: Plan, directory: Path, manifest: Manifest, precision: Precision, clock: Clock) -> Manifest:
    """Make the model of one more precision in a staged bundle, under the same parity rule as the others.

    Returns:
        The manifest with the model.

    Raises:
        ParityError: the new model is not the same function.
    """
    entry, verdict = _make_model(plan, precision, "portable", directory, clock)
    refuse_failures([verdict])
    models = (*manifest.models, entry)
    _write_selftest(plan, directory, models, clock)
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


def _make_model(
    plan: Plan, precision: Precision, runtime: Runtime, directory: Path, clock: Clock
) -> tuple[ModelEntry, Verdict]:
    recipe, spec = plan.recipe, plan.checkpoint.spec
    name = precision if runtime == "portable" else f"{precision}.{runtime}"
    path = directory / "models" / f"{name}.onnx"
    path.parent.mkdir(exist_ok=True)
    with clock.stage(f"trace {name}"):
        maps = recipe.interface.attention_maps
        masked = recipe.interface.masked
        lowered = lower(plan.checkpoint, plan.lowering, precision, recipe.keep_io_types, maps, runtime, masked)
        model = trace(lowered, spec, recipe.interface, recipe.opset, _metadata(plan, precision), runtime)
        write(model, path, recipe.external_data_bytes)
    return _judge(plan, precision, runtime, path, len(model.graph), clock)


def _judge(
    plan: Plan, precision: Precision, runtime: Runtime, path: Path, nodes: int, clock: Clock
) -> tuple[ModelEntry, Verdict]:
    recipe, spec = plan.recipe, plan.checkpoint.spec
    subject = Subject(path, plan.checkpoint, recipe.interface, recipe.dims, precision, recipe.keep_io_types)
    with clock.stage(f"parity {path.stem}"):
        verdict = judge(subject, recipe.parity, clock.progress.steps, yardstick=plan.yardstick(precision))
        if plan.expected:
            inputs = expect.inputs_of(plan.expected, spec, recipe.interface)
            verdict = verdict.joined(judge_inputs(subject, {EXPECT_FILE: inputs}))
    return _model_entry(plan, precision, runtime, path, nodes, verdict), verdict


def _metadata(plan: Plan, precision: Precision) -> dict[str, str]:
    return {
        "producer": f"bca-deploy {_version('bca-deploy')}",
        "layer": json.dumps(asdict(plan.checkpoint.spec), sort_keys=True),
        "lowering": plan.lowering,
        "precision": precision,
        "dead_rows": "a row that is masked, or that has no live key, is the mean over all values",
    }


def _model_entry(plan: Plan, precision: Precision, runtime: Runtime, path: Path, nodes: int, verdict: Verdict) -> ModelEntry:
    data = path.with_name(f"{path.name}.data")
    recipe, spec = plan.recipe, plan.checkpoint.spec
    return ModelEntry(
        file=f"models/{path.name}",
        runtime=runtime,
        opset=recipe.opset,
        precision=precision,
        lowering=plan.lowering,
        keep_io_types=recipe.keep_io_types,
        nodes=nodes,
        external_data=f"models/{data.name}" if data.exists() else None,
        inputs=_tensors(recipe.interface.inputs(spec), precision, recipe.keep_io_types),
        outputs=_tensors(recipe.interface.outputs(spec), precision, recipe.keep_io_types),
        parity=ParityEntry(
            passed=bool(verdict),
            scope=recipe.parity,
            cases=verdict.cases,
            runtimes=tuple(dict.fromkeys(result.runtime for result in verdict.results)),
            worst_ratio=significant(verdict.worst_ratio),
        ),
    )


def _tensors(axes: Mapping[str, tuple[Axis, ...]], precision: Precision, keep_io_types: bool) -> tuple[TensorEntry, ...]:
    edge = "float32" if keep_io_types else DTYPE_OF[precision]
    kinds = {name: "bool" if name.endswith("mask") else edge for name in axes}
    return tuple(TensorEntry.model_validate({"name": name, "dtype": kinds[name], "axes": axes[name]}) for name in axes)


def finish(plan: Plan, made: list[tuple[ModelEntry, Verdict]], directory: Path, clock: Clock) -> Manifest:
    """Write what goes with the models, and last the manifest that lists it all.

    Returns:
        The manifest; it holds no engines yet.
    """
    models = tuple(entry for entry, _ in made)
    _write_selftest(plan, directory, models, clock)
    if plan.expected:
        np.savez(directory / EXPECT_FILE, **plan.expected)  # type: ignore[arg-type]
    write_json(directory / PARITY_FILE, {"models": [report(verdict) for _, verdict in made]})
    manifest = Manifest(
        format=FORMAT,
        layer=plan.checkpoint.spec,
        interface=plan.recipe.interface,
        dims=plan.recipe.dims,
        models=models,
        engines=(),
        versions={name: _version(name) for name in ("bca-deploy", "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")},
        files={},
    )
    return seal(directory, manifest)


def _write_selftest(plan: Plan, directory: Path, models: tuple[ModelEntry, ...], clock: Clock) -> None:
    with clock.stage("self-test"):
        precisions = list(dict.fromkeys(model.precision for model in models))
        arrays = selftest.make(plan.checkpoint, plan.recipe.interface, plan.recipe.dims, precisions)
        np.savez(directory / SELFTEST_FILE, **arrays)  # type: ignore[arg-type]


def _keep_failed(plan: Plan, directory: Path) -> str:
    """Copy the failed bundle beside its place; return what to add to the message where that is impossible."""
    try:
        with staged(plan.out.with_name(f"{plan.out.name}.failed"), force=True) as target:
            shutil.copytree(directory, target, dirs_exist_ok=True)
    except BundleError as error:
        return f"\nand it could not be kept: {error}"
    return ""


def _version(package: str) -> str:
    names = ("onnxruntime", "onnxruntime-gpu") if package == "onnxruntime" else (package,)
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"
