"""The main job: plan, lower, trace, judge, and leave a bundle. Everything that can be refused is refused before any work."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bca_deploy import expect, selftest
from bca_deploy.attention import build
from bca_deploy.bundle import Bundle, sha256
from bca_deploy.cases import NUMPY_DTYPES
from bca_deploy.checkpoint import Checkpoint, from_module, load
from bca_deploy.errors import BundleError, InputError, ParityError
from bca_deploy.lowering import choose, lower
from bca_deploy.manifest import (
    BUILD_FILE,
    EXPECT_FILE,
    FORMAT,
    MANIFEST_FILE,
    PARITY_FILE,
    SELFTEST_FILE,
    WEIGHTS_FILE,
    FileEntry,
    Manifest,
    ModelEntry,
    ParityEntry,
    TensorEntry,
)
from bca_deploy.onnx_graph import check_opset, trace, write
from bca_deploy.parity import Subject, judge, judge_inputs
from bca_deploy.recipe import LayerTable, Recipe, read_recipe
from bca_deploy.runners import onnxruntime
from bca_deploy.spec import Axis, LayerSpec, Lowering, Precision
from bca_deploy.store import check_target, staged
from bca_deploy.verdict import Verdict, report, significant

Arrays = dict[str, NDArray[Any]]


class Progress(Protocol):
    """Told what is going on; the command line draws it."""

    def stage(self, name: str) -> None:
        """Say which stage begins."""

    def cases(self, done: int, total: int) -> None:
        """Say how many parity cases of the running model are done."""


class Silent:
    """A progress that says nothing."""

    def stage(self, name: str) -> None:
        """Ignore it."""

    def cases(self, done: int, total: int) -> None:
        """Ignore it."""


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
    """

    recipe: Recipe
    checkpoint: Checkpoint
    lowering: Lowering
    out: Path
    force: bool = False
    expected: Arrays = field(default_factory=dict)


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
        InputError: opset not on offer, or a sample that does not fit.
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
    return Plan(recipe, checkpoint, lowering, out, force, expected or {})


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
        BundleError: another process writes the same bundle.
    """
    clock = _Clock(progress)
    with staged(plan.out, plan.force) as directory:
        with clock.stage("weights"):
            _write_weights(plan.checkpoint, directory / WEIGHTS_FILE)
        made = [_make_model(plan, precision, directory, clock) for precision in dict.fromkeys(plan.recipe.precision)]
        verdicts = tuple(verdict for _, verdict in made)
        _finish(plan, [entry for entry, _ in made], verdicts, directory, clock)
        failures = [failure for verdict in verdicts for failure in verdict.failures]
        if failures:
            shown = "\n  ".join(failures[:8])
            message = f"the exported model is not the PyTorch layer ({len(failures)} failures):\n  {shown}"
            if keep_failed:
                try:
                    _keep_failed(plan, directory)
                except BundleError as error:
                    message += f"\nand it could not be kept: {error}"
            raise ParityError(message)
    return verdicts


def _write_weights(checkpoint: Checkpoint, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(checkpoint.state, path)


def _make_model(plan: Plan, precision: Precision, directory: Path, clock: "_Clock") -> tuple[ModelEntry, Verdict]:
    recipe, spec = plan.recipe, plan.checkpoint.spec
    path = directory / "models" / f"{precision}.onnx"
    path.parent.mkdir(exist_ok=True)
    with clock.stage(f"trace {precision}"):
        lowered = lower(plan.checkpoint, plan.lowering, precision, recipe.keep_io_types, recipe.interface.attention_maps)
        model = trace(lowered, spec, recipe.interface, recipe.opset, _metadata(plan, precision))
        write(model, path, recipe.external_data_bytes)
    subject = Subject(path, plan.checkpoint, recipe.interface, recipe.dims, precision, recipe.keep_io_types)
    with clock.stage(f"parity {precision}"):
        verdict = judge(subject, recipe.parity, clock.progress.cases)
        if plan.expected:
            inputs = expect.inputs_of(plan.expected, spec, recipe.interface)
            verdict = verdict.joined(judge_inputs(subject, {EXPECT_FILE: inputs}))
    return _model_entry(plan, precision, path, len(model.graph), verdict), verdict


def _metadata(plan: Plan, precision: Precision) -> dict[str, str]:
    return {
        "producer": f"bca-deploy {_version('bca-deploy')}",
        "layer": json.dumps(asdict(plan.checkpoint.spec), sort_keys=True),
        "lowering": plan.lowering,
        "precision": precision,
        "dead_rows": "a row that is masked, or that has no live key, is the mean over all values",
    }


def _model_entry(plan: Plan, precision: Precision, path: Path, nodes: int, verdict: Verdict) -> ModelEntry:
    data = path.with_name(f"{path.name}.data")
    recipe, spec = plan.recipe, plan.checkpoint.spec
    return ModelEntry(
        file=f"models/{path.name}",
        runtime="portable",
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
    edge = "float32" if keep_io_types else np.dtype(NUMPY_DTYPES[precision]).name
    kinds = {name: "bool" if name.endswith("mask") else edge for name in axes}
    return tuple(TensorEntry.model_validate({"name": name, "dtype": kinds[name], "axes": axes[name]}) for name in axes)


def _finish(plan: Plan, models: list[ModelEntry], verdicts: tuple[Verdict, ...], directory: Path, clock: "_Clock") -> None:
    """Write what goes with the models, and last the manifest that lists it all."""
    recipe = plan.recipe
    with clock.stage("self-test"):
        arrays = selftest.make(plan.checkpoint, recipe.interface, recipe.dims, [m.precision for m in models])
        np.savez(directory / SELFTEST_FILE, **arrays)  # type: ignore[arg-type]
    if plan.expected:
        np.savez(directory / EXPECT_FILE, **plan.expected)  # type: ignore[arg-type]
    _write_json(directory / PARITY_FILE, {"models": [report(verdict) for verdict in verdicts]})
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    manifest = Manifest(
        format=FORMAT,
        layer=plan.checkpoint.spec,
        interface=recipe.interface,
        dims=recipe.dims,
        models=tuple(models),
        engines=(),
        versions={name: _version(name) for name in ("bca-deploy", "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")},
        files={n: FileEntry(bytes=(directory / n).stat().st_size, sha256=sha256(directory / n)) for n in names},
    )
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    _write_json(directory / BUILD_FILE, {"seconds": clock.seconds, "finished_unix_s": round(time.time(), 3)})


def _write_json(path: Path, content: Any) -> None:
    # JSON has no NaN or Infinity: they become strings, so that every reader takes the file.
    safe = json.loads(json.dumps(content), parse_constant=str)
    path.write_text(json.dumps(safe, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _keep_failed(plan: Plan, directory: Path) -> None:
    with staged(plan.out.with_name(f"{plan.out.name}.failed"), force=True) as target:
        shutil.copytree(directory, target, dirs_exist_ok=True)


def _version(package: str) -> str:
    names = ("onnxruntime", "onnxruntime-gpu") if package == "onnxruntime" else (package,)
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


class _Clock:
    """Times the stages for build.json and passes them on."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress.stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
