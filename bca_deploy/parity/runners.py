"""What parity runs a model file on: onnxruntime on CPU, and the strict evaluator."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from bca_deploy.errors import ExportError
from bca_deploy.layers.checkpoint import is_query_weight
from bca_deploy.optional import onnxruntime
from bca_deploy.parity.cases import NUMPY_DTYPES
from bca_deploy.parity.strict_evaluator import strict_runner
from bca_deploy.spec import Precision

Array = NDArray[Any]
#: From inputs to outputs, both by name.
Runner = Callable[[Mapping[str, Array]], dict[str, Array]]


def ort_runner(path: Path) -> Runner:
    """Return a runner on onnxruntime's CPU provider.

    Args:
        path: the ``.onnx`` file.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ExportError: onnxruntime refuses the model.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and parity reports it
    # Threads that spin between runs would fight with PyTorch's, which work in between.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise ExportError(f"onnxruntime does not load {path.name}: {error}") from error
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def at_edges(inputs: Mapping[str, Array], precision: Precision, keep_io_types: bool) -> dict[str, Array]:
    """Return the inputs with floats in the dtype that a model of this precision takes."""
    dtype = np.float32 if keep_io_types else NUMPY_DTYPES[precision]
    return {name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in inputs.items()}


def strict_runner_of(path: Path) -> Runner:
    """Return a runner on the strict-dtype evaluator; the argument as for :func:`ort_runner`."""
    return strict_runner(onnx.load(path))


def sharpened_copy(path: Path, factor: float, directory: Path) -> Path:
    """Write a copy of the model whose ``to_qk`` weights are multiplied by ``factor`` in float32 and rounded again.

    A copy, not an override of initializers when the session is made: onnxruntime ignores that for float16 weights.

    Returns:
        The copy's path in ``directory``.
    """
    model = ir.load(path)
    for name, value in model.graph.initializers.items():
        if is_query_weight(name) and value.const_value is not None:
            array = value.const_value.numpy()
            scaled = (array.astype(np.float32) * np.float32(factor)).astype(array.dtype)
            value.const_value = ir.tensor(scaled, name=name)
    copy = directory / f"sharpened-{factor:g}.onnx"
    ir.save(model, copy, external_data=f"{copy.name}.data" if model_is_external(path) else None)
    return copy


def model_is_external(path: Path) -> bool:
    """Whether the model keeps weights in a file beside it."""
    return path.with_name(f"{path.name}.data").exists()
