"""onnxruntime as a backend: the CPU, or a GPU through its CUDA and TensorRT providers."""

import threading
from importlib import import_module
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bca_deploy.backends import Arrays, Name, Options
from bca_deploy.bundle import Bundle
from bca_deploy.cuda import DeviceArray, Gpu, open_gpu
from bca_deploy.denormals import Flushed, on_own_thread
from bca_deploy.errors import BundleError, EngineError, missing
from bca_deploy.manifest import ModelEntry, TensorEntry
from bca_deploy.profiles import shapes
from bca_deploy.spec import Dims

Array = NDArray[Any]


def onnxruntime() -> Any:
    """Return the onnxruntime module.

    Raises:
        MissingDependencyError: it is not installed; the message holds the pip command.
    """
    try:
        return import_module("onnxruntime")
    except ImportError:
        raise missing("onnxruntime", "cpu") from None


def providers() -> list[str]:
    """Return the execution providers of the installed onnxruntime."""
    found: list[str] = onnxruntime().get_available_providers()
    return found


PROVIDERS: dict[Name, str] = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}


class OrtBackend:
    """One model on onnxruntime; see :class:`bca_deploy.backends.Backend`."""

    def __init__(self, bundle: Bundle, model: ModelEntry, options: Options, name: Name) -> None:
        self.name: Name = name
        self.precision = model.precision
        self.inputs, self.outputs, self.dims = model.inputs, model.outputs, bundle.manifest.dims
        self.pads = name != "onnxruntime-cpu"
        self.gpu: Gpu | None = open_gpu() if self.pads else None
        self._path, self._cache = bundle.path(model.file), options.cache
        self._names = [tensor.name for tensor in model.outputs]
        self._session = self._open(options.threads)
        self._alone: Any = None
        self._lock = threading.Lock()
        self.what = f"{model.file} on onnxruntime {onnxruntime().__version__}"

    def _open(self, threads: int | None) -> Any:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        if self.gpu is None:  # for the threads of its pool; the calling thread flushes by itself
            options.add_session_config_entry("session.set_denormal_as_zero", "1")
        provider, settings = PROVIDERS[self.name], self._settings()
        return on_own_thread(lambda: _session(ort, self._path, options, provider, settings))

    def _settings(self) -> dict[str, str]:
        """Return the provider's options. TensorRT is told the ranges, or it would compile again for every new length."""
        if self.name != "onnxruntime-tensorrt":
            return {}
        low, opt, high = (_as_text(self.inputs, self.dims, which) for which in range(3))
        settings = {"trt_profile_min_shapes": low, "trt_profile_opt_shapes": opt, "trt_profile_max_shapes": high}
        if self._cache is not None:
            settings |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(self._cache)}
        return settings

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs by name."""
        with Flushed():
            return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))

    def run_into(self, inputs: Arrays, outputs: Arrays) -> None:
        """Write the outputs into the caller's arrays, with no copy on the way where they are on the same device."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            if isinstance(array, DeviceArray):
                binding.bind_input(name, "cuda", 0, array.dtype.type, array.shape, array.address)
            else:
                binding.bind_cpu_input(name, array)
        for name in self._names:
            array = outputs[name]
            where, address = ("cuda", array.address) if isinstance(array, DeviceArray) else ("cpu", array.ctypes.data)
            binding.bind_output(name, where, 0, array.dtype.type, array.shape, address)
        with Flushed():
            self._session.run_with_iobinding(binding)
        if self.gpu is not None:
            binding.synchronize_outputs()

    def run_alone(self, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs, using the calling thread alone."""
        if self._alone is None:
            with self._lock:
                self._alone = self._alone or self._open(1)
        with Flushed():
            return dict(zip(self._names, self._alone.run(self._names, inputs), strict=True))

    def close(self) -> None:
        """Free the sessions."""
        self._session = self._alone = None


def _as_text(inputs: tuple[TensorEntry, ...], dims: Dims, which: int) -> str:
    """Return one shape of every input as the provider reads them: ``x:1x1x512,context:1x1x386``."""
    return ",".join(f"{name}:{'x'.join(map(str, found[which]))}" for name, found in shapes(dims, inputs).items())


def _session(ort: Any, path: Path, options: Any, provider: str, settings: dict[str, str]) -> Any:
    try:
        session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise BundleError(f"onnxruntime does not open {path.name}: {str(error).splitlines()[0]}") from error
    if provider not in session.get_providers():  # it falls back without an error
        raise EngineError(f"{provider} does not start here; run with ORT_LOGGING_LEVEL=1 to see why, or use another backend")
    return session
