"""`bca doctor`: what this machine can do, and the command that adds what is missing."""

import platform
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bca_deploy.engines import libraries
from bca_deploy.engines.gpus import Gpus, query
from bca_deploy.errors import MissingDependencyError
from bca_deploy.optional import onnxruntime, pip_command
from bca_deploy.spec import EngineLibrary


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: what.
        ok: whether it is there and works.
        found: its version or what is known of it; empty where absent.
        enables: what it is needed for.
        fix: the command or step that adds it; empty where nothing is to be done.
    """

    name: str
    ok: bool
    found: str
    enables: str
    fix: str = ""


def examine() -> tuple[Finding, ...]:
    """Look at everything; imports what is installed, touches no network and needs no rights."""
    gpus = query()
    return (
        Finding("Python", sys.version_info >= (3, 11), platform.python_version(), "everything", ""),
        _package("torch", "export", "export, verify, refit", _torch),
        _package("onnx", "export", "export, verify, refit"),
        _onnxruntime(gpus),
        _library("rtx", "engines built ahead of time, for GeForce and RTX GPUs"),
        _library("tensorrt", "engines built on the GPU they are for"),
        _package("cuda-core", "rtx", "running engines, arrays on the GPU"),
        _driver(gpus),
        *(_gpu(gpus)),
    )


def _package(name: str, extra: str, enables: str, detail: Any = None) -> Finding:
    try:
        module = import_module(name.replace("-", "."))
        found = f"{version(name)}{detail(module) if detail else ''}"
    except (ImportError, OSError, PackageNotFoundError):
        return Finding(name, False, "", enables, pip_command(extra))
    return Finding(name, True, found, enables)


def _torch(torch: Any) -> str:
    return f", CUDA {torch.version.cuda}" if torch.cuda.is_available() else ", CPU"


def _onnxruntime(gpus: Gpus) -> Finding:
    enables = "running the ONNX models, parity"
    try:
        ort = onnxruntime()
    except (ImportError, OSError):
        extra = "gpu" if gpus.found else "cpu"
        return Finding("onnxruntime", False, "", enables, pip_command(extra))
    names = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
    lacks = gpus.found and "CUDA" not in names
    fix = "pip uninstall -y onnxruntime && pip install 'bca-deploy[gpu]'" if lacks else ""
    return Finding("onnxruntime", True, f"{ort.__version__}, providers {', '.join(names)}", enables, fix)


def _library(name: EngineLibrary, enables: str) -> Finding:
    library = libraries.LIBRARIES[name]
    label = {"rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}[name]
    try:
        module = libraries.load(name)
    except MissingDependencyError as error:
        return Finding(label, False, "", enables, str(error).rpartition("run: ")[2])
    targets = f", targets {', '.join(library.targets)}" if library.targets else ""
    return Finding(label, True, f"{module.__version__}{targets}", enables)


def _driver(gpus: Gpus) -> Finding:
    enables = "running anything on a GPU"
    if gpus.found:
        return Finding("CUDA driver", True, f"{gpus.found[0].driver}, up to CUDA {gpus.cuda}", enables)
    return Finding("CUDA driver", False, "", enables, gpus.why_none)


def _gpu(gpus: Gpus) -> list[Finding]:
    return [Finding(f"GPU {i}", True, f"{g.name}, {g.compute_capability}", "engines") for i, g in enumerate(gpus.found)]
