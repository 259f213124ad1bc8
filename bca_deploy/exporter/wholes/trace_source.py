"""A whole model without its code: new weights in the traces that its bundle keeps."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import nn

from bca_deploy.bundle.manifest import WEIGHTS_MAP_FILE, LayerEntry, ModelEntry, ModelLowering
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.trust import Trust
from bca_deploy.errors import BundleError, InputError
from bca_deploy.exporter.plan import recipe_of
from bca_deploy.exporter.recipe import ModelTable, Recipe
from bca_deploy.exporter.wholes.source import WholeSource, samples_of, trace_path
from bca_deploy.exporter.wholes.weights import WeightMap, of_json
from bca_deploy.layers.lowered_model import DTYPES
from bca_deploy.layers.stored.weight_files import State
from bca_deploy.signature import Signature
from bca_deploy.spec import Lowering, Precision, Runtime
from bca_deploy.tracing.hollow import filled
from bca_deploy.whole.draws import Draws, draws_of
from bca_deploy.whole.factory import fitting
from bca_deploy.whole.samples import Sample, cast
from bca_deploy.whole.traceable import graph_of
from bca_deploy.whole_parity.from_trace import TraceEvaluator, TraceYardstick
from bca_deploy.whole_parity.traits import Laboratory
from bca_deploy.whole_parity.yardstick import Yardstick, widest_product


@dataclass(frozen=True)
class TraceSource(WholeSource):
    """A whole model without its code: the traces in its bundle, and new weights.

    Attributes:
        name: of its class.
        trust: what shows that the traces are what the user trained: the export, which had the code.
        signature: what it takes and gives.
        layers: the layers that were lowered.
        models: those that the bundle has.
        directory: of the bundle.
        samples: the user's.
        draws: of its inputs.
        table: what was said of the inputs.
        tries: as for :class:`ModelSource`.
        weights: what a checkpoint for it must have.
        state: the new weights.
    """

    name: str
    trust: Trust
    signature: Signature
    layers: tuple[LayerEntry, ...]
    models: tuple[ModelEntry, ...]
    directory: Path
    samples: tuple[Sample, ...]
    draws: Draws
    table: ModelTable
    tries: tuple[Mapping[str, int], ...]
    weights: WeightMap
    state: State
    _yardsticks: dict[Precision, Yardstick] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def guessed(self) -> tuple[str, ...]:
        """None: the bundle has all ranges."""
        return ()

    def lowering_for(self, runtime: Runtime) -> ModelLowering:
        """Return the form in the graphs for one runtime."""
        return next((model.lowering for model in self.models if model.runtime == runtime), self.models[0].lowering)

    def _forms_for(self, runtime: Runtime) -> dict[str, Lowering]:
        """Return the form of each layer in the graphs for one runtime."""
        return {each.path: each.lowering(runtime) for each in self.weights.layers}

    @property
    def has_choice(self) -> bool:
        """No: the traces are of the forms that were chosen."""
        return False

    def on_cpu(self, lowering: Lowering) -> "TraceSource":
        """Return the same: the traces are of the forms that were chosen."""
        del lowering
        return self

    def forms(self, precisions: Iterable[Precision]) -> list[tuple[Precision, Runtime]]:
        """Return those that the bundle has."""
        return [(model.precision, model.runtime) for model in self.models]

    def check_signature(self) -> None:
        """Refuse weights with which batch and masks are no longer what the signature says: a gate that was 0 hides much.

        Raises:
            InputError: naming the dimension.
        """
        laboratory = Laboratory(nn.Module(), self._evaluator(None, self.state), self.draws)
        if broken := laboratory.broken(self.signature):
            raise InputError(f"with these weights {broken[0]}, which servers rely on; export the model again")

    def _graph(self, precision: Precision, runtime: Runtime, trace: Path, recipe: Recipe) -> ir.Model:
        traced = filled(onnx.load(trace), self.weights.weights(self.state, precision, runtime))
        return graph_of(traced, precision, runtime, recipe.opset, recipe.keep_io_types)

    def _new_yardstick(self, precision: Precision) -> Yardstick:
        rounded = {name: cast(cast(t, DTYPES[precision]), torch.float32) for name, t in self.state.items()}
        exact, unrounded = (self._evaluator(None, state) for state in (rounded, self.state))
        own = self._evaluator(precision, self.state)
        return TraceYardstick(exact, own, unrounded, precision, widest_product(self.state))

    def _evaluator(self, precision: Precision | None, state: State) -> TraceEvaluator:
        traced = precision or "fp32"
        trace = onnx.load(trace_path(self.directory / "models" / f"{traced}.onnx"))
        return TraceEvaluator(trace, self.weights.weights(state, traced, "portable"), precision, len(self.signature.outputs))


def with_weights(bundle: Bundle, path: Path, prefix: str) -> tuple[Recipe, TraceSource]:
    """Return how a bundle of a whole model was made, and the model with the weights of a checkpoint; no code of it is needed.

    Raises:
        BundleError: the bundle keeps no traces.
        InputError: with these weights batch and masks are not what the signature says.
        CheckpointError: as for :func:`bca_deploy.whole.factory.load_into`; or entries that are tied differ, or one that is
            folded away has another value.
    """
    manifest = bundle.manifest
    if WEIGHTS_MAP_FILE not in manifest.files:
        raise BundleError(
            f"{bundle.source} holds the whole model {manifest.source}, and neither its code nor its traces; give the code as "
            "well (--model pkg.module:factory), or export the model again"
        )
    kept = json.loads(bundle.path(WEIGHTS_MAP_FILE).read_text(encoding="utf-8"))
    if kept["obstacle"]:
        raise BundleError(f"{bundle.source}: {kept['obstacle']}, so give the code as well: --model pkg.module:factory")
    weights = of_json(kept, {layer.path: layer.spec for layer in manifest.layers})
    state = weights.taken(fitting(weights.entries, path, prefix, manifest.source), path)
    recipe = recipe_of(bundle)
    table = recipe.model or ModelTable()
    samples = tuple({name: torch.from_numpy(a) for name, a in sample.items()} for sample in samples_of(bundle))
    draws = draws_of(samples, manifest.signature.inputs, table.masks, table.ranges)
    told = manifest.source, manifest.trust, manifest.signature, manifest.layers, manifest.models
    source = TraceSource(*told, bundle.directory, samples, draws, table, tuple(kept["tries"]), weights, state)
    source.check_signature()
    return recipe, source
