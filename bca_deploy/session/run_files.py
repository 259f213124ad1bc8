"""`bca run`: one call from files to files, without torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.errors import InputError
from bca_deploy.files import read_arrays, replacing
from bca_deploy.session.session import Session

Array = NDArray[Any]


def read_inputs(assignments: Iterable[str]) -> dict[str, Array]:
    """Read ``name=file.npy`` and ``file.npz`` (whose arrays have the inputs' names).

    Raises:
        InputError: a file that is missing or damaged, or an input given twice.
    """
    found: dict[str, Array] = {}
    for assignment in assignments:
        name, _, place = assignment.rpartition("=")
        for key, array in _load(name, Path(place)).items():
            if key in found:
                raise InputError(f"input {key} is given twice, the second time by {assignment}")
            found[key] = array
    return found


def _load(name: str, path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file; give --input NAME=FILE.npy, or FILE.npz")
    return {key or name or path.stem: array for key, array in read_arrays(path).items()}


def run(session: Session, inputs: dict[str, Array], out: Path, cast: bool, force: bool) -> dict[str, Array]:
    """Run once and write the outputs as one ``.npz``.

    Raises:
        InputError: inputs that do not fit, or an output file that is there already.
    """
    known = {tensor.name for tensor in session.outputs}  # a sample may carry its expected outputs
    if out.exists() and not force:
        raise InputError(f"{out} exists; use --force to replace it, or choose another --output")
    outputs = session.run({name: array for name, array in inputs.items() if name not in known}, cast=cast)
    with replacing(out) as partial:
        np.savez(partial, **outputs)
    return outputs
