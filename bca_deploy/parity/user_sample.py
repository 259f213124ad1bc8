"""The user's own inputs and outputs: proof that the layer built here is the one they trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bca_deploy.errors import InputError, ParityError, nearest
from bca_deploy.files import read_arrays
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.parity.cases import Case, Family, make_inputs
from bca_deploy.parity.trial import allowed_error, roundoff_slack
from bca_deploy.parity.truth import affordable_orders, evaluations, run_module, true_outputs
from bca_deploy.signature import Dims
from bca_deploy.spec import INPUT_NAMES, MASK_NAMES, OUTPUT_NAMES, Interface, LayerSpec, Precision, layer_signature

Arrays = dict[str, NDArray[Any]]

_PRECISIONS: dict[str, Precision] = {"float16": "fp16", "float32": "fp32", "float64": "fp32"}


def read(path: Path, needed: tuple[str, ...] = ("x", "context", "out", "context_out")) -> Arrays:
    """Read a sample: ``x``, ``context``, whichever optional inputs were given, and the outputs.

    Args:
        path: a ``.npz`` file; masks are bool, everything else float16, float32 or float64.
        needed: which arrays must be there.

    Raises:
        InputError: not a readable ``.npz``, a name missing or unknown, a wrong dtype.
    """
    arrays = _read_npz(path)
    absent = [name for name in needed if name not in arrays]
    if absent:
        raise InputError(f"{path}: {', '.join(absent)} missing; save {', '.join(needed)}, and the masks and the bias you gave")
    return arrays


def _read_npz(path: Path) -> Arrays:
    arrays = read_arrays(path)
    if "" in arrays:
        raise InputError(f"{path} holds one array without a name; write all of them to one file with numpy.savez")
    unknown = sorted(set(arrays) - {*INPUT_NAMES, *OUTPUT_NAMES})
    if unknown:
        raise InputError(f"{path}: unknown array {unknown[0]!r}{nearest(unknown[0], (*INPUT_NAMES, *OUTPUT_NAMES))}")
    for name, array in arrays.items():
        allowed = ["bool"] if name in MASK_NAMES else list(_PRECISIONS)
        if array.dtype.name not in allowed:
            raise InputError(f"{path}: {name} has dtype {array.dtype}; allowed: {', '.join(allowed)}")
        if array.dtype == bool and array.view(np.uint8).max(initial=0) > 1:  # a view of other bytes, as it was saved
            raise InputError(f"{path}: {name} holds a byte that is neither 0 nor 1; save it as (mask != 0)")
    return arrays


def inputs_of(arrays: Arrays, spec: LayerSpec, interface: Interface) -> Arrays:
    """Return the inputs that the exported model takes; a mask that was not given is all true, a bias zero."""
    sizes = {"batch": arrays["x"].shape[0], "x_len": arrays["x"].shape[1], "context_len": arrays["context"].shape[1]}
    found: Arrays = {}
    for tensor in layer_signature(spec, interface).inputs:
        blank = np.array(tensor.fill or 0, dtype=tensor.dtype)
        found[tensor.name] = np.broadcast_to(arrays.get(tensor.name, blank), tensor.shape(sizes)).copy()
    return found


def fit(arrays: Arrays, spec: LayerSpec, interface: Interface) -> None:
    """Refuse a sample that the exported model cannot take.

    Raises:
        InputError: an input that the model will not have, a wrong shape.
    """
    taken = {tensor.name for tensor in layer_signature(spec, interface).inputs}
    for name in INPUT_NAMES:
        if name in arrays and name not in taken:
            raise InputError(f"the sample has {name}, but the export has no such input; add it (see --help) or leave it out")
    for name, width in (("x", spec.dim), ("context", spec.context_dim)):
        if arrays[name].ndim != 3 or arrays[name].shape[2] != width or 0 in arrays[name].shape:
            raise InputError(f"the sample's {name} has shape {arrays[name].shape}, needs [batch, length, {width}]")
    try:
        inputs_of(arrays, spec, interface)
    except ValueError as error:
        raise InputError(f"the sample's inputs do not fit together: {error}") from error


def check(arrays: Arrays, checkpoint: Checkpoint) -> None:
    """Hold the sample's outputs against the reference layer; the rule is parity/rule.py's per-case rule.

    Raises:
        ParityError: the user's code computed something else.
    """
    precision = _PRECISIONS[arrays["out"].dtype.name]
    dtype = torch.float16 if precision == "fp16" else torch.float32
    interface = Interface("mask" in arrays, "context_mask" in arrays, "batch", attention_maps="attn" in arrays)
    inputs = {name: a if a.dtype == bool else a.astype(np.float32) for name, a in arrays.items() if name in INPUT_NAMES}
    truth, largest = true_outputs(checkpoint.module(torch.float64), inputs, interface)
    peers = evaluations(checkpoint.module(dtype), inputs, interface, dtype, affordable_orders(inputs, checkpoint.spec))
    slack = roundoff_slack(checkpoint.spec, precision, largest)
    for name, true in truth.items():
        if name not in arrays:
            continue
        _check_one(name, arrays[name], true, [peer[name] for peer in peers], slack)


def _check_one(name: str, got: NDArray[Any], true: NDArray[Any], peers: list[NDArray[Any]], slack: float) -> None:
    if got.shape != true.shape:
        raise ParityError(f"the sample's {name} has shape {got.shape}, the layer gives {true.shape}")
    allowed = allowed_error([peer - true for peer in peers], true, slack)
    worst = float(np.abs(got.astype(np.float64) - true).max())
    if not worst <= allowed:
        raise ParityError(
            f"the sample's {name} is not what this layer computes: largest difference {worst:.3g}, allowed {allowed:.3g}; "
            "check --heads and --prefix, that the module was in eval mode, and that autocast and TF32 were off"
        )


def from_module(module: Callable[..., tuple[torch.Tensor, ...]], spec: LayerSpec, interface: Interface, dims: Dims) -> Arrays:
    """Return a sample that a float32 module makes, which is called as the reference is."""
    family: Family = "padded" if interface.masked else "no mask"
    case = Case(family, "plain", dims["batch"].clip(2), dims["x_len"].clip(7), dims["context_len"].clip(5), seed=11)
    inputs = make_inputs(case, spec, interface, "fp32")
    outputs = run_module(module, inputs, interface, torch.float32)
    return inputs | {name: array.astype(np.float32) for name, array in outputs.items()}
