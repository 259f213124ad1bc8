"""What whole models have in common, whether their code is there or not: one way to write, to judge and to keep cases."""

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bca_deploy.bundle.manifest import MODEL_FILE, SAMPLES_FILE, TRACES, LayerEntry, ModelEntry, ModelLowering
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.trust import Trust
from bca_deploy.bundle.write import write_json
from bca_deploy.exporter.recipe import ModelTable, Recipe
from bca_deploy.exporter.source import Made, package_version
from bca_deploy.files import read_arrays
from bca_deploy.parity.cases import Scope
from bca_deploy.parity.verdict import Verdict
from bca_deploy.progress import Clock
from bca_deploy.signature import Signature
from bca_deploy.spec import Interface, Lowering, Precision, Runtime
from bca_deploy.tracing.graph import remove_dead, write
from bca_deploy.whole.draws import PATTERNS, Draws
from bca_deploy.whole.samples import Sample
from bca_deploy.whole.traceable import distinct_sizes
from bca_deploy.whole_parity import judge
from bca_deploy.whole_parity.cases import Case, cases_of, inputs_of
from bca_deploy.whole_parity.yardstick import Yardstick

Arrays = dict[str, NDArray[Any]]
#: Called after each case with the number done and the total.
OnCase = Callable[[int, int], None]

# Of what was said of a model, what the bundle keeps: its axes are the signature's.
_KEPT = ("masks", "ranges", "keep_literal", "allow_none")
# Cases kept in the bundle beside the user's own.
_KEPT_SEED = 1_000


class WholeSource(ABC):
    """A whole model, whatever its graphs and its truth come from."""

    name: str
    trust: Trust
    signature: Signature
    layers: tuple[LayerEntry, ...]
    samples: tuple[Sample, ...]
    draws: Draws
    table: ModelTable
    tries: tuple[Mapping[str, int], ...]
    _yardsticks: dict[Precision, Yardstick]

    @abstractmethod
    def _graph(self, precision: Precision, runtime: Runtime, trace: Path, recipe: Recipe) -> ir.Model:
        """Return a graph, with its layers' outputs after the model's own; its trace is written where it is not yet."""

    @abstractmethod
    def _new_yardstick(self, precision: Precision) -> Yardstick:
        """Return what the graphs of a precision are held against."""

    @property
    def interface(self) -> Interface | None:
        """None: the bare layer's alone."""
        return None

    @property
    def lowering(self) -> ModelLowering:
        """The form of the attention in the graphs."""
        return self.lowering_for("portable")

    @abstractmethod
    def lowering_for(self, runtime: Runtime) -> ModelLowering:
        """Return the form in the graphs for one runtime."""

    @abstractmethod
    def _forms_for(self, runtime: Runtime) -> dict[str, Lowering]:
        """Return the form of each layer in them, by path."""

    def usual_inputs(self) -> Arrays:
        """Return inputs of the sizes to tune for."""
        return self.draws.inputs(self.signature.dims.at("opt"), "padded", 0, "fp32")

    def write(self, precision: Precision, runtime: Runtime, path: Path, recipe: Recipe) -> int:
        """Make and write one model, and judge nothing; return its nodes. Errors as for :meth:`make`."""
        model = self._graph(precision, runtime, path.with_suffix(".trace"), recipe)
        _cut(model, len(self.signature.outputs))
        write(model, path, recipe.external_data_bytes)
        return len(model.graph)

    def check_precision(self, precision: Precision, opset: int) -> None:
        """Refuse nothing: whether the opset takes the precision shows in the trace."""
        del precision, opset

    def make(self, precision: Precision, runtime: Runtime, path: Path, recipe: Recipe, clock: Clock) -> Made:
        """Make, write and judge one model; errors as :func:`bca_deploy.tracing.graph.convert`."""
        with tempfile.TemporaryDirectory(prefix="bca-tapped-") as scratch:
            tapped = Path(scratch) / path.name
            with clock.stage(f"trace {path.stem}"):
                model = self._graph(precision, runtime, trace_path(path), recipe)
                model.metadata_props.update(self._metadata(precision, runtime))
                write(model, tapped, recipe.external_data_bytes)
                _cut(model, len(self.signature.outputs))
                write(model, path, recipe.external_data_bytes)
            with clock.stage(f"parity {path.stem}"):
                subject = judge.Subject(path, tapped, precision, recipe.keep_io_types)
                verdict = self._judge(subject, recipe.parity, clock.progress.steps)
        return Made(len(model.graph), verdict)

    def _yardstick(self, precision: Precision) -> Yardstick:
        if precision not in self._yardsticks:
            self._yardsticks[precision] = self._new_yardstick(precision)
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
        return [
            *(Case(f"sample {number + 1}", sample=number) for number in range(len(self.samples))),
            *drawn_cases(self.draws, self.signature),
        ]

    def _one(self, precision: Precision, case: Case) -> Arrays:
        inputs = inputs_of(case, self.draws, self.samples, precision)
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
        cases = cases_of(self.draws, self.signature, self.samples, scope, self.tries)
        arrays = {case: inputs_of(case, self.draws, self.samples, subject.precision) for case in cases}
        return judge.judge(subject, self._yardstick(subject.precision), arrays, scope, on_case)


def drawn_cases(draws: Draws, signature: Signature) -> list[Case]:
    """Return a small case of each pattern of masks."""
    sizes = tuple(distinct_sizes(signature.dims).items())
    patterns = PATTERNS if draws.masks else PATTERNS[:1]
    return [Case(pattern, sizes, pattern, _KEPT_SEED) for pattern in patterns]


def trace_path(model: Path) -> Path:
    """Return where the trace of a model of a bundle is."""
    return model.parent.parent / TRACES / f"{model.stem}.trace"


def samples_of(bundle: Bundle) -> list[Arrays]:
    """Return the user's samples that a bundle keeps, in order."""
    samples: dict[str, Arrays] = {}
    for name, array in read_arrays(bundle.path(SAMPLES_FILE)).items():
        number, _, argument = name.partition("/")
        samples.setdefault(number, {})[argument] = array
    return list(samples.values())


def _cut(model: ir.Model, outputs: int) -> None:
    """Leave the model's own outputs alone."""
    del model.graph.outputs[outputs:]
    remove_dead(model)
