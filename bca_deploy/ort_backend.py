"""onnxruntime as a backend: the CPU, or CUDA through its execution provider."""

import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bca_deploy.backends import Name, Options
from bca_deploy.bundle import Bundle
from bca_deploy.denormals import Flushed, on_own_thread
from bca_deploy.errors import BundleError, EngineError, missing
from bca_deploy.manifest import ModelEntry

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


class OrtBackend:
    """One model on onnxruntime; see :class:`bca_deploy.backends.Backend`."""

    def __init__(self, bundle: Bundle, model: ModelEntry, options: Options, name: Name) -> None:
        self.name: Name = name
        self.precision = model.precision
        self.inputs, self.outputs, self.dims = model.inputs, model.outputs, bundle.manifest.dims
        self.pads = name == "onnxruntime-cuda"
        self._path, self._threads = bundle.path(model.file), options.threads
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
        provider = "CPUExecutionProvider"
        if self.name == "onnxruntime-cuda":
            provider = "CUDAExecutionProvider"
        else:  # for the threads of its pool; the calling thread flushes by itself
            options.add_session_config_entry("session.set_denormal_as_zero", "1")
        return on_own_thread(lambda: _session(ort, self._path, options, provider))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name."""
        with Flushed():
            return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))

    def run_into(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Write the outputs into the caller's arrays, with no copy on the way."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name in self._names:
            array = outputs[name]
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        with Flushed():
            self._session.run_with_iobinding(binding)

    def run_alone(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs, using the calling thread alone."""
        if self._alone is None:
            with self._lock:
                self._alone = self._alone or self._open(1)
        with Flushed():
            return dict(zip(self._names, self._alone.run(self._names, inputs), strict=True))

    def close(self) -> None:
        """Free the sessions."""
        self._session = self._alone = None


def _session(ort: Any, path: Path, options: Any, provider: str) -> Any:
    try:
        session = ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise BundleError(f"onnxruntime does not open {path.name}: {str(error).splitlines()[0]}") from error
    if provider not in session.get_providers():  # it falls back without an error
        raise EngineError(f"{provider} does not start here; run with ORT_LOGGING_LEVEL=1 to see why, or use another backend")
    return session
