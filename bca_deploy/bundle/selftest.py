"""The bundle's self-test: inputs, float64 outputs and bounds, so that a machine without PyTorch can prove itself.

The arrays of selftest.npz are named ``<precision>/<case>/<kind>/<tensor>``. Kinds: ``input`` (float32, exact in that
precision, or bool), ``output`` (float64 truth), ``bound`` (the largest absolute error that parity/rule.py's rule allows).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.spec import Precision

Arrays = dict[str, NDArray[Any]]


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
