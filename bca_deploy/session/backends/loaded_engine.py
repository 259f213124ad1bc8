"""An engine opened on a GPU: what it takes and gives, and execution contexts on it.

Requires: the engine's library, and a GPU that is the calling thread's. Ensures: what does not open is an
:class:`EngineError` with the library's own reason.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bca_deploy.bundle.read import reading
from bca_deploy.engines import libraries
from bca_deploy.engines.libraries import DTYPES
from bca_deploy.engines.profiles import Ranges, Shapes
from bca_deploy.errors import EngineError, first_said
from bca_deploy.files import replacing
from bca_deploy.session.contract import numpy_dtype
from bca_deploy.spec import EngineLibrary

if TYPE_CHECKING:
    import tensorrt

Shape = tuple[int, ...]

_log = logging.getLogger("bca_deploy.engines.compile")


@dataclass(frozen=True)
class EngineOptions:
    """How to open an engine.

    Attributes:
        host_code: let it bring code that runs on the CPU. A version-compatible engine does, so it needs this; allow it for
            engines that you trust only.
        runtime_cache: TensorRT-RTX: file of the kernels compiled for this GPU; read if it is there, written by ``save``.
        graphs: calls will be captured, so that TensorRT-RTX must compile a shape's kernels before its first call, and not
            behind it.
    """

    host_code: bool = False
    runtime_cache: Path | None = None
    graphs: bool = False


class Said(threading.local):
    """The library's errors on the calling thread, which is the one that it works on."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def reason(self) -> str:
        """Return the first of them."""
        return first_said(self.lines, "the library gives no reason")


class LoadedEngine:
    """An engine and what it says of itself.

    Attributes:
        inputs: names of its inputs, in its order; ``outputs`` likewise.
        dtypes: element type of each.
        profiles: shapes of the inputs for each optimization profile.
        scratch_bytes: device memory that one context needs, at the largest shapes.
        said: the library's errors.

    Raises:
        EngineError: an edge has an element type that no model here has.
    """

    def __init__(self, trt: Any, engine: "tensorrt.ICudaEngine", said: Said, options: EngineOptions) -> None:
        self.trt, self.engine, self.said = trt, engine, said
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.dtypes = {name: _dtype(name, engine.get_tensor_dtype(name).name) for name in names}
        self.inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
        self.outputs = [name for name in names if name not in self.inputs]
        self.profiles: list[Ranges] = [self._ranges(index) for index in range(engine.num_optimization_profiles)]
        self.scratch_bytes = engine.device_memory_size_v2
        self._cache = RuntimeCache(trt, engine, options) if hasattr(trt, "IRuntimeCache") else None

    def context(self) -> "tensorrt.IExecutionContext":
        """Return a new context, without memory of its own: the caller gives it ``scratch_bytes``.

        Raises:
            EngineError: there is none to be had.
        """
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        made = self._cache.context(strategy) if self._cache else self.engine.create_execution_context(strategy)
        if made is None:
            raise EngineError(
                f"the engine gets no execution context: {self.said.reason()}; open it with fewer contexts, or on another "
                "backend"
            )
        return made

    def save(self) -> None:
        """Write the runtime cache, where there is one to write."""
        if self._cache:
            self._cache.save()

    def _ranges(self, profile: int) -> dict[str, Shapes]:
        ranges: dict[str, Shapes] = {}
        for name in self.inputs:
            fixed = shape_of(self.engine.get_tensor_shape(name))
            # An input without a dynamic dimension is in no profile.
            low, opt, high = (
                [fixed] * 3
                if -1 not in fixed
                else [shape_of(dims) for dims in self.engine.get_tensor_profile_shape(name, profile)]
            )
            ranges[name] = (low, opt, high)
        return ranges


class RuntimeCache:
    """TensorRT-RTX's kernels, which it compiles for the GPU at hand when a context first needs them.

    Args:
        trt: the library's module.
        engine: whose contexts share the cache.
        options: where it is kept between processes, and whether calls will be captured.
    """

    def __init__(self, trt: Any, engine: "tensorrt.ICudaEngine", options: EngineOptions) -> None:
        self.trt, self.engine, self._path, self._graphs = trt, engine, options.runtime_cache, options.graphs
        runtime_config: Any = engine.create_runtime_config()
        self.runtime_cache = runtime_config.create_runtime_cache()
        self._read()

    def context(self, strategy: Any) -> "tensorrt.IExecutionContext | None":
        """Return a context that compiles into the cache."""
        runtime_config: Any = self.engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(strategy)
        runtime_config.set_runtime_cache(self.runtime_cache)
        if self._graphs:
            eager = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
        return self.engine.create_execution_context(runtime_config)

    def save(self) -> None:
        """Write it; where that fails, the next process compiles again, and that is all."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as partial:
                partial.write_bytes(self.runtime_cache.serialize())
        except OSError as error:
            _log.warning("runtime cache %s is not written: %s", self._path, error)

    def _read(self) -> None:
        if self._path is None or not self._path.is_file():
            return
        try:
            fits = self.runtime_cache.deserialize(self._path.read_bytes())
        except OSError as error:
            _log.warning("runtime cache %s is not read: %s", self._path, error)
        else:
            if not fits:
                _log.warning("runtime cache %s is another GPU's or another version's; it will be replaced", self._path)


def load_engine(path: Path, library: EngineLibrary, options: EngineOptions = EngineOptions()) -> LoadedEngine:
    """Read an engine.

    Args:
        path: the engine.
        library: what built it.
        options: how to open it.

    Raises:
        MissingDependencyError: the library is not installed.
        EngineError: it is not there, or does not open here.
        BundleError: it cannot be read.
    """
    trt, said = libraries.load(library), Said()
    if not path.is_file():
        raise EngineError(f"engine {path} does not exist; build it with bca build")
    runtime: tensorrt.Runtime = trt.Runtime(_logger(trt, said))  # it keeps its logger alive, and an engine keeps its runtime
    runtime.engine_host_code_allowed = options.host_code
    with reading(path):
        content = path.read_bytes()
    engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise EngineError(f"{path.name} does not open here: {said.reason()}")
    return LoadedEngine(trt, engine, said, options)


def _logger(trt: Any, said: Said) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: "tensorrt.ILogger.Severity", msg: str) -> None:
            if severity.name.endswith("ERROR"):
                said.lines.append(msg)

    return Logger()


def _dtype(name: str, kind: str) -> np.dtype[Any]:
    if kind not in DTYPES:
        raise EngineError(f"the engine's {name} is {kind}; models here have {', '.join(DTYPES)}")
    return numpy_dtype(DTYPES[kind])


def shape_of(dims: "tensorrt.Dims | Sequence[int]") -> Shape:
    """Return TensorRT's dimensions as a tuple."""
    return tuple(int(dims[axis]) for axis in range(len(dims)))
