"""Run an engine on this machine's GPU for parity: torch's CUDA tensors are its buffers, and torch's stream carries its work.

Requires: torch that sees the GPU, and the engine's library. Ensures: outputs that the engine computed in this very call, or
an :class:`EngineError`. Made to judge engines, not to be fast: every call copies in, allocates and waits.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bca_deploy import nvidia
from bca_deploy.errors import EngineError
from bca_deploy.spec import EngineLibrary

if TYPE_CHECKING:
    import tensorrt

    from bca_deploy.runners import Runner

Array = NDArray[Any]
Shape = tuple[int, ...]
#: The smallest, the optimal and the largest shape of each input.
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]

#: TensorRT's element types at an engine's edges.
_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}


def engine_runner(path: Path, library: EngineLibrary, *, host_code: bool = False) -> "Runner":
    """Return a runner on the GPU.

    Args:
        path: the engine.
        library: what built it.
        host_code: let the engine bring code that runs on the CPU. A version-compatible engine does, so it needs this; allow it
            for engines that you trust only.

    Raises:
        MissingDependencyError: the library is not installed.
        EngineError: torch sees no GPU, or the engine does not open here. The runner raises it when a call fails.
    """
    trt = nvidia.load(library)
    if not torch.cuda.is_available():
        raise EngineError(
            f"running {path.name} takes a GPU, and torch {torch.__version__} sees none; run it on a machine with one, with "
            "torch built for CUDA"
        )
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # makes the CUDA context that the engine is opened in
    said: list[str] = []
    return Session(open_engine(trt, path, host_code, said), torch.device("cuda"), stream, said)


def open_engine(trt: Any, path: Path, host_code: bool, said: list[str]) -> "tensorrt.ICudaEngine":
    """Read an engine.

    Args:
        trt: the library's module.
        path: the engine.
        host_code: as for :func:`engine_runner`.
        said: where the library's errors go, now and later.

    Raises:
        EngineError: it is not there, or does not open here.
    """
    if not path.is_file():
        raise EngineError(f"engine {path} does not exist; build it with bca build")

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: "tensorrt.ILogger.Severity", msg: str) -> None:
            if severity.name.endswith("ERROR"):
                said.append(msg)

    runtime: tensorrt.Runtime = trt.Runtime(Logger())  # it keeps its logger alive, and an engine keeps its runtime
    runtime.engine_host_code_allowed = host_code
    engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EngineError(f"{path.name} does not open here: {_first(said)}")
    return engine


def _first(said: Sequence[str]) -> str:
    return said[0].splitlines()[0] if said else "the library gives no reason"


class Session:
    """An opened engine; called with inputs by name, it returns the outputs by name. One call at a time.

    Args:
        engine: from :func:`open_engine`.
        device: where the buffers are.
        stream: what carries the work.
        said: the library's errors.

    Raises:
        EngineError: the GPU has no memory for the engine, or an edge has an element type that no model here has.
    """

    def __init__(self, engine: "tensorrt.ICudaEngine", device: torch.device, stream: Any, said: list[str]) -> None:
        self.engine, self.device, self.stream, self.said = engine, device, stream, said
        context = engine.create_execution_context()
        if context is None:
            raise EngineError(f"the engine gets no execution context: {_first(said)}")
        self.context = context
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.dtypes = {name: _dtype(name, engine.get_tensor_dtype(name).name) for name in names}
        self.inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
        self.outputs = [name for name in names if name not in self.inputs]
        self.profiles = [self._ranges(index) for index in range(engine.num_optimization_profiles)]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run; ``inputs`` have the element types of the engine's edges."""
        self._check(inputs)
        self.said.clear()
        try:
            with torch.cuda.stream(self.stream):
                return self._run(inputs)
        except RuntimeError as error:  # CUDA's own, found while waiting, and the library's
            raise EngineError(f"the engine failed: {str(error).splitlines()[0]}") from error

    def _ranges(self, profile: int) -> dict[str, tuple[Shape, Shape, Shape]]:
        ranges = {}
        for name in self.inputs:
            fixed = _shape(self.engine.get_tensor_shape(name))
            # An input without a dynamic dimension is in no profile.
            low, opt, high = (
                [fixed] * 3
                if -1 not in fixed
                else [_shape(dims) for dims in self.engine.get_tensor_profile_shape(name, profile)]
            )
            ranges[name] = (low, opt, high)
        return ranges

    def _check(self, inputs: Mapping[str, Array]) -> None:
        """Refuse what the engine would misread: it sees addresses only."""
        if set(inputs) != set(self.inputs):
            raise EngineError(f"inputs {sorted(inputs)}; the engine takes {sorted(self.inputs)}")
        for name, array in inputs.items():
            wanted = str(self.dtypes[name]).removeprefix("torch.")
            if array.dtype.name != wanted:
                raise EngineError(f"input {name} is {array.dtype.name}; the engine takes {wanted}")

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: _to_torch(array).to(self.device) for name, array in inputs.items()}
        self._set_shapes({name: tuple(tensor.shape) for name, tensor in given.items()})
        made = {name: self._output(name) for name in self.outputs}
        for name, tensor in (given | made).items():
            self._need(self.context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name}")
        self._need(self.context.execute_async_v3(self.stream.cuda_stream), "the call")
        self.stream.synchronize()
        return {name: _to_numpy(tensor.cpu()) for name, tensor in made.items()}

    def _set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        profile = choose_profile(self.profiles, shapes)
        if self.context.active_optimization_profile != profile:
            accepted = self.context.set_optimization_profile_async(profile, self.stream.cuda_stream)
            self._need(accepted, f"profile {profile}")
        for name, shape in shapes.items():
            self._need(self.context.set_input_shape(name, shape), f"shape {list(shape)} of {name}")
        vague = self.context.infer_shapes()
        self._need(not vague, f"the shapes: they leave {', '.join(vague)} open")

    def _output(self, name: str) -> torch.Tensor:
        """Return a buffer full of NaN: what the engine does not write is no output of an earlier call."""
        shape = _shape(self.context.get_tensor_shape(name))
        return torch.full(shape, torch.nan, dtype=self.dtypes[name], device=self.device)

    def _need(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise EngineError(f"the engine refused {what}: {_first(self.said)}")


def choose_profile(profiles: Sequence[Ranges], shapes: Mapping[str, Shape]) -> int:
    """Return the number of the profile that holds the shapes and whose optimal ones are nearest to them, as ratios.

    Args:
        profiles: the engine's.
        shapes: of the inputs at hand.

    Raises:
        EngineError: no profile holds them.
    """
    fitting = [index for index, ranges in enumerate(profiles) if _holds(ranges, shapes)]
    if not fitting:
        allowed = "; ".join(_in_words(ranges) for ranges in profiles)
        raise EngineError(f"no profile of the engine holds {_sizes(shapes)}; it has: {allowed}")
    return min(fitting, key=lambda index: _distance(profiles[index], shapes))


def _holds(ranges: Ranges, shapes: Mapping[str, Shape]) -> bool:
    return all(
        len(shape) == len(ranges[name][0])
        and all(low <= size <= high for low, size, high in zip(ranges[name][0], shape, ranges[name][2], strict=True))
        for name, shape in shapes.items()
    )


def _distance(ranges: Ranges, shapes: Mapping[str, Shape]) -> float:
    """Sum of the ratios' logarithms: half as long is as far off as twice as long, in every dimension alike."""
    pairs = [pair for name, shape in shapes.items() for pair in zip(shape, ranges[name][1], strict=True)]
    return math.fsum(abs(math.log(size / opt)) for size, opt in pairs)


def _sizes(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def _in_words(ranges: Ranges) -> str:
    return ", ".join(f"{name} {list(low)} to {list(high)}" for name, (low, _, high) in ranges.items())


def _dtype(name: str, kind: str) -> torch.dtype:
    if kind not in _DTYPES:
        raise EngineError(f"the engine's {name} is {kind}; models here have {', '.join(_DTYPES)}")
    return _DTYPES[kind]


def _shape(dims: "tensorrt.Dims") -> Shape:
    return tuple(int(dims[axis]) for axis in range(len(dims)))


def _to_torch(array: Array) -> torch.Tensor:
    """Return a copy, so that the array may be read-only or have gaps; numpy's bfloat16 is not torch's, the bits are."""
    copy = np.array(array, order="C")
    if copy.dtype.name == "bfloat16":
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def _to_numpy(tensor: torch.Tensor) -> Array:
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
