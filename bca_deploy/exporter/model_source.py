"""A whole model as what an export is made from: its layers found, proven and swapped, its truth by running it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import onnx
import onnx_ir as ir
import torch
from torch import nn

from bca_deploy.bundle.manifest import WEIGHTS_MAP_FILE, LayerEntry, ModelLowering, ProofEntry, cpu_lowering
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.trust import Trust
from bca_deploy.bundle.write import write_json
from bca_deploy.errors import BundleError, InputError
from bca_deploy.exporter.plan import recipe_of
from bca_deploy.exporter.recipe import ModelTable, Recipe
from bca_deploy.exporter.source import Made
from bca_deploy.exporter.wholes.memory import least_memory
from bca_deploy.exporter.wholes.source import WholeSource, drawn_cases, samples_of, trace_path
from bca_deploy.exporter.wholes.weights import WeightMap, folded_away, map_of, reached_by, tensors_of, unnamed
from bca_deploy.programs.read import ExportedModel
from bca_deploy.progress import Clock, Progress
from bca_deploy.signature import Axis, Dims, DType, Signature, Tensor
from bca_deploy.spec import Lowering, Precision, Runtime
from bca_deploy.tracing.hollow import filled, hollow, write_trace
from bca_deploy.tracing.program import Program
from bca_deploy.whole.axes import axes_of, ranges_of
from bca_deploy.whole.draws import Draws, draws_of
from bca_deploy.whole.find import Found, find
from bca_deploy.whole.samples import Sample, named_outputs, named_sample
from bca_deploy.whole.swap import plain_copy
from bca_deploy.whole.traceable import Subject, graph_of
from bca_deploy.whole.uses import Use, uses_of, with_lengths
from bca_deploy.whole_parity.cases import inputs_of
from bca_deploy.whole_parity.evaluate import Evaluator
from bca_deploy.whole_parity.from_trace import TraceEvaluator, why_not
from bca_deploy.whole_parity.traits import Laboratory
from bca_deploy.whole_parity.yardstick import Yardstick, refuse_random


@dataclass(frozen=True)
class ModelSource(WholeSource):
    """A whole model with its code.

    Attributes:
        name: of its class.
        subject: the model, its layers and its inputs.
        layers: the layers that were lowered.
        draws: of its inputs.
        samples: the user's.
        signature: what it takes and gives.
        table: what was said of the inputs.
        guessed: the dimensions whose ranges nobody gave.
        tries: sizes that the trace leaves in doubt, so that they must be run.
        weights: what a checkpoint for it must have.
        hollow: its float32 trace without weights.
        obstacle: why its trace cannot stand for it; None where it can.
        trust: what shows that it is what the user trained.
    """

    name: str
    subject: Subject
    layers: tuple[LayerEntry, ...]
    draws: Draws
    samples: tuple[Sample, ...]
    signature: Signature
    table: ModelTable
    guessed: tuple[str, ...]
    tries: tuple[Mapping[str, int], ...]
    weights: WeightMap
    hollow: onnx.ModelProto
    obstacle: str | None
    trust: Trust = "live-module"  # its own code is what it was held against
    _yardsticks: dict[Precision, Yardstick] = field(default_factory=dict, repr=False, compare=False)

    def lowering_for(self, runtime: Runtime) -> ModelLowering:
        """Return the form in the graphs for one runtime."""
        found = set(self._forms_for(runtime).values())
        return "none" if not found else "mixed" if len(found) > 1 else found.pop()

    def _forms_for(self, runtime: Runtime) -> dict[str, Lowering]:
        """Return the form of each layer: as for every runtime, but where one was chosen."""
        return {found.path: self.subject.uses[found.path].lowering(found, runtime) for found in self.subject.founds}

    @property
    def has_choice(self) -> bool:
        """Whether in any layer the literal form could take the fused one's place."""
        return any(self.subject.uses[found.path].has_choice(found) for found in self.subject.founds)

    def on_cpu(self, lowering: Lowering) -> "ModelSource":
        """Return the same with this form of every layer that has it, in the graph for onnxruntime on the CPU."""
        founds, uses = self.subject.founds, dict(self.subject.uses)
        uses |= {f.path: replace(uses[f.path], on_cpu=lowering) for f in founds if uses[f.path].has_choice(f)}
        weights = replace(self.weights, layers=tuple(replace(each, use=uses[each.path]) for each in self.weights.layers))
        return replace(self, subject=replace(self.subject, uses=uses), weights=weights)

    def make(self, precision: Precision, runtime: Runtime, path: Path, recipe: Recipe, clock: Clock) -> Made:
        """As :meth:`WholeSource.make`, for a model that the precision can hold.

        Raises:
            InputError: fp16, and the logits leave its range in a sample.
        """
        if precision == "fp16":
            for number, sample in enumerate(self.samples):
                arrays = {name: tensor.numpy() for name, tensor in sample.items()}
                self._yardstick(precision).check_range(arrays, f"sample {number + 1}")
        return super().make(precision, runtime, path, recipe, clock)

    def forms(self, precisions: Iterable[Precision]) -> list[tuple[Precision, Runtime]]:
        """Return what to make: a portable model of each precision, and in float32 what onnxruntime alone can run."""
        found: list[tuple[Precision, Runtime]] = [(precision, "portable") for precision in dict.fromkeys(precisions)]
        fast = any(self.subject.uses[each.path].has_cpu_form(each) for each in self.subject.founds)
        return [*found, ("fp32", "onnxruntime-cpu")] if fast and ("fp32", "portable") in found else found

    def write_files(self, directory: Path) -> None:
        """Write what goes with the models, and what a refit without the code needs: the float32 trace, too, for its truth."""
        super().write_files(directory)
        kept = self.weights.as_json() | {"tries": [dict(sizes) for sizes in self.tries], "obstacle": self.obstacle}
        write_json(directory / WEIGHTS_MAP_FILE, kept)
        write_trace(self.hollow, trace_path(directory / "models" / "fp32.onnx"))

    def _graph(self, precision: Precision, runtime: Runtime, trace: Path, recipe: Recipe) -> ir.Model:
        weights = self.weights.weights(tensors_of(self.subject.model), precision, runtime)
        held = self.hollow
        if (precision, runtime) != ("fp32", "portable"):
            traced, _ = self.subject.trace(precision, runtime, recipe.opset, recipe.keep_io_types)
            held, _ = hollow(traced, weights, unnamed(self.weights))
            write_trace(held, trace)
        return graph_of(filled(held, weights), precision, runtime, recipe.opset, recipe.keep_io_types)

    def _new_yardstick(self, precision: Precision) -> Yardstick:
        return Yardstick(self.subject.model, self.subject.founds, precision)


def _layer_entry(found: Found, use: Use) -> LayerEntry:
    proof = ProofEntry(cases=found.proof.cases, worst=found.proof.worst)
    form, why = use.lowering(found), use.reason(found)
    return LayerEntry(path=found.path, spec=found.checkpoint.spec, lowering=form, why=why, calls=use.calls, proof=proof)


#: For each layer of absorbed projections its form in the graphs for engines, and what it was chosen by.
_Forms = Mapping[str, tuple[Lowering, str | None]]


def read_model(
    model: nn.Module, given: Sequence[Any], recipe: Recipe, progress: Progress, forms: _Forms | None = None
) -> ModelSource:
    """Find out everything about a whole model that an export needs; nothing is written, and the model is not changed.

    Args:
        model: any module.
        given: samples, each a dict by forward's argument names or a tuple in order.
        recipe: gives opset, the ranges of dimensions, and in ``[model]`` what the user says of the inputs.
        progress: told about stages.
        forms: as a bundle has them; None chooses by the memory that the planned engine needs, or by rule.

    Raises:
        InputError: samples or what is said of them do not fit, or the model is random.
        CheckpointError: it holds no layer, or one that cannot be taken.
        ParityError: a layer does something else than its weights say.
        ExportError: it cannot be traced for all of its dimensions' sizes, or has no form in the opset.
    """
    if not given:
        raise InputError("a whole model needs samples of its inputs; give two of different sizes")
    table = recipe.model or ModelTable()
    progress.stage("find and prove")
    plain = plain_copy(model)
    samples = tuple(named_sample(plain, each) for each in given)
    axes = axes_of(samples, table.given_axes)
    dims, guessed = ranges_of(samples, axes, recipe.given_ranges)
    if isinstance(plain, ExportedModel):
        plain.sizes.check(axes, dims)
    tensors = tuple(Tensor(name, _dtype(name, t), axes[name]) for name, t in samples[0].items())
    draws = draws_of(samples, tensors, table.masks, table.ranges)
    refuse_random(Evaluator(plain, (), torch.float32), {name: t.numpy() for name, t in samples[0].items()})
    founds = find(plain, table.keep_literal, table.allow_none)
    uses = with_lengths(plain, founds, uses_of(plain, founds, samples[0]), lambda: _longest(draws, dims))
    chosen = least_memory(founds, uses, _batch(draws, dims), recipe) if forms is None else forms
    uses |= {path: replace(uses[path], on_engine=form, why=why) for path, (form, why) in chosen.items()}
    progress.stage("trace")
    outputs = _outputs(plain, samples[0])
    subject = Subject(plain, founds, uses, draws, dims, tuple(outputs))
    traced, program = subject.trace("fp32", "portable", recipe.opset, recipe.keep_io_types)
    kinds = zip(outputs.items(), program.outputs, strict=False)  # those of layers come after
    signature = Signature(tensors, tuple(Tensor(name, kind, shape) for (name, kind), shape in kinds), dims)
    refined = Laboratory(plain, Evaluator(plain, (), torch.float64), draws).refine(signature)
    _check_largest(Evaluator(plain, (), torch.float32), draws, refined)
    weights = map_of(plain, founds, uses)
    values = weights.weights(tensors_of(plain), "fp32", "portable")
    held, unclear = hollow(traced, values, unnamed(weights))
    weights = replace(weights, folded=folded_away(plain, weights, reached_by(held, weights), unclear, samples[0]))
    yardstick = Yardstick(plain, founds, "fp32")
    mixed = inputs_of(drawn_cases(draws, refined)[-1], draws, samples, "fp32")  # live rows, padded ones and dead ones
    obstacle = why_not(TraceEvaluator(held, values, None, len(outputs)), yardstick, mixed)
    return ModelSource(
        name=type(plain).__name__,
        subject=subject,
        layers=tuple(_layer_entry(found, uses[found.path]) for found in founds),
        draws=draws,
        samples=samples,
        signature=refined,
        table=table,
        guessed=guessed,
        tries=_tries(program),
        weights=weights,
        hollow=held,
        obstacle=obstacle,
        _yardsticks={"fp32": yardstick},
    )


def read_again(bundle: Bundle, model: nn.Module, progress: Progress) -> tuple[Recipe, ModelSource]:
    """Return how a bundle was made, and the same model with the weights that it has now; errors as for :func:`read_model`.

    Raises:
        BundleError: the bundle is of a bare layer.
    """
    if bundle.manifest.interface is not None:
        raise BundleError(f"{bundle.source} holds a bare layer, with its weights; --model is for whole models")
    recipe = recipe_of(bundle)
    forms = {layer.path: (layer.lowering, layer.why) for layer in bundle.manifest.layers if layer.spec.kin.absorbed}
    source = read_model(model, samples_of(bundle), recipe, progress, forms)
    chosen = cpu_lowering(bundle.manifest)
    return recipe, source.on_cpu(chosen) if chosen else source


def _tries(program: Program) -> tuple[Mapping[str, int], ...]:
    """Return the sizes to run: 1 in each dimension that may have it, and what the trace says of others."""
    doubts = [sizes for doubt in program.doubts for sizes in doubt.tries]
    return (*({name: 1} for name in program.unsettled), *doubts)


def _lead(draws: Draws) -> Axis:
    """Return what is most often the batch, before it is known: what stands first in the first input."""
    return draws.tensors[0].axes[0] if draws.tensors[0].axes else 1


def _batch(draws: Draws, dims: Dims) -> int:
    lead = _lead(draws)
    return lead if isinstance(lead, int) else dims[lead].max


def _longest(draws: Draws, dims: Dims) -> Sample:
    """Return inputs of the largest sizes, few in a batch."""
    sizes = {name: r.min if name == _lead(draws) else r.max for name, r in dims.items()}
    return {name: torch.from_numpy(array) for name, array in draws.inputs(sizes, "all live", 0, "fp32").items()}


def _check_largest(evaluator: Evaluator, draws: Draws, signature: Signature) -> None:
    """Refuse sizes that PyTorch itself refuses: a table of positions that is too short leaves no trace in a graph.

    One entry alone, or the largest batch of the longest would take the machine's memory.
    """
    sizes = {name: r.min if name == signature.batch else r.max for name, r in signature.dims.items()}
    evaluator.run_as_usual(draws.inputs(sizes, "all live", 0, "fp32"))


def _dtype(name: str, tensor: torch.Tensor) -> DType:
    for known in get_args(DType):
        if tensor.dtype == getattr(torch, known):
            found: DType = known
            return found
    raise InputError(f"{name} is {tensor.dtype}; bundles have {', '.join(get_args(DType))}: cast it in the model")


def _outputs(model: nn.Module, sample: Sample) -> dict[str, DType]:
    """Return the element types of the outputs by name; none has an input's name."""
    with torch.no_grad():
        found = named_outputs(model(**{name: t.clone() for name, t in sample.items()}), sample)
    if not found:
        raise InputError("the model gives no tensor with the first sample; a graph has outputs that are tensors")
    return {name: _dtype(name, t) for name, t in found.items()}
