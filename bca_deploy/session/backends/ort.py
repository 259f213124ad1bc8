"""onnxruntime as a backend: the CPU, or a GPU through its CUDA and TensorRT providers."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bca_deploy.bundle.manifest import ModelEntry, signature_of
from bca_deploy.bundle.read import Bundle
from bca_deploy.engines.profiles import shapes
from bca_deploy.errors import BcaError, BundleError, EngineError, first_line
from bca_deploy.optional import onnxruntime
from bca_deploy.session.backends.backend import Arrays, Name, Options
from bca_deploy.session.backends.cuda import DeviceArray, Gpu, open_gpu
from bca_deploy.session.backends.denormals import Flushed
from bca_deploy.signature import Dims, Signature
from bca_deploy.threads import ForkLock, on_own_thread

Array = NDArray[Any]


PROVIDERS: dict[Name, str] = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}


class OrtBackend:
    """One model on onnxruntime; see :class:`bca_deploy.session.backends.backend.Backend`."""

    def __init__(self, bundle: Bundle, model: ModelEntry, options: Options, name: Name) -> None:
        self.name: Name = name
        self.precision = model.precision
        self.signature, self.profiles = signature_of(bundle.manifest, model), tuple[Dims, ...]()
        self.pads = name != "onnxruntime-cpu"
        self.gpu: Gpu | None = open_gpu() if self.pads else None
        self._path, self._cache, self._spinning = bundle.path(model.file), options.cache, options.spinning
        self._names = [tensor.name for tensor in self.signature.outputs]
        self._session = self._open(options.threads)
        self._alone: Any = None
        self._lock = ForkLock()
        self.what = f"{model.file} on onnxruntime {onnxruntime().__version__}"

    def _open(self, threads: int | None) -> Any:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        if self.gpu is None:  # for the threads of its pool; the calling thread flushes by itself
            options.add_session_config_entry("session.set_denormal_as_zero", "1")
            options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._spinning else "0")
        provider, settings = PROVIDERS[self.name], self._settings()
        return on_own_thread(lambda: _session(ort, self._path, options, provider, settings))

    def _settings(self) -> dict[str, str]:
        """Return the provider's options. TensorRT is told the ranges, or it would compile again for every new length."""
        if self.name != "onnxruntime-tensorrt":
            return {}
        low, opt, high = (_as_text(self.signature, which) for which in range(3))
        settings = {"trt_profile_min_shapes": low, "trt_profile_opt_shapes": opt, "trt_profile_max_shapes": high}
        if self._cache is not None:
            settings |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(self._cache)}
        return settings

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs by name."""
        return self._run(_still_open(self._session), inputs)

    def _run(self, session: Any, inputs: Arrays) -> dict[str, Array]:
        try:
            with Flushed():
                return dict(zip(self._names, session.run(self._names, inputs), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise _failure(error, inputs) from error

    def run_into(self, inputs: Arrays, outputs: Arrays) -> None:
        """Write the outputs into the caller's arrays, with no copy on the way where they are on the same device."""
        session = _still_open(self._session)
        try:
            binding = self._bind(session.io_binding(), inputs, outputs)
            with Flushed():
                session.run_with_iobinding(binding)
            if self.gpu is not None:
                binding.synchronize_outputs()
        except Exception as error:
            raise _failure(error, inputs) from error

    def _bind(self, binding: Any, inputs: Arrays, outputs: Arrays) -> Any:
        for name, array in inputs.items():
            if isinstance(array, DeviceArray):
                binding.bind_input(name, "cuda", 0, array.dtype.type, array.shape, array.address)
            else:
                binding.bind_cpu_input(name, array)
        for name in self._names:
            array = outputs[name]
            where, address = ("cuda", array.address) if isinstance(array, DeviceArray) else ("cpu", array.ctypes.data)
            binding.bind_output(name, where, 0, array.dtype.type, array.shape, address)
        return binding

    def run_alone(self, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs, using the calling thread alone; on a GPU there is nothing to share."""
        if self.pads:
            return self.run(inputs)
        with self._lock:
            _still_open(self._session)
            alone = self._alone = self._alone or self._open(1)
        return self._run(alone, inputs)

    def warm(self, inputs: Arrays) -> None:
        """Run once."""
        self.run(inputs)

    def trim(self, inputs: Arrays) -> None:
        """Let go of what onnxruntime's arenas keep of larger calls; it does so at the end of a run that asks for it."""
        options = onnxruntime().RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        with self._lock:
            sessions = [] if self.pads else [self._session, self._alone]
        for session in sessions:
            if session is not None:
                with Flushed():
                    session.run(self._names, inputs, options)

    def close(self) -> None:
        """Let go of the sessions; they are freed when the last call is done."""
        with self._lock:
            self._session = self._alone = None


def _still_open(session: Any) -> Any:
    if session is None:
        raise BcaError("the session is closed; open the bundle again")
    return session


def _failure(error: Exception, inputs: Arrays) -> BcaError:
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
    return EngineError(f"onnxruntime failed on {shapes}: {first_line(error)}")


def _as_text(signature: Signature, which: int) -> str:
    """Return one shape of every input as the provider reads them: ``x:1x1x512,context:1x1x386``."""
    found = shapes(signature.dims, signature.inputs)
    return ",".join(f"{name}:{'x'.join(map(str, sizes[which]))}" for name, sizes in found.items())


@contextlib.contextmanager
def _as_utf8(path: Path) -> Iterator[str]:
    """Give a path that onnxruntime takes: one that is not UTF-8 by its open directory, as weights may lie beside the model."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            yield f"/proc/self/fd/{directory}/{path.name}"
        finally:
            os.close(directory)
    else:
        yield str(path)


def _session(ort: Any, path: Path, options: Any, provider: str, settings: dict[str, str]) -> Any:
    try:
        with _as_utf8(path) as place:
            session = ort.InferenceSession(place, options, providers=[(provider, settings)])
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise BundleError(f"onnxruntime does not open {path.name}: {first_line(error)}") from error
    if provider not in session.get_providers():  # it falls back without an error
        raise EngineError(f"{provider} does not start here; run with ORT_LOGGING_LEVEL=1 to see why, or use another backend")
    return session
