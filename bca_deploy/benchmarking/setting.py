"""Under what a contender runs, as data: the bundle, its precision, the threads, and where a whole model's code is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.bundle.manifest import SAMPLES_FILE, ModelEntry, model_of, signature_of
from bca_deploy.bundle.read import Bundle
from bca_deploy.files import read_arrays
from bca_deploy.spec import Precision
from bca_deploy.timing.inputs import padded_inputs

Array = NDArray[Any]
Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Place:
    """Where a whole model's code is; running it runs that code.

    Attributes:
        factory: ``pkg.module:name`` or ``file.py:name``.
        checkpoint: weights to load into it.
        prefix: where the model is inside a bigger checkpoint.
    """

    factory: str
    checkpoint: Path | None = None
    prefix: str = ""


@dataclass(frozen=True)
class Setting:
    """Under what contenders run.

    Attributes:
        bundle: open.
        folder: where files are that were made for the contenders.
        precision: of the model.
        threads: that each may use on the CPU.
        backend: the session's.
        place: of a whole model's code.
    """

    bundle: Bundle
    folder: Path
    precision: Precision
    threads: int
    backend: str = "auto"
    place: Place | None = None

    @property
    def portable(self) -> ModelEntry:
        """The bundle's own model of the precision."""
        return model_of(self.bundle.manifest, self.precision)

    def file(self, name: str) -> Path:
        """Return where the graph lies that was made for a contender."""
        return self.folder / f"{name}.{self.precision}.onnx"

    def cast(self, feeds: Feeds) -> Feeds:
        """Return the inputs in the element types that the bundle's model takes."""
        wanted = {t.name: t.dtype for t in signature_of(self.bundle.manifest, self.portable).inputs}
        return {name: np.asarray(array).astype(wanted[name]) for name, array in feeds.items()}


def feeds_of(bundle: Bundle, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return padded inputs of these sizes; a whole model's integers are drawn from the samples that its bundle keeps."""
    return padded_inputs(bundle.manifest.signature, sizes, _seen(bundle))


def _seen(bundle: Bundle) -> dict[str, Array]:
    if SAMPLES_FILE not in bundle.manifest.files:
        return {}
    found: dict[str, list[Array]] = {}
    for name, array in read_arrays(bundle.path(SAMPLES_FILE)).items():
        found.setdefault(name.partition("/")[2], []).append(array.ravel())
    return {name: np.concatenate(arrays) for name, arrays in found.items()}
