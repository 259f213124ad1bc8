"""A module as an ONNX model: traced by torch.export, lowered to its opset, named, cleaned, checked and written.

Ensures of every file it writes: exactly the opset asked for; inputs, outputs and dynamic dimensions named as in the signature;
weights as initializers under the seed's names; no dead nodes and nothing of the machine it was made on; full onnx.checker.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn

from bca_deploy.errors import ExportError, InputError, first_line
from bca_deploy.layers.isolation import exporter_alone
from bca_deploy.layers.lowered_model import LoweredModel
from bca_deploy.signature import Axis, Dims, Signature, Tensor
from bca_deploy.spec import EXTERNAL_DATA_BYTES, LayerSpec, Precision, Runtime
from bca_deploy.tracing.operators import forms
from bca_deploy.tracing.opset import lower_to_17, raise_to
from bca_deploy.tracing.program import Program, any_length, export_program
from bca_deploy.tracing.separable import separate

#: The opsets on offer: 17 brought LayerNormalization; 27 is the newest that onnxruntime 1.32 runs.
OPSETS = range(17, 28)

# Sizes to trace with: all different and none 0 or 1, so that torch.export specialises on nothing by accident.
_TRACE_SIZES = (3, 6, 5, 7, 9, 10, 11, 13)


# What torch's exporter builds, whatever it is asked for.
_EXPORTERS_OPSET = 18
# The newest that it can convert to; asked for a newer one it gives 18 without a word.
_NEWEST_CONVERTED = 25
# In front of the names of weights: what the module to be traced is wrapped in, and what stands in a layer's place.
_WRAPPERS = re.compile(r"\Amodel\.|(\A|(?<=\.))lowered\.core\.|\Acore\.")

# The first opset whose Conv takes bfloat16; https://onnx.ai/onnx/operators/onnx__Conv.html
_CONV_BF16 = 22
_DOMAINS: dict[Runtime, set[str]] = {"portable": {""}, "onnxruntime-cpu": {"", "com.microsoft"}}


def check_opset(opset: int) -> int:
    """Return ``opset`` if it can be exported.

    Raises:
        InputError: outside the range on offer.
    """
    if opset not in OPSETS:
        raise InputError(f"opset {opset} cannot be exported; allowed: {OPSETS.start} to {OPSETS.stop - 1} (17 is the default)")
    return opset


def check_precision(precision: Precision, opset: int, spec: LayerSpec) -> None:
    """Refuse a precision that the operators of an opset do not take: talking heads are a Conv, bfloat16 from opset 22 on.

    Raises:
        InputError: with the opset that does.
    """
    if precision == "bf16" and spec.talking_heads and opset < _CONV_BF16:
        raise InputError(
            f"precision bf16 with talking heads at opset {opset}: ONNX's Conv takes bfloat16 from opset {_CONV_BF16} on; "
            f"export with --opset {_CONV_BF16} or higher, or in another precision"
        )


@dataclass(frozen=True)
class Traceable:
    """A module to be traced.

    Attributes:
        module: in eval mode.
        inputs: an example by the names of forward's arguments; no dimension has size 1, no two the same.
        axes: of each input.
        dims: the sizes that each named dimension may have.
        outputs: the names of what comes out, in order.
    """

    module: nn.Module
    inputs: Mapping[str, torch.Tensor]
    axes: Mapping[str, tuple[Axis, ...]]
    dims: Dims
    outputs: tuple[str, ...]


def trace(
    model: LoweredModel,
    signature: Signature,
    opset: int,
    metadata: Mapping[str, str] | None = None,
    runtime: Runtime = "portable",
) -> ir.Model:
    """Trace the lowered module into a checked ONNX model held in memory.

    Args:
        model: from :func:`bca_deploy.layers.lowered_model.lower`.
        signature: what the model takes and gives.
        opset: the ai.onnx opset the model must have, one of ``OPSETS``.
        metadata: goes into ``metadata_props``.
        runtime: only ``portable`` graphs are of ai.onnx operators alone.

    Returns:
        The model; :func:`write` writes it.

    Raises:
        InputError: the opset is not on offer.
        ExportError: the exporter failed, or gave another opset, other names or other dynamic dimensions.
    """
    sizes = dict(zip(signature.dims, _TRACE_SIZES, strict=False))
    inputs = {tensor.name: _example(tensor, sizes, model.edge) for tensor in signature.inputs}
    axes, names = {t.name: t.axes for t in signature.inputs}, tuple(t.name for t in signature.outputs)
    exported, _ = convert(Traceable(_stand_in(model), inputs, axes, signature.dims, names), opset, metadata, runtime)
    attach(exported, model.core.state_dict())
    _check_outputs(exported, signature)
    return exported


def convert(
    traceable: Traceable, opset: int, metadata: Mapping[str, str] | None = None, runtime: Runtime = "portable"
) -> tuple[ir.Model, Program]:
    """Trace any module into an ONNX model held in memory; arguments and errors as for :func:`trace`.

    Returns:
        The model, and what it was made from.
    """
    program, traced = trace_module(traceable, opset)
    return simplify(traced, opset, metadata, runtime), program


def trace_module(traceable: Traceable, opset: int) -> tuple[Program, ir.Model]:
    """Return what torch.export made of a module, and its graph as torch.onnx writes it.

    The graph computes what the module does, operation by operation, from weights as they are in the module; no value of a
    weight is in it but as an initializer. Errors as for :func:`convert`.
    """
    program, traced = _run_exporter(traceable, check_opset(opset))
    _name_edges(traced, list(traceable.inputs), traceable.outputs)
    _name_dimensions(traced, program.symbols)
    for value, axes in zip(traced.graph.outputs, program.outputs, strict=True):
        value.shape = ir.Shape(axes)
    _check_edges(traced, traceable.axes, traceable.outputs)
    return program, traced


def simplify(
    traced: ir.Model, opset: int, metadata: Mapping[str, str] | None = None, runtime: Runtime = "portable"
) -> ir.Model:
    """Turn a traced graph, in place, into one that is written: constants folded, of its opset, named and checked.

    Args:
        traced: from :func:`trace_module`.
        opset: as for :func:`trace`, and that of the trace.
        metadata: as for :func:`trace`.
        runtime: as for :func:`trace`.

    Raises:
        ExportError: a node has no form in the opset, or the edges are no longer what they were.
    """
    outputs = {value.name: value.shape for value in traced.graph.outputs}
    inputs = {str(value.name): _axes(value) for value in traced.graph.inputs}
    with exporter_alone():
        from onnxscript.optimizer import optimize_ir  # here: importing it changes the process

        optimize_ir(traced)
    if opset < _EXPORTERS_OPSET:
        lower_to_17(traced)
    elif opset > _NEWEST_CONVERTED:
        raise_to(traced, opset)
    for value in traced.graph.outputs:
        value.shape = outputs.get(value.name)
    _tidy(traced, metadata or {})
    _check(traced, opset, _DOMAINS[runtime])
    _check_edges(traced, inputs, tuple(map(str, outputs)))
    return traced


def attach(model: ir.Model, weights: Mapping[str, torch.Tensor]) -> None:
    """Put ``weights`` into the model's initializers of the same names.

    Raises:
        ExportError: the model lacks one of the names, or holds it in another shape or dtype.
    """
    for name, tensor in weights.items():
        value = model.graph.initializers.get(name)
        new = TorchTensor(tensor, name=name)
        old = None if value is None else value.const_value
        if value is None or old is None or (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ExportError(f"the graph does not hold weight {name} as {new.shape} {new.dtype}; please report this")
        value.const_value = new


def _stand_in(model: LoweredModel) -> LoweredModel:
    """Copy the module with random weights: the exporter merges equal weights (two fresh norms) under one name."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        parameter.data.normal_(generator=generator)
    return copied


def write(model: ir.Model, path: Path, external_data_bytes: int = EXTERNAL_DATA_BYTES) -> None:
    """Write the model, then run the full onnx checker on the file.

    Args:
        model: from :func:`trace`.
        path: the ``.onnx`` file; weights over the threshold go to ``<name>.onnx.data`` beside it.
        external_data_bytes: the total size of weights above which they leave the file.

    Raises:
        ExportError: the checker refused the file.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{path.name}.data" if size > external_data_bytes else None
    ir.save(model, path, external_data=external, size_threshold_bytes=256)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the written model {path.name} does not pass onnx.checker: {error}; {_advice(error)}") from error


def _advice(error: Exception) -> str:
    if "bfloat16" in str(error):  # as Conv does from 22 on
        return "some operators take bfloat16 from a later opset on: export with a higher --opset, or in another precision"
    return "please report this"


def _run_exporter(traceable: Traceable, opset: int) -> tuple[Program, ir.Model]:
    """Run torch's exporter within the opsets that it really gives."""
    import torch._dynamo.config as settings  # here: importing it changes the process

    # Caching fake tensors costs a third of the trace here: with symbolic sizes the keys are dearer than the hits.
    with exporter_alone(), any_length(), settings.patch(fake_tensor_cache_enabled=False):
        program = export_program(traceable.module, traceable.inputs, traceable.axes, traceable.dims)
        separate(program.exported)
        try:
            made = torch.onnx.export(
                program.exported,
                dynamo=True,
                opset_version=min(max(opset, _EXPORTERS_OPSET), _NEWEST_CONVERTED),
                input_names=list(traceable.inputs),
                output_names=list(traceable.outputs),
                custom_translation_table=forms(),
                optimize=False,  # simplify() does
                verbose=False,  # else it prints
            )
        except Exception as error:  # the exporter raises what it likes; the cause is chained
            raise ExportError(f"torch.onnx.export failed: {_cause(error)}; run with -v to see its log") from error
    assert made is not None  # noqa: S101  (dynamo=True always returns a program)
    passes.InlinePass()(made.model)
    return program, made.model


def _cause(error: BaseException) -> str:
    """Return what the innermost error says: the exporter's own begin with a page about reports."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = first_line(error) if isinstance(error, Exception) else repr(error)
    return said if said == repr(error) else f"{type(error).__name__}: {said}"


def _name_dimensions(model: ir.Model, symbols: Mapping[str, str]) -> None:
    """Give dimensions their declared names in place of torch's."""
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else _named(dim.value, symbols) for dim in value.shape])


def _named(dim: str | None, symbols: Mapping[str, str]) -> str | None:
    return dim and re.sub(r"\bs\d+\b", lambda match: symbols.get(match[0], match[0]), dim)


def _example(tensor: Tensor, sizes: Mapping[str, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(tensor.shape(sizes), dtype=dtype if tensor.is_float else getattr(torch, tensor.dtype))


def _tidy(model: ir.Model, metadata: Mapping[str, str]) -> None:
    """Name the weights, drop dead nodes, and drop what differs from machine to machine (stack traces hold paths)."""
    _fix_reshapes(model.graph)
    remove_dead(model)
    _name_initializers(model.graph)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in _values(model.graph):
        value.metadata_props.clear()
    model.graph.name = "bidirectional_cross_attention"
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "bca-deploy", None
    model.metadata_props.clear()
    model.metadata_props.update(metadata)


def remove_dead(model: ir.Model) -> None:
    """Drop what no output needs."""
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    passes.RemoveUnusedOpsetsPass()(model)


def _fix_reshapes(graph: ir.Graph) -> None:
    """Let Reshape copy dynamic sizes from its input (a 0 in the shape) instead of computing them: a tenth of all nodes."""
    for node in [node for node in graph if node.op_type == "Reshape"]:
        sizes = _copied_sizes(node.inputs[0], node.outputs[0])
        if sizes is not None:
            node.replace_input_with(1, _shape_constant(graph, sizes))
            node.attributes.pop("allowzero", None)


def _copied_sizes(source: ir.Value | None, result: ir.Value) -> list[int] | None:
    """Return the result's shape with 0 for a dynamic size that stands at the same place in the source; None if others are."""
    if source is None or source.shape is None or result.shape is None:
        return None
    before = [*source.shape, *[None] * len(result.shape)]
    sizes = [
        dim if isinstance(dim, int) else 0 if _same(dim, old) else None for dim, old in zip(result.shape, before, strict=False)
    ]
    return None if None in sizes or 0 in result.shape else [size for size in sizes if size is not None]


def _same(dim: ir.SymbolicDim, other: object) -> bool:
    """Whether two sizes have one name; two that have none may be anything."""
    return isinstance(other, ir.SymbolicDim) and dim.value is not None and dim.value == other.value


def _shape_constant(graph: ir.Graph, sizes: list[int]) -> ir.Value:
    name = "shape_" + "_".join(map(str, sizes))
    if name not in graph.initializers:
        tensor = ir.tensor(sizes, dtype=ir.DataType.INT64, name=name)
        graph.register_initializer(
            ir.Value(name=name, const_value=tensor, shape=ir.Shape([len(sizes)]), type=ir.TensorType(tensor.dtype))
        )
    return graph.initializers[name]


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _name_initializers(graph: ir.Graph) -> None:
    """``core.to_qk.weight`` becomes ``to_qk.weight``: the names of wrappers and stand-ins are no business of the file's."""
    for name in list(graph.initializers):
        plain = _WRAPPERS.sub("", name)
        if plain != name and plain not in graph.initializers:
            value = graph.initializers.pop(name)
            value.name = plain
            graph.register_initializer(value)


def _check(model: ir.Model, opset: int, domains: set[str]) -> None:
    found = model.opset_imports.get("")
    if found != opset:
        raise ExportError(f"asked for opset {opset}, but the exporter gave opset {found} without an error; please report this")
    if not set(model.opset_imports) <= domains or model.functions:
        raise ExportError(f"the graph needs more than it may: {sorted(model.opset_imports)}; please report this")


def _name_edges(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give each edge a value of its own: one that is two outputs, or an input too, has torch's last name for it."""
    passes.OutputFixPass()(model)
    for values, names in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name


def _check_edges(model: ir.Model, inputs: Mapping[str, tuple[Axis, ...]], outputs: tuple[str, ...]) -> None:
    got = {value.name: _axes(value) for value in model.graph.inputs}
    if got != dict(inputs):
        raise ExportError(f"the inputs are {got}, wanted {dict(inputs)}; please report this")
    names = tuple(value.name for value in model.graph.outputs)
    if names != outputs:
        raise ExportError(f"the outputs are {names}, wanted {outputs}; please report this")


def _check_outputs(model: ir.Model, signature: Signature) -> None:
    got, wanted = {v.name: _axes(v) for v in model.graph.outputs}, {t.name: t.axes for t in signature.outputs}
    if got != wanted:
        raise ExportError(f"the outputs are {got}, wanted {wanted}; please report this")


def _axes(value: ir.Value) -> tuple[Axis, ...]:
    dims = value.shape.dims if value.shape is not None else ()
    return tuple(dim if isinstance(dim, int) else str(dim.value) for dim in dims)
