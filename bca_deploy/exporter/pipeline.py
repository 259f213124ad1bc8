"""The main job in its order: weights, models and their verdicts, bundle, engine; in its place whole, or not at all."""

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from bca_deploy.bundle.manifest import (
    WEIGHTS_FILE,
)
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.write import staged, write_build
from bca_deploy.engines import build as engines
from bca_deploy.errors import BundleError, ParityError
from bca_deploy.exporter import models
from bca_deploy.exporter.plan import Plan, make_plan
from bca_deploy.exporter.recipe import read_recipe
from bca_deploy.layers.checkpoint import from_module
from bca_deploy.layers.isolation import plain_torch
from bca_deploy.layers.lowered_model import choose, has_cpu_form
from bca_deploy.parity.verdict import Verdict
from bca_deploy.progress import Clock, Progress, Silent
from bca_deploy.spec import Precision, Runtime
from bca_deploy.whole import proof


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

    Before anything is made, the module is held against the layer with its weights, in float64 and over every combination of
    masks, bias and maps that the export has: a copy that does something else at dead rows is refused. Its own outputs on a
    few inputs are stored in the bundle.

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
    module = proof.unwrapped(module)
    proof.check(module, checkpoint, read.interface)
    expected = proof.sample_of(module, checkpoint, read.interface, read.ranges)
    run(make_plan(read, checkpoint, Path(out), force, expected), progress or Silent(), keep_failed)
    return Bundle.open(out)


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
            models.write_weights(plan.checkpoint, directory / WEIGHTS_FILE)
        made = [models.make_model(plan, precision, runtime, directory, clock) for precision, runtime in _forms(plan)]
        manifest = models.finish(plan, made, directory, clock)
        try:
            models.refuse_failures([verdict for _, verdict in made])
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


def _keep_failed(plan: Plan, directory: Path) -> str:
    """Copy the failed bundle beside its place; return what to add to the message where that is impossible."""
    try:
        with staged(plan.out.with_name(f"{plan.out.name}.failed"), force=True) as target:
            shutil.copytree(directory, target, dirs_exist_ok=True)
    except BundleError as error:
        return f"\nand it could not be kept: {error}"
    return ""
