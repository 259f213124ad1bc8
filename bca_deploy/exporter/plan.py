"""Decide everything before the work begins: what can be refused is refused here, and nothing is written."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from bca_deploy.bundle.manifest import EXPECT_FILE, WEIGHTS_FILE, precisions
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.write import check_target
from bca_deploy.engines import build as engines
from bca_deploy.engines.build import EnginePlan
from bca_deploy.errors import InputError
from bca_deploy.exporter.recipe import DimsTable, InputsTable, LayerTable, OutputsTable, Recipe
from bca_deploy.layers.checkpoint import Checkpoint, from_module, load, read
from bca_deploy.layers.lowered_model import choose
from bca_deploy.layers.reference import build
from bca_deploy.optional import onnxruntime
from bca_deploy.parity import user_sample
from bca_deploy.parity.yardstick import Yardstick
from bca_deploy.signature import Signature
from bca_deploy.spec import EXTERNAL_DATA_BYTES, LayerSpec, Lowering, Precision, layer_signature
from bca_deploy.tracing.graph import check_opset, check_precision

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

    @property
    def signature(self) -> Signature:
        """What every model takes and gives."""
        return layer_signature(self.checkpoint.spec, self.recipe.interface, self.recipe.ranges)

    def yardstick(self, precision: Precision) -> Yardstick:
        """Return what every model of a precision is held against, made on first use."""
        if precision not in self._yardsticks:
            self._yardsticks[precision] = Yardstick(self.checkpoint, self.recipe.interface, precision)
        return self._yardsticks[precision]


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


def make_plan(recipe: Recipe, checkpoint: Checkpoint, out: Path, force: bool = False, expected: Arrays | None = None) -> Plan:
    """Decide everything and refuse what cannot be done; writes nothing.

    Raises:
        InputError: opset not on offer, or not for the precision, a sample that does not fit, or an engine that cannot be
            built as asked.
        LoweringError: the lowering is impossible for this layer.
        BundleError: ``out`` may not be written.
        ParityError: the sample is not what the layer computes.
        MissingDependencyError: onnxruntime is needed to judge the export and is not installed.
    """
    check_opset(recipe.opset)
    for precision in recipe.precision:
        check_precision(precision, recipe.opset, checkpoint.spec)
    lowering = choose(recipe.lowering, checkpoint.spec, recipe.interface)
    check_target(out, force)
    if set(recipe.precision) != {"bf16"}:
        onnxruntime()  # absent, it should not be missed only after the trace
    if expected:
        user_sample.fit(expected, checkpoint.spec, recipe.interface)
        user_sample.check(expected, checkpoint)
    if recipe.engine is None:
        if recipe.profile:
            raise InputError("an optimization profile without an engine: give --engine rtx or --engine tensorrt as well")
        return Plan(recipe, checkpoint, lowering, out, force, expected or {})
    engine = engines.plan(recipe.engine, recipe.profile, recipe.ranges, recipe.precision)
    check_precision(engine.precision, recipe.opset, checkpoint.spec)
    recipe = recipe.model_copy(update={"precision": tuple(dict.fromkeys((*recipe.precision, engine.precision)))})
    return Plan(recipe, checkpoint, lowering, out, force, expected or {}, engine)


def reopen(bundle: Bundle) -> Plan:
    """Return the plan that would make this bundle again, from its manifest and weights."""
    manifest, first = bundle.manifest, bundle.manifest.models[0]
    recipe = Recipe(
        inputs=InputsTable(**{name: getattr(manifest.interface, name) for name in InputsTable.model_fields}),
        outputs=OutputsTable(attention_maps=manifest.interface.attention_maps),
        dims=DimsTable(**manifest.signature.dims),
        opset=first.opset,
        precision=precisions(manifest),
        keep_io_types=first.keep_io_types,
        parity=first.parity.scope,
        external_data_bytes=0 if first.external_data else EXTERNAL_DATA_BYTES,
    )
    checkpoint = checkpoint_of(bundle)
    expected = user_sample.read(bundle.path(EXPECT_FILE)) if EXPECT_FILE in manifest.files else {}
    return Plan(recipe, checkpoint, first.lowering, bundle.directory, force=True, expected=expected)


def checkpoint_of(bundle: Bundle) -> Checkpoint:
    """Return a bundle's layer with its weights."""
    return Checkpoint(bundle.manifest.layer, read(bundle.path(WEIGHTS_FILE)))
