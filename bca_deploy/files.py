"""Files that another process never sees half of, and arrays from files."""

import contextlib
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; what is written there takes its place at the end, unless something fails."""
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a ``.npz`` file; the one array of a ``.npy`` file has the name ``""``.

    Raises:
        InputError: missing, damaged, or not of plain arrays.
    """
    try:
        with path.open("rb") as file:  # opened here: np.load leaves a damaged file open
            loaded = np.load(file, allow_pickle=False)
            return {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} is not a readable .npz or .npy of plain arrays: {error}; write it with numpy.savez or numpy.save"
        ) from error
