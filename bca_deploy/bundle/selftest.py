"""The bundle's self-test: inputs, float64 outputs and bounds, so that a machine without PyTorch can prove itself.

The arrays of selftest.npz are named ``<precision>/<case>/<kind>/<tensor>``. Kinds: ``input`` (float32, exact in that
precision, or bool), ``output`` (float64 truth), ``bound`` (the largest absolute error that parity/rule.py's rule allows).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.errors import BundleError, InputError
from bca_deploy.files import read_arrays
from bca_deploy.spec import Precision

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Arrays], Mapping[str, NDArray[Any]]]


def read(path: Path) -> Arrays:
    """Return the arrays of selftest.npz.

    Raises:
        BundleError: the file is damaged.
    """
    try:
        arrays = read_arrays(path)
    except InputError as error:
        raise BundleError(f"{error}; copy or export the bundle again") from error
    if wrong := [name for name, array in arrays.items() if array.dtype.kind not in "biuf"]:
        raise _refusal(f"{wrong[0]} holds no numbers")
    return arrays


def failures(arrays: Mapping[str, NDArray[Any]], precision: Precision, run: Run) -> list[str]:
    """Run one model over the self-test.

    Args:
        arrays: of selftest.npz.
        precision: of the model.
        run: from inputs to outputs, both by name; floats go in as float32.

    Returns:
        One sentence per output out of bounds; empty where all is well.

    Raises:
        BundleError: the arrays are no self-test of the model: an output or a bound is missing, an input does not fit.
    """
    places = sorted({"/".join(name.split("/")[:2]) for name in arrays if name.startswith(f"{precision}/")})
    if not places:
        return [f"self-test: no case of precision {precision}, so nothing is proven"]
    return [failure for place in places for failure in _judged(arrays, place, _outputs(arrays, place, run))]


def _below(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in sorted(arrays.items()) if name.startswith(prefix)}


def _outputs(arrays: Mapping[str, NDArray[Any]], place: str, run: Run) -> Mapping[str, NDArray[Any]]:
    try:
        return run(_below(arrays, f"{place}/input/"))
    except InputError as error:  # they are the bundle's, not the caller's
        raise _refusal(f"{place}: {error}") from error


def _judged(arrays: Mapping[str, NDArray[Any]], place: str, outputs: Mapping[str, NDArray[Any]]) -> list[str]:
    truths, found = _below(arrays, f"{place}/output/"), []
    if not truths:
        raise _refusal(f"{place} has no outputs, so nothing is proven")
    for name, truth in truths.items():
        worst, bound = _worst(outputs.get(name), truth), _bound(arrays, f"{place}/bound/{name}")
        if not worst <= bound:
            found.append(f"self-test {place}: {name} is off by {worst:.3g}, allowed {bound:.3g}")
    return found


def _worst(got: NDArray[Any] | None, truth: NDArray[Any]) -> float:
    """Return the largest error; endless where the model has no such output, or one of another shape, or one that is NaN.

    What is infinite must be the same infinity.
    """
    if got is None or got.shape != truth.shape:
        return np.inf
    wide = np.asarray(got).astype(np.float64)
    worst = float(np.abs(np.where(wide == truth, 0.0, wide) - np.where(wide == truth, 0.0, truth)).max(initial=0.0))
    return np.inf if np.isnan(worst) else worst


def _bound(arrays: Mapping[str, NDArray[Any]], name: str) -> float:
    if name not in arrays or arrays[name].size != 1:
        raise _refusal(f"{name} is not one number")
    return float(arrays[name].item())


def _refusal(why: str) -> BundleError:
    return BundleError(f"selftest.npz: {why}; export the bundle again")
