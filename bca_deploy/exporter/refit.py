"""`bca refit`: new weights for the same layer or model, through the whole bundle: models, parity, self-test and engines."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from bca_deploy.bundle.engine_options import EngineTable
from bca_deploy.bundle.manifest import EXPECT_FILE, EngineEntry, Manifest, ModelEntry, model_of
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.write import revised, write_build
from bca_deploy.engines import build as engines
from bca_deploy.engines import libraries
from bca_deploy.engines.build import EnginePlan
from bca_deploy.engines.builder_process import Request
from bca_deploy.engines.compile import compile_engine
from bca_deploy.errors import EngineError, InputError
from bca_deploy.exporter import models
from bca_deploy.exporter.layer_source import LayerSource
from bca_deploy.exporter.model_source import read_again
from bca_deploy.exporter.plan import Plan, recipe_of, source_of
from bca_deploy.exporter.recipe import Recipe
from bca_deploy.exporter.source import Source
from bca_deploy.exporter.wholes.trace_source import with_weights
from bca_deploy.layers.checkpoint import Checkpoint, load
from bca_deploy.layers.isolation import plain_torch
from bca_deploy.parity import user_sample
from bca_deploy.parity.verdict import Verdict
from bca_deploy.progress import Clock, Progress, Silent
from bca_deploy.whole.factory import load_into


@plain_torch()
def refit(
    bundle: str | Path,
    checkpoint: str | Path,
    *,
    prefix: str = "",
    model: nn.Module | None = None,
    sample: str | Path | None = None,
    drop_sample: bool = False,
    progress: Progress | None = None,
) -> tuple[Verdict, ...]:
    """Put new weights into a bundle.

    Engines that were built refittable take the weights on their GPU; every other one is built again as it was.

    Args:
        bundle: its directory or archive; it is replaced whole, or not at all.
        checkpoint: the new weights; the layer must be the same.
        prefix: where the layer, or the whole model, is inside a bigger checkpoint.
        model: a whole model's code, where its bundle cannot do without; the checkpoint is loaded, strictly, into a copy.
        sample: ``.npz`` of inputs and outputs of the new weights, in place of the one that the bundle keeps.
        drop_sample: go without, though the bundle keeps one of the old weights.
        progress: told about stages and cases.

    Returns:
        The verdict of each model; all of them passed.

    Raises:
        BcaError: see errors.py; the bundle is as it was.
    """
    clock = Clock(progress or Silent())
    with revised(Path(bundle)) as (opened, directory):
        plans = [(entry, _engine_plan(entry, opened.manifest)) for entry in opened.manifest.engines]
        plan, make = _work(opened, Path(checkpoint), prefix, model, (sample, drop_sample), clock)
        (directory / EXPECT_FILE).unlink(missing_ok=True)
        plan.source.write_files(directory)
        made = [make(entry, directory) for entry in opened.manifest.models]
        manifest = models.finish(plan, made, directory, clock)
        models.refuse_failures(verdict for _, verdict in made)
        for entry, wanted in plans:
            manifest = _renew(directory, manifest, entry, wanted, clock)
        write_build(directory, {"seconds": clock.seconds})
    return tuple(verdict for _, verdict in made)


#: Puts the new weights into one staged model, and judges it.
_Make = Callable[[ModelEntry, Path], tuple[ModelEntry, Verdict]]


def _work(
    bundle: Bundle, path: Path, prefix: str, model: nn.Module | None, kept: tuple[str | Path | None, bool], clock: Clock
) -> tuple[Plan, _Make]:
    """Return the plan of the bundle with the new weights, and what makes its models."""
    if model is None and bundle.manifest.interface is None:
        if kept != (None, False):
            raise InputError(
                "--expect and --drop-expect are of bundles of a bare layer; a whole model's samples stay what they are"
            )
        return _remade(bundle, *with_weights(bundle, path, prefix), clock)
    if model is None:
        layer = _layer(bundle, path, prefix, *kept)
        plan = Plan(recipe_of(bundle), layer, bundle.directory, force=True)
        return plan, lambda entry, directory: _refitted(plan, layer, entry, directory, clock)
    renewed = copy.deepcopy(model)
    load_into(renewed, path, prefix)
    recipe, source = read_again(bundle, renewed, clock.progress)
    if [(e.path, e.spec) for e in source.layers] != [(e.path, e.spec) for e in bundle.manifest.layers]:
        raise InputError("the model has other layers than the bundle; export it as a new bundle")
    return _remade(bundle, recipe, source, clock)


def _remade(bundle: Bundle, recipe: Recipe, source: Source, clock: Clock) -> tuple[Plan, _Make]:
    plan = Plan(recipe, source, bundle.directory, force=True)
    return plan, lambda entry, directory: models.make_model(plan, entry.precision, entry.runtime, directory, clock)


def _refitted(plan: Plan, layer: LayerSource, model: ModelEntry, directory: Path, clock: Clock) -> tuple[ModelEntry, Verdict]:
    path = directory / model.file
    made = layer.refit(model.precision, model.runtime, path, plan.recipe, clock)
    return models.model_entry(plan, model.precision, model.runtime, path, made), made.verdict


def _layer(bundle: Bundle, path: Path, prefix: str, sample: str | Path | None, drop_sample: bool) -> LayerSource:
    layer = source_of(bundle)
    old = layer.checkpoint.spec
    new = load(path, old.heads, prefix)
    new = Checkpoint(replace(new.spec, norm_eps=old.norm_eps), new.state)  # a file of weights does not say it
    if new.spec != old:
        raise InputError(f"the checkpoint holds another layer ({new.spec}) than the bundle ({old}); export it as a new bundle")
    if layer.expected and sample is None and not drop_sample:
        raise InputError(
            f"the bundle keeps a sample of the old weights ({EXPECT_FILE}); give --expect with one of the new, or --drop-expect"
        )
    expected = user_sample.read(Path(sample)) if sample else {}
    if expected:
        user_sample.fit(expected, new.spec, layer.interface)
        user_sample.check(expected, new)
    return replace(layer, checkpoint=new, expected=expected, trust="sample" if expected else "on-trust")


def _engine_plan(entry: EngineEntry, manifest: Manifest) -> EnginePlan:
    """Return the plan that made an engine, checked for this machine before any work."""
    how = entry.options.model_dump()
    table = EngineTable(library=entry.library, targets=entry.targets, precision=entry.precision, **how)
    wanted = engines.plan(table, (), manifest.signature.dims, (entry.precision,))
    if wanted.gpu is not None and entry.gpu is not None and wanted.gpu.name != entry.gpu.name:
        raise EngineError(f"{entry.file} is for {entry.gpu.name}, and here is {wanted.gpu.name}; refit the bundle there")
    return replace(wanted, profiles=entry.profiles)


def _renew(directory: Path, manifest: Manifest, entry: EngineEntry, wanted: EnginePlan, clock: Clock) -> Manifest:
    if not entry.options.refittable:  # a stripped engine, too, only ever takes the weights that it was built with
        return engines.add(directory, manifest, wanted, clock)
    model = model_of(manifest, entry.precision)
    place = str(directory / entry.file)
    module = libraries.LIBRARIES[entry.library].module
    request = Request(module, str(directory / model.file), place, options=wanted.options.model_dump(mode="json"), refit=place)
    with clock.stage(f"refit {entry.library} {entry.precision}"):
        built = compile_engine(request, entry.options.time_limit_s, lambda share: None)
    fresh = entry.model_copy(update={"model_sha256": manifest.files[model.file].sha256, "version": built.facts.version})
    return engines.record(directory, manifest, fresh, built)
