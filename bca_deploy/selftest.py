"""The bundle's self-test: inputs, float64 outputs and bounds, so that a machine without PyTorch can prove itself.

The arrays of selftest.npz are named ``<precision>/<case>/<kind>/<tensor>``. Kinds: ``input`` (float32, exact in that
precision, or bool), ``output`` (float64 truth), ``bound`` (the largest absolute error that parity.py's rule allows).
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.spec import Dims, Interface, Precision

if TYPE_CHECKING:
    from bca_deploy.checkpoint import Checkpoint

Arrays = dict[str, NDArray[Any]]


def make(checkpoint: "Checkpoint", interface: Interface, dims: Dims, precisions: list[Precision]) -> Arrays:
    """Return the arrays of selftest.npz: one small unsharpened case of each mask family."""
    from bca_deploy.cases import Case, families

    sizes = dims.batch.clip(4), dims.x_len.clip(7), dims.context_len.clip(5)
    chosen = [f for f in families(checkpoint.spec, interface) if f in ("no mask", "padded", "dead rows", "bias extremes")]
    cases = [Case(family, "plain", *sizes, 7) for family in chosen]
    arrays: Arrays = {}
    for precision in precisions:
        for case in cases:
            arrays |= _one(checkpoint, interface, precision, case)
    return arrays


def _one(checkpoint: "Checkpoint", interface: Interface, precision: Precision, case: Any) -> Arrays:
    from bca_deploy.cases import make_inputs
    from bca_deploy.trial import truth_and_bounds

    inputs = make_inputs(case, checkpoint.spec, interface, precision)
    truth, bounds = truth_and_bounds(checkpoint, inputs, interface, precision)
    place = f"{precision}/{case.family.replace(' ', '-')}"
    found = {f"{place}/input/{name}": array for name, array in inputs.items()}
    found |= {f"{place}/output/{name}": array for name, array in truth.items()}
    return found | {f"{place}/bound/{name}": np.array(bound) for name, bound in bounds.items()}


def failures(
    arrays: Mapping[str, NDArray[Any]], precision: Precision, run: Callable[[Arrays], Mapping[str, NDArray[Any]]]
) -> list[str]:
    """Run one model over the self-test.

    Args:
        arrays: of selftest.npz.
        precision: of the model.
        run: from inputs to outputs, both by name; floats go in as float32.

    Returns:
        One sentence per output out of bounds; empty where all is well.
    """
    found = []
    places = sorted({name.rsplit("/", 2)[0] for name in arrays if name.startswith(f"{precision}/")})
    if not places:
        return [f"self-test: no case of precision {precision}, so nothing is proven"]
    for place in places:
        inputs = {name.rsplit("/", 1)[1]: a for name, a in arrays.items() if name.startswith(f"{place}/input/")}
        outputs = run(inputs)
        for name, truth in ((n.rsplit("/", 1)[1], a) for n, a in arrays.items() if n.startswith(f"{place}/output/")):
            worst = float(np.abs(np.asarray(outputs[name]).astype(np.float64) - truth).max())
            bound = float(arrays[f"{place}/bound/{name}"])
            if not worst <= bound:
                found.append(f"self-test {place}: {name} is off by {worst:.3g}, allowed {bound:.3g}")
    return found
