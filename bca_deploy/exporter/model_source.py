"""A whole model as what an export is made from: its layers found, proven and swapped, its truth by running it."""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from bca_deploy.bundle.manifest import (
    MODEL_FILE,
    SAMPLES_FILE,
    LayerEntry,
    ModelEntry,
    ModelLowering,
    ProofEntry,
    cpu_lowering,
)
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.trust import Trust
from bca_deploy.bundle.write import write_json
from bca_deploy.errors import BundleError, InputError
from bca_deploy.exporter.plan import recipe_of
from bca_deploy.exporter.recipe import ModelTable, Recipe
from bca_deploy.exporter.source import Made, package_version
from bca_deploy.files import read_arrays
from bca_deploy.parity.cases import Scope
from bca_deploy.parity.verdict import Verdict
from bca_deploy.programs.read import ExportedModel
from bca_deploy.progress import Clock, Progress
from bca_deploy.signature import DType, Signature, Tensor
from bca_deploy.spec import Interface, Lowering, Precision, Runtime
from bca_deploy.tracing.graph import remove_dead, write
from bca_deploy.tracing.program import Program
from bca_deploy.whole.axes import axes_of, ranges_of
from bca_deploy.whole.draws import PATTERNS, Draws, draws_of
from bca_deploy.whole.find import Found, find
from bca_deploy.whole.samples import Sample, named_outputs, named_sample
from bca_deploy.whole.swap import Use, plain_copy, uses_of
from bca_deploy.whole.traceable import Subject, distinct_sizes
from bca_deploy.whole_parity import judge
from bca_deploy.whole_parity.cases import Case, cases_of, inputs_of
from bca_deploy.whole_parity.evaluate import Evaluator
from bca_deploy.whole_parity.traits import Laboratory
from bca_deploy.whole_parity.yardstick import Yardstick, refuse_random

Arrays = dict[str, NDArray[Any]]
#: Called after each case with the number done and the total.
OnCase = Callable[[int, int], None]

# Of what was said of a model, what the bundle keeps: its axes are the signature's.
_KEPT = ("masks", "ranges", "keep_literal", "allow_none")
# Cases kept in the bundle beside the user's own.
_KEPT_SEED = 1_000


@dataclass(frozen=True)
class ModelSource:
    """A whole model.

    Attributes:
        name: of its class.
        subject: the model, its layers and its inputs.
        samples: the user's.
        signature: what it takes and gives.
        table: what was said of the inputs.
        guessed: the dimensions whose ranges nobody gave.
        tries: sizes that the trace leaves in doubt, so that they must be run.
    """

    name: str
    subject: Subject
    samples: tuple[Sample, ...]
    signature: Signature
    table: ModelTable
    guessed: tuple[str, ...]
    tries: tuple[Mapping[str, int], ...]
    _yardsticks: dict[Precision, Yardstick] = field(default_factory=dict, init=False, repr=False, compare=False)
    _traced: "dict[int, ir.Model]" = field(default_factory=dict, repr=False, compare=False)

    @property
    def layers(self) -> tuple[LayerEntry, ...]:
        """The layers that were lowered."""
        return tuple(_layer_entry(found, self.subject.uses[found.path]) for found in self.subject.founds)

    @property
    def trust(self) -> Trust:
        """Its own code is what it was held against."""
        return "live-module"

    @property
    def interface(self) -> Interface | None:
        """None: the bare layer's alone."""
        return None

    @property
    def lowering(self) -> ModelLowering:
        """The form of the attention in the graphs."""
        return self.lowering_for("portable")

    def lowering_for(self, runtime: Runtime) -> ModelLowering:
        """Return the form in the graphs for one runtime."""
        found = set(self._forms_for(runtime).values())
        return "none" if not found else "mixed" if len(found) > 1 else found.pop()

    def _forms_for(self, runtime: Runtime) -> dict[str, Lowering]:
        """Return the form of each layer: as for every runtime, but where one was chosen."""
        uses = self.subject.uses
        return {f.path: uses[f.path].lowering(f, runtime if uses[f.path].on_cpu else "portable") for f in self.subject.founds}

    @property
    def has_choice(self) -> bool:
        """Whether in any layer the literal form could take the fused one's place."""
        return any(self.subject.uses[found.path].has_choice(found) for found in self.subject.founds)

    def on_cpu(self, lowering: Lowering) -> "ModelSource":
        """Return the same with this form of every layer that has it, in the graph for onnxruntime on the CPU."""
        founds, uses = self.subject.founds, dict(self.subject.uses)
        uses |= {f.path: replace(uses[f.path], on_cpu=lowering) for f in founds if uses[f.path].has_choice(f)}
        return replace(self, subject=replace(self.subject, uses=uses))

    def usual_inputs(self) -> Arrays:
        """Return inputs of the sizes to tune for."""
        return self.subject.draws.inputs(self.signature.dims.at("opt"), "padded", 0, "fp32")

    def write(self, precision: Precision, runtime: Runtime, path: Path, recipe: Recipe) -> int:
        """Swap, trace and write one model, and judge nothing; return its nodes. Errors as for :meth:`make`."""
        model = self.subject.graph(precision, runtime, recipe.opset, recipe.keep_io_types)[0]
        _cut(model, len(self.signature.outputs))
        write(model, path, recipe.external_data_bytes)
        return len(model.graph)

    def check_precision(self, precision: Precision, opset: int) -> None:
        """Whether the opset takes the precision shows in the trace."""

    def forms(self, precisions: Iterable[Precision]) -> list[tuple[Precision, Runtime]]:
        """Return what to make: a portable model of each precision, and in float32 what onnxruntime alone can run."""
        found: list[tuple[Precision, Runtime]] = [(precision, "portable") for precision in dict.fromkeys(precisions)]
        fast = any(self.subject.uses[each.path].has_cpu_form(each) for each in self.subject.founds)
        return [*found, ("fp32", "onnxruntime-cpu")] if fast and ("fp32", "portable") in found else found

    def make(self, precision: Precision, runtime: Runtime, path: Path, recipe: Recipe, clock: Clock) -> Made:
        """Swap, trace, write and judge one model; errors as :func:`bca_deploy.tracing.graph.convert`."""
        with tempfile.TemporaryDirectory(prefix="bca-tapped-") as scratch:
            tapped = Path(scratch) / path.name
            with clock.stage(f"trace {path.stem}"):
                model = self._graph(precision, runtime, recipe)
                write(model, tapped, recipe.external_data_bytes)
                _cut(model, len(self.signature.outputs))
                write(model, path, recipe.external_data_bytes)
            with clock.stage(f"parity {path.stem}"):
                subject = judge.Subject(path, tapped, precision, recipe.keep_io_types)
                verdict = self._judge(subject, recipe.parity, clock.progress.steps)
        return Made(len(model.graph), verdict)

    def _graph(self, precision: Precision, runtime: Runtime, recipe: Recipe) -> ir.Model:
        first = self._traced.pop(recipe.opset, None) if (precision, runtime) == ("fp32", "portable") else None
        model = first or self.subject.graph(precision, runtime, recipe.opset, recipe.keep_io_types)[0]
        model.metadata_props.update(self._metadata(precision, runtime))
        return model

    def _yardstick(self, precision: Precision) -> Yardstick:
        if precision not in self._yardsticks:
            self._yardsticks[precision] = Yardstick(self.subject.model, self.subject.founds, precision)
        return self._yardsticks[precision]

    def _metadata(self, precision: Precision, runtime: Runtime) -> dict[str, str]:
        return {
            "producer": f"bca-deploy {package_version('bca-deploy')}",
            "model": self.name,
            "layers": json.dumps(self._forms_for(runtime), sort_keys=True),
            "precision": precision,
        }

    def selftest(self, precisions: Sequence[Precision]) -> Arrays:
        """Return the user's samples and a case of each pattern of masks, with their truth: enough to prove the models later."""
        arrays: Arrays = {}
        for precision in precisions:
            for case in self._kept():
                arrays |= self._one(precision, case)
        return arrays

    def _kept(self) -> list[Case]:
        sizes = tuple(distinct_sizes(self.signature.dims).items())
        patterns = PATTERNS if self.subject.draws.masks else PATTERNS[:1]
        drawn = [Case(pattern, sizes, pattern, _KEPT_SEED) for pattern in patterns]
        return [*(Case(f"sample {number + 1}", sample=number) for number in range(len(self.samples))), *drawn]

    def _one(self, precision: Precision, case: Case) -> Arrays:
        inputs = inputs_of(case, self.subject.draws, self.samples, precision)
        truth, bounds = self._yardstick(precision).truth_and_bounds(inputs)
        if not truth:
            return {}
        place = f"{precision}/{case.name.replace(' ', '-')}"
        found = {f"{place}/input/{name}": array for name, array in inputs.items()}
        found |= {f"{place}/output/{name}": array.astype(np.float64) for name, array in truth.items()}
        return found | {f"{place}/bound/{name}": np.array(bound) for name, bound in bounds.items()}

    def write_files(self, directory: Path) -> None:
        """Write the user's samples and what was said of them: with the code, the models can be made again."""
        arrays = {f"{number}/{name}": t.numpy() for number, sample in enumerate(self.samples) for name, t in sample.items()}
        np.savez(directory / SAMPLES_FILE, **arrays)  # type: ignore[arg-type]
        write_json(directory / MODEL_FILE, self.table.model_dump(mode="json", include=set(_KEPT)))

    def judge_file(self, path: Path, model: ModelEntry, scope: Scope, on_case: OnCase) -> Verdict:
        """Hold a written model of this bundle against the model, on its outputs alone."""
        return self._judge(judge.Subject(path, None, model.precision, model.keep_io_types), scope, on_case)

    def _judge(self, subject: judge.Subject, scope: Scope, on_case: OnCase) -> Verdict:
        cases = cases_of(self.subject.draws, self.signature, self.samples, scope, self.tries)
        arrays = {case: inputs_of(case, self.subject.draws, self.samples, subject.precision) for case in cases}
        return judge.judge(subject, self._yardstick(subject.precision), arrays, scope, on_case)


def _layer_entry(found: Found, use: Use) -> LayerEntry:
    proof = ProofEntry(cases=found.proof.cases, worst=found.proof.worst)
    return LayerEntry(path=found.path, spec=found.checkpoint.spec, lowering=use.lowering(found), calls=use.calls, proof=proof)


def read_model(model: nn.Module, given: Sequence[Any], recipe: Recipe, progress: Progress) -> ModelSource:
    """Find out everything about a whole model that an export needs; nothing is written, and the model is not changed.

    Args:
        model: any module.
        given: samples, each a dict by forward's argument names or a tuple in order.
        recipe: gives opset, the ranges of dimensions, and in ``[model]`` what the user says of the inputs.
        progress: told about stages.

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
    uses = uses_of(plain, founds, samples[0])
    progress.stage("trace")
    outputs = _outputs(plain, samples[0])
    subject = Subject(plain, founds, uses, draws, dims, tuple(outputs))
    graph, program = subject.graph("fp32", "portable", recipe.opset, recipe.keep_io_types)
    kinds = zip(outputs.items(), program.outputs, strict=False)  # those of layers come after
    signature = Signature(tensors, tuple(Tensor(name, kind, shape) for (name, kind), shape in kinds), dims)
    refined = Laboratory(plain, Evaluator(plain, (), torch.float64), draws).refine(signature)
    _check_largest(Evaluator(plain, (), torch.float32), draws, refined)
    tries = _tries(program)
    return ModelSource(type(plain).__name__, subject, samples, refined, table, guessed, tries, _traced={recipe.opset: graph})


def read_again(bundle: Bundle, model: nn.Module, progress: Progress) -> tuple[Recipe, ModelSource]:
    """Return how a bundle was made, and the same model with the weights that it has now; errors as for :func:`read_model`.

    Raises:
        BundleError: the bundle is of a bare layer.
    """
    if bundle.manifest.interface is not None:
        raise BundleError(f"{bundle.source} holds a bare layer, with its weights; --model is for whole models")
    samples: dict[str, Arrays] = {}
    for name, array in read_arrays(bundle.path(SAMPLES_FILE)).items():
        number, _, argument = name.partition("/")
        samples.setdefault(number, {})[argument] = array
    recipe = recipe_of(bundle)
    source = read_model(model, list(samples.values()), recipe, progress)
    chosen = cpu_lowering(bundle.manifest)
    return recipe, source.on_cpu(chosen) if chosen else source


def _tries(program: Program) -> tuple[Mapping[str, int], ...]:
    """Return the sizes to run: 1 in each dimension that may have it, and what the trace says of others."""
    doubts = [sizes for doubt in program.doubts for sizes in doubt.tries]
    return (*({name: 1} for name in program.unsettled), *doubts)


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


def _cut(model: ir.Model, outputs: int) -> None:
    """Leave the model's own outputs alone."""
    del model.graph.outputs[outputs:]
    remove_dead(model)
