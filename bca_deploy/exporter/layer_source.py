"""The bare layer as what an export is made from: its models by lowering, its truth by the reference layer."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.bundle.manifest import EXPECT_FILE, WEIGHTS_FILE, LayerEntry
from bca_deploy.bundle.trust import Trust
from bca_deploy.exporter.recipe import Recipe
from bca_deploy.exporter.source import Made, package_version
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.lowered_model import graph_state, has_cpu_form, lower
from bca_deploy.parity import selftest_cases, user_sample
from bca_deploy.parity.rule import Subject, judge, judge_inputs
from bca_deploy.parity.yardstick import Yardstick
from bca_deploy.progress import Clock
from bca_deploy.signature import Dims, Signature
from bca_deploy.spec import Interface, Lowering, Precision, Runtime, layer_signature
from bca_deploy.timing.inputs import padded_inputs
from bca_deploy.tracing.graph import attach, check_precision, trace, write

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class LayerSource:
    """A layer with its weights.

    Attributes:
        checkpoint: the layer.
        interface: its optional inputs and outputs.
        dims: the sizes of its dimensions.
        lowering: the form of the attention, chosen.
        expected: the user's own inputs and outputs, from ``--expect`` or a live module.
        trust: what shows that it is the layer that the user trained.
        cpu_lowering: the form in the graph for onnxruntime on the CPU, where somebody chose it.
    """

    checkpoint: Checkpoint
    interface: Interface
    dims: Dims
    lowering: Lowering
    expected: Arrays = field(default_factory=dict)
    trust: Trust = "on-trust"
    cpu_lowering: Lowering | None = None
    _yardsticks: dict[Precision, Yardstick] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """What it is called in the manifest."""
        return "layer"

    @property
    def signature(self) -> Signature:
        """What every model takes and gives."""
        return layer_signature(self.checkpoint.spec, self.interface, self.dims)

    @property
    def layers(self) -> tuple[LayerEntry, ...]:
        """The one layer, which is the model."""
        return (LayerEntry(path="", spec=self.checkpoint.spec, lowering=self.lowering),)

    @property
    def guessed(self) -> tuple[str, ...]:
        """None: what nobody gives has documented ranges."""
        return ()

    def lowering_for(self, runtime: Runtime) -> Lowering:
        """Return the form in the graphs for one runtime."""
        return self.cpu_lowering or self.lowering if runtime == "onnxruntime-cpu" else self.lowering

    @property
    def has_choice(self) -> bool:
        """Whether the literal form could take the fused one's place."""
        return self.lowering == "fused"

    def on_cpu(self, lowering: Lowering) -> "LayerSource":
        """Return the same with this form in the graph for onnxruntime on the CPU."""
        return replace(self, cpu_lowering=lowering)

    def usual_inputs(self) -> Arrays:
        """Return inputs of the sizes to tune for."""
        return padded_inputs(self.signature, self.dims.at("opt"))

    def check_precision(self, precision: Precision, opset: int) -> None:
        """Refuse a precision that the opset's operators do not take; errors as :func:`check_precision`."""
        check_precision(precision, opset, self.checkpoint.spec)

    def forms(self, precisions: Iterable[Precision]) -> list[tuple[Precision, Runtime]]:
        """Return what to make: a portable model of each precision, then what one runtime alone can run."""
        found: list[tuple[Precision, Runtime]] = [(precision, "portable") for precision in dict.fromkeys(precisions)]
        literal = self.lowering_for("onnxruntime-cpu") != self.lowering
        fast = [p for p, _ in found if has_cpu_form(self.lowering, p, self.interface) or (literal and p == "fp32")]
        return [*found, *((precision, "onnxruntime-cpu") for precision in fast)]

    def make(self, precision: Precision, runtime: Runtime, path: Path, recipe: Recipe, clock: Clock) -> Made:
        """Lower, trace, write and judge one model; errors as :func:`trace`."""
        with clock.stage(f"trace {path.stem}"):
            nodes = self.write(precision, runtime, path, recipe)
        return self._judge(precision, path, nodes, recipe, clock)

    def write(self, precision: Precision, runtime: Runtime, path: Path, recipe: Recipe) -> int:
        """Lower, trace and write one model; return the number of its nodes. Errors as :func:`trace`."""
        maps, masked, lowering = self.interface.attention_maps, self.interface.masked, self.lowering_for(runtime)
        lowered = lower(self.checkpoint, lowering, precision, recipe.keep_io_types, maps, runtime, masked)
        model = trace(lowered, self.signature, recipe.opset, self._metadata(precision, lowering), runtime)
        write(model, path, recipe.external_data_bytes)
        return len(model.graph)

    def refit(self, precision: Precision, runtime: Runtime, path: Path, recipe: Recipe, clock: Clock) -> Made:
        """Put these weights into a written model of the same layer, and judge it; no trace is needed."""
        import onnx_ir as ir

        with clock.stage(f"weights {precision}"):
            graph = ir.external_data.load_to_model(ir.load(path))  # nothing may still read from the file to be written
            lowering = self.lowering_for(runtime)
            attach(graph, graph_state(self.checkpoint, lowering, precision, runtime, self.interface.masked))
            write(graph, path, recipe.external_data_bytes)
        return self._judge(precision, path, len(graph.graph), recipe, clock)

    def _judge(self, precision: Precision, path: Path, nodes: int, recipe: Recipe, clock: Clock) -> Made:
        subject = Subject(path, self.checkpoint, self.interface, self.dims, precision, recipe.keep_io_types)
        with clock.stage(f"parity {path.stem}"):
            verdict = judge(subject, recipe.parity, clock.progress.steps, yardstick=self._yardstick(precision))
            if self.expected:
                inputs = user_sample.inputs_of(self.expected, self.checkpoint.spec, self.interface)
                verdict = verdict.joined(judge_inputs(subject, {EXPECT_FILE: inputs}))
        return Made(nodes, verdict)

    def _yardstick(self, precision: Precision) -> Yardstick:
        """Return what every model of a precision is held against, made on first use."""
        if precision not in self._yardsticks:
            self._yardsticks[precision] = Yardstick(self.checkpoint, self.interface, precision)
        return self._yardsticks[precision]

    def _metadata(self, precision: Precision, lowering: Lowering) -> dict[str, str]:
        return {
            "producer": f"bca-deploy {package_version('bca-deploy')}",
            "layer": json.dumps(asdict(self.checkpoint.spec), sort_keys=True),
            "lowering": lowering,
            "precision": precision,
            "dead_rows": "a row that is masked, or that has no live key, is the mean over all values",
        }

    def selftest(self, precisions: Sequence[Precision]) -> Arrays:
        """Return the cases with which a machine without PyTorch proves the models."""
        return selftest_cases.make(self.checkpoint, self.interface, self.dims, list(precisions))

    def write_files(self, directory: Path) -> None:
        """Write the original weights under the seed's names, and the user's sample where there is one."""
        from safetensors.torch import save_file

        save_file(self.checkpoint.state, directory / WEIGHTS_FILE)
        if self.expected:
            np.savez(directory / EXPECT_FILE, **self.expected)  # type: ignore[arg-type]
