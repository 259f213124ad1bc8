"""The cases of a bundle's self-test: inputs, float64 outputs, and what parity's per-case rule allows."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.parity.cases import Case, families, make_inputs
from bca_deploy.parity.trial import truth_and_bounds
from bca_deploy.signature import Dims
from bca_deploy.spec import Interface, Precision

Arrays = dict[str, NDArray[Any]]


def make(checkpoint: Checkpoint, interface: Interface, dims: Dims, precisions: list[Precision]) -> Arrays:
    """Return the arrays of selftest.npz: one small unsharpened case of each mask family."""
    sizes = dims["batch"].clip(4), dims["x_len"].clip(7), dims["context_len"].clip(5)
    chosen = [f for f in families(checkpoint.spec, interface) if f in ("no mask", "padded", "dead rows", "bias extremes")]
    cases = [Case(family, "plain", *sizes, 7) for family in chosen]
    arrays: Arrays = {}
    for precision in precisions:
        for case in cases:
            arrays |= _one(checkpoint, interface, precision, case)
    return arrays


def _one(checkpoint: Checkpoint, interface: Interface, precision: Precision, case: Case) -> Arrays:
    inputs = make_inputs(case, checkpoint.spec, interface, precision)
    truth, bounds = truth_and_bounds(checkpoint, inputs, interface, precision)
    place = f"{precision}/{case.family.replace(' ', '-')}"
    found = {f"{place}/input/{name}": array for name, array in inputs.items()}
    found |= {f"{place}/output/{name}": array for name, array in truth.items()}
    return found | {f"{place}/bound/{name}": np.array(bound) for name, bound in bounds.items()}
