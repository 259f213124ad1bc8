"""A model with everything that a trace of it needs: its layers, how it uses them, its inputs and their sizes."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import nn

from bca_deploy.errors import InputError
from bca_deploy.layers.lowered_model import DTYPES
from bca_deploy.signature import Dims
from bca_deploy.spec import DTYPE_OF, Precision, Runtime
from bca_deploy.tracing.graph import Traceable, simplify, trace_module
from bca_deploy.tracing.half import keep_logarithms, round_outputs, widen
from bca_deploy.tracing.program import Program
from bca_deploy.whole.draws import Draws
from bca_deploy.whole.find import Found
from bca_deploy.whole.samples import cast, rooted
from bca_deploy.whole.swap import swap
from bca_deploy.whole.uses import Use

# Sizes to trace with.
_SIZES = (3, 6, 5, 7, 9, 10, 11, 13, 17, 19, 21, 23)
# Graphs that draw numbers never give the same twice.
_RANDOM = ("Random", "Bernoulli", "Multinomial")


@dataclass(frozen=True)
class Subject:
    """A model with everything that a trace of it needs.

    Attributes:
        model: a plain copy.
        founds: its layers.
        uses: how it uses them, by path.
        draws: of its inputs.
        dims: the sizes of its dimensions.
        outputs: names.
    """

    model: nn.Module
    founds: tuple[Found, ...]
    uses: Mapping[str, Use]
    draws: Draws
    dims: Dims
    outputs: tuple[str, ...]

    def trace(self, precision: Precision, runtime: Runtime, opset: int, keep_io_types: bool) -> tuple[ir.Model, Program]:
        """Return the trace of the swapped model with its layers' outputs after its own, and what it was made from."""
        swapped, inside = swap(self.model, self.founds, self.uses, precision, runtime), DTYPES[precision]
        edge = torch.float32 if keep_io_types else inside
        root = rooted(swapped.model, self._inputs, swapped.taps.tensors, inside, edge)
        traceable = self._traceable(root, precision, edge)
        with torch.no_grad():
            root(**{name: t.clone() for name, t in traceable.inputs.items()})
        swapped.check_called()
        program, traced = trace_module(replace(traceable, outputs=(*self.outputs, *swapped.taps.tensors)), opset)
        _refuse_random_nodes(traced)
        return traced, program

    @property
    def _inputs(self) -> list[str]:
        return [tensor.name for tensor in self.draws.tensors]

    def _traceable(self, root: nn.Module, precision: Precision, edge: torch.dtype) -> Traceable:
        axes = {tensor.name: tensor.axes for tensor in self.draws.tensors}
        arrays = self.draws.inputs(distinct_sizes(self.dims), "padded", 0, precision)
        inputs = {name: cast(torch.from_numpy(array), edge) for name, array in arrays.items()}
        return Traceable(root, inputs, axes, self.dims, self.outputs)


def graph_of(traced: ir.Model, precision: Precision, runtime: Runtime, opset: int, keep_io_types: bool) -> ir.Model:
    """Turn a trace, in place, into the graph that is written; arguments as it was traced with.

    Raises:
        ExportError: as for :func:`bca_deploy.tracing.graph.simplify`.
    """
    graph = simplify(traced, opset, runtime=runtime)
    keep_logarithms(graph)
    if precision != "fp32":
        widen(graph)
        if not keep_io_types:
            round_outputs(graph, ir.DataType[DTYPE_OF[precision].upper()])
    return graph


def distinct_sizes(dims: Dims) -> dict[str, int]:
    """Return a small size of each dimension, none of them 1 and no two alike where the ranges allow it."""
    found: dict[str, int] = {}
    for name, allowed in dims.items():
        choices = itertools.chain(_SIZES, range(max(allowed.min, 2), allowed.max + 1))
        free = (n for n in choices if allowed.min <= n <= allowed.max and n not in found.values())
        found[name] = next(free, allowed.max)
    return found


def _refuse_random_nodes(graph: ir.Model) -> None:
    for node in graph.graph.all_nodes():
        if node.op_type.startswith(_RANDOM):
            raise InputError(f"the graph draws random numbers ({node.op_type}); a model to be exported draws none in eval mode")
