"""An engine file as a runner for parity, without a bundle."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bca_deploy.engines import libraries
from bca_deploy.errors import EngineError
from bca_deploy.session.backends.cuda import open_gpu
from bca_deploy.session.backends.engine import LanePool
from bca_deploy.session.backends.loaded_engine import EngineOptions, LoadedEngine, load_engine
from bca_deploy.spec import EngineLibrary

Array = NDArray[Any]


def engine_runner(
    path: Path, library: EngineLibrary, *, host_code: bool = False
) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """Return a runner of an engine file for parity: what the engine does not write comes out as NaN.

    Args:
        path: the engine.
        library: what built it.
        host_code: as for :class:`bca_deploy.session.backends.loaded_engine.EngineOptions`.

    Raises:
        MissingDependencyError: the library or cuda-core is not installed.
        EngineError: there is no GPU, or the engine does not open here. The runner raises it when a call fails.
    """
    libraries.load(library)
    gpu = open_gpu()
    pool = LanePool(load_engine(path, library, EngineOptions(host_code)), gpu, poison=True)

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        _check_inputs(pool.engine, inputs)
        return pool.run(inputs)

    return run


def _check_inputs(engine: LoadedEngine, inputs: Mapping[str, Any]) -> None:
    """Refuse what the engine would misread: it sees addresses only."""
    if set(inputs) != set(engine.inputs):
        raise EngineError(f"inputs {sorted(inputs)}; the engine takes {sorted(engine.inputs)}")
    for name, array in inputs.items():
        if array.dtype != engine.dtypes[name]:
            raise EngineError(f"input {name} is {array.dtype.name}; the engine takes {engine.dtypes[name].name}")
