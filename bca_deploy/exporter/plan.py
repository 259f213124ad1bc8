"""Decide everything before the work begins: what can be refused is refused here, and nothing is written."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from bca_deploy.bundle.manifest import EXPECT_FILE, MODEL_FILE, WEIGHTS_FILE, cpu_lowering, precisions
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.trust import Trust
from bca_deploy.bundle.write import check_target
from bca_deploy.engines import build as engines
from bca_deploy.engines.build import EnginePlan
from bca_deploy.errors import BundleError, InputError
from bca_deploy.exporter.layer_source import LayerSource
from bca_deploy.exporter.recipe import DimsTable, InputsTable, LayerTable, ModelTable, OutputsTable, Recipe
from bca_deploy.exporter.source import Source
from bca_deploy.layers.checkpoint import Checkpoint, from_module, load
from bca_deploy.layers.lowered_model import choose
from bca_deploy.layers.reference import build
from bca_deploy.layers.stored.weight_files import read
from bca_deploy.optional import onnxruntime
from bca_deploy.parity import user_sample
from bca_deploy.spec import EXTERNAL_DATA_BYTES, Interface, LayerSpec
from bca_deploy.tracing.graph import check_opset

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Plan:
    """Everything decided before the work begins.

    Attributes:
        recipe: how to make it.
        source: what to make it from.
        out: the directory or ``.bca`` archive.
        force: replace an existing bundle.
        engine: what to compile after the models, where anything.
    """

    recipe: Recipe
    source: Source
    out: Path
    force: bool = False
    engine: EnginePlan | None = None


def load_checkpoint(recipe: Recipe, path: Path | None, heads: int | None, prefix: str = "") -> Checkpoint:
    """Return the layer from a file, or with seeded weights where there is no file.

    Raises:
        CheckpointError: see :func:`bca_deploy.layers.checkpoint.load`.
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


def layer_source(recipe: Recipe, checkpoint: Checkpoint, expected: Arrays | None = None) -> LayerSource:
    """Return the bare layer as what an export is made from.

    Raises:
        LoweringError: the lowering is impossible for this layer.
        InputError: a sample that does not fit.
        ParityError: the sample is not what the layer computes.
    """
    lowering = choose(recipe.lowering, checkpoint.spec, recipe.interface)
    if expected:
        user_sample.fit(expected, checkpoint.spec, recipe.interface)
        user_sample.check(expected, checkpoint)
    trust: Trust = "sample" if expected else "on-trust"
    return LayerSource(checkpoint, recipe.interface, recipe.ranges, lowering, expected or {}, trust)


def make_plan(recipe: Recipe, source: Callable[[], Source], out: Path, force: bool = False) -> Plan:
    """Decide everything and refuse what cannot be done; writes nothing.

    Args:
        recipe: how to make the bundle.
        source: gives what to make it from. That may take a trace, so it is asked when all else is known to be possible.
        out: the directory or ``.bca`` archive.
        force: replace an existing bundle.

    Raises:
        InputError: opset not on offer, or not for the precision, or an engine that cannot be built as asked.
        BundleError: ``out`` may not be written.
        MissingDependencyError: onnxruntime is needed to judge the export and is not installed.
    """
    check_opset(recipe.opset)
    check_target(out, force)
    if set(recipe.precision) != {"bf16"}:
        onnxruntime()  # absent, it should not be missed only after the trace
    if recipe.profile and recipe.engine is None:
        raise InputError("an optimization profile without an engine: give --engine rtx or --engine tensorrt as well")
    found = source()
    dims = found.signature.dims
    engine = engines.plan(recipe.engine, recipe.profile, dims, recipe.precision) if recipe.engine else None
    needed = (*recipe.precision, *([engine.precision] if engine else []))
    for precision in needed:
        found.check_precision(precision, recipe.opset)
    recipe = recipe.model_copy(update={"precision": tuple(dict.fromkeys(needed))})
    return Plan(recipe, found, out, force, engine)


def recipe_of(bundle: Bundle) -> Recipe:
    """Return the recipe that would make this bundle again."""
    manifest, first = bundle.manifest, bundle.manifest.models[0]
    return Recipe(
        **(_layer_tables(manifest.interface) if manifest.interface else {"model": _model_table(bundle)}),
        dims=DimsTable(**manifest.signature.dims),
        opset=first.opset,
        precision=precisions(manifest),
        keep_io_types=first.keep_io_types,
        parity=first.parity.scope,
        external_data_bytes=0 if first.external_data else EXTERNAL_DATA_BYTES,
    )


def _layer_tables(interface: Interface) -> dict[str, Any]:
    return {
        "inputs": InputsTable(**{name: getattr(interface, name) for name in InputsTable.model_fields}),
        "outputs": OutputsTable(attention_maps=interface.attention_maps),
    }


def _model_table(bundle: Bundle) -> ModelTable:
    said = json.loads(bundle.path(MODEL_FILE).read_text(encoding="utf-8"))
    return ModelTable(**said, axes={tensor.name: tensor.axes for tensor in bundle.manifest.signature.inputs})


def source_of(bundle: Bundle) -> LayerSource:
    """Return the layer that a bundle was made from, from its manifest and weights.

    Raises:
        BundleError: it holds a whole model, whose code it has not.
    """
    manifest, checkpoint = bundle.manifest, checkpoint_of(bundle)
    expected = user_sample.read(bundle.path(EXPECT_FILE)) if EXPECT_FILE in manifest.files else {}
    interface = manifest.interface or Interface()
    lowering = manifest.layers[0].lowering
    chosen = cpu_lowering(manifest)
    return LayerSource(checkpoint, interface, manifest.signature.dims, lowering, expected, manifest.trust, chosen)


def reopen(bundle: Bundle) -> Plan:
    """Return the plan that would make this bundle again; errors as for :func:`source_of`."""
    return Plan(recipe_of(bundle), source_of(bundle), bundle.directory, force=True)


def checkpoint_of(bundle: Bundle) -> Checkpoint:
    """Return a bundle's layer with its weights; errors as for :func:`source_of`."""
    manifest = bundle.manifest
    if manifest.layer is None:
        raise BundleError(
            f"{bundle.source} holds the whole model {manifest.source}, and not its code; give the code as well (bca "
            "refit and bca verify: --model pkg.module:factory), or export the model again with what you need"
        )
    return Checkpoint(manifest.layer, read(bundle.path(WEIGHTS_FILE)))
