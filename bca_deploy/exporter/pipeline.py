"""The main job in its order: weights, models and their verdicts, bundle, engine; in its place whole, or not at all."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.write import staged, write_build
from bca_deploy.engines import build as engines
from bca_deploy.errors import BundleError, InputError, ParityError, nearest
from bca_deploy.exporter import models
from bca_deploy.exporter.layer_source import LayerSource
from bca_deploy.exporter.model_source import read_model
from bca_deploy.exporter.plan import Plan, layer_source, make_plan
from bca_deploy.exporter.recipe import ModelTable, Recipe, read_recipe
from bca_deploy.exporter.source import Source
from bca_deploy.layers.checkpoint import from_module
from bca_deploy.layers.isolation import plain_torch
from bca_deploy.layers.lowered_model import choose
from bca_deploy.parity.verdict import Verdict
from bca_deploy.progress import Clock, Progress, Silent
from bca_deploy.whole import proof
from bca_deploy.whole.calls import unwrapped


@plain_torch()
def export(  # noqa: PLR0913  (one parameter per option)
    module: nn.Module,
    out: str | Path,
    *,
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    heads: int | None = None,
    prefix: str = "",
    recipe: str | Path | None = None,
    force: bool = False,
    keep_failed: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Bundle:
    """Export a live module: a whole model with the layer somewhere in it, or the layer alone.

    A whole model is given with samples of its inputs, ``inputs=[a, b]``. Every layer in it is found, held against the reference
    with its weights, in float64 and over every combination of its optional inputs, and gives its place to its lowered form; the
    graph is then held against the untouched model. The layer alone (the seed's, the published package's, or its transformer)
    needs no samples; its own outputs on a few inputs are stored in the bundle.

    Args:
        module: the trained module; it is not changed.
        out: the bundle's directory, or a ``.bca`` archive.
        inputs: samples of a whole model, each a dict by forward's argument names or a tuple in order. Where two differ in size
            an axis is dynamic; with one, say which are: ``axes={"video": ("batch", "video_len", None)}``. A mapping is the
            recipe's table of the bare layer's inputs.
        heads: of the bare layer; needed only where the module has no ``heads`` attribute.
        prefix: which part of the module to export, such as ``encoder.cross``; all of it where empty.
        recipe: a recipe file; its ``[layer]`` must agree with the bare layer.
        force: replace an existing bundle.
        keep_failed: leave what failed parity as ``<out>.failed``.
        progress: told about stages and cases.
        **options: keys of a recipe, nested tables as dicts: ``opset=18, precision=["fp16"], dims={"batch": (1, 4, 8)}``; of a
            whole model also those of ``[model]``: ``axes``, ``masks``, ``ranges``, ``keep_literal``, ``allow_none``.

    Returns:
        The bundle, open.

    Raises:
        BcaError: see errors.py; nothing is left at ``out``.
    """
    module = _part(module, prefix)
    path, progress = Path(recipe) if recipe else None, progress or Silent()
    if inputs is None or isinstance(inputs, Mapping):
        read = read_recipe(path, {**options, "inputs": inputs})
        source: Callable[[], Source] = partial(_bare, module, heads, read)
    else:
        table = {name: options.pop(name) for name in list(options) if name in ModelTable.model_fields}
        read = read_recipe(path, {**options, "model": {"allow_none": False, **table}})
        source = partial(read_model, module, inputs, read, progress)
    run(make_plan(read, source, Path(out), force), progress, keep_failed)
    return Bundle.open(out)


def _part(module: nn.Module, prefix: str) -> nn.Module:
    if not prefix or not isinstance(module, nn.Module):  # no module is refused further on, with the way out
        return module
    try:
        return unwrapped(module).get_submodule(prefix.removesuffix("."))
    except AttributeError as error:
        parts = [name for name, _ in module.named_modules()]
        told = f"the {type(module).__name__} has no such part{nearest(prefix, parts)}"
        raise InputError(f"prefix {prefix!r}: {told}; give the path of a module in it") from error


def _bare(module: nn.Module, heads: int | None, recipe: Recipe) -> LayerSource:
    """Return the layer that a module is, held against the reference, with a sample of its own outputs."""
    checkpoint = from_module(module, heads)
    if checkpoint.spec.family != "seed":
        raise InputError(
            f"{checkpoint.spec.kin.title} is exported as a whole model, with samples of its own inputs: "
            "export(module, out, inputs=[a, b])"
        )
    choose(recipe.lowering, checkpoint.spec, recipe.interface)  # before the module is run, which may be impossible too
    module = unwrapped(module)
    proof.check(module, checkpoint, recipe.interface)
    expected = proof.sample_of(module, checkpoint, recipe.interface, recipe.ranges)
    return replace(layer_source(recipe, checkpoint, expected), trust="live-module")


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
    plan, tuned = models.tune(plan, clock) if plan.recipe.tune else (plan, None)
    with staged(plan.out, plan.force) as directory:
        with clock.stage("weights"):
            plan.source.write_files(directory)
        forms = plan.source.forms(plan.recipe.precision)
        made = [models.make_model(plan, precision, runtime, directory, clock) for precision, runtime in forms]
        manifest = models.finish(plan, made, directory, clock)
        try:
            models.refuse_failures([verdict for _, verdict in made])
        except ParityError as error:
            raise (ParityError(f"{error}{_keep_failed(plan, directory)}") if keep_failed else error) from None
        if plan.engine is not None:
            engines.add(directory, manifest, plan.engine, clock)
        write_build(directory, {"seconds": clock.seconds} | ({"tuned": asdict(tuned)} if tuned else {}))
    return tuple(verdict for _, verdict in made)


def _keep_failed(plan: Plan, directory: Path) -> str:
    """Copy the failed bundle beside its place; return what to add to the message where that is impossible."""
    try:
        with staged(plan.out.with_name(f"{plan.out.name}.failed"), force=True) as target:
            shutil.copytree(directory, target, dirs_exist_ok=True)
    except BundleError as error:
        return f"\nand it could not be kept: {error}"
    return ""
