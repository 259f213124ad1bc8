"""What a session runs on: the interface, and the choice among what this machine and this bundle really have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from numpy.typing import NDArray

from bca_deploy.bundle import Bundle
from bca_deploy.errors import BcaError, EngineError, InputError, nearest
from bca_deploy.gpus import query
from bca_deploy.manifest import ModelEntry, TensorEntry
from bca_deploy.spec import Dims, Precision

Array = NDArray[Any]
Name = Literal["tensorrt", "rtx", "onnxruntime-cuda", "onnxruntime-cpu"]

#: Every backend, the fastest first: the order in which ``auto`` tries them.
NAMES: tuple[Name, ...] = get_args(Name)


class Backend(Protocol):
    """Runs checked inputs. Any number of threads may call it at once.

    Attributes:
        name: as chosen.
        precision: of what runs.
        what: the file that runs and what runs it, in a few words.
        inputs: what it takes; ``outputs`` what it gives.
        dims: the sizes that it takes.
        pads: whether many requests of different lengths are faster padded into batches than side by side.
    """

    name: Name
    precision: Precision
    what: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    dims: Dims
    pads: bool

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name."""

    def run_into(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Write the outputs into the caller's arrays."""

    def run_alone(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs, using the calling thread alone, for callers that run many at once."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        precision: of the model; None takes the best that the backend has.
        threads: for onnxruntime on CPU; None takes every core.
    """

    precision: Precision | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Explanation:
    """Why a session runs on what it runs on.

    Attributes:
        chosen: the backend, and the file that it runs.
        passed_over: the faster backends and why each was not taken.
    """

    chosen: str
    passed_over: tuple[tuple[Name, str], ...]

    def __str__(self) -> str:
        """One line."""
        others = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over)
        return self.chosen + (f" ({others})" if others else "")


def choose(bundle: Bundle, name: str, options: Options) -> tuple[Backend, Explanation]:
    """Return the backend to use.

    Args:
        bundle: the open bundle.
        name: one of ``NAMES``, or ``auto`` for the first of them that works.
        options: how to run.

    Raises:
        InputError: the name is not known.
        BcaError: the backend asked for does not work here (it never falls back), or none does.
    """
    if name != "auto":
        if name not in NAMES:
            raise InputError(f"backend {name!r} is not known{nearest(name, NAMES)}; allowed: auto, {', '.join(NAMES)}")
        backend = _OPENERS[name](bundle, options)
        return backend, Explanation(f"{backend.name}: {backend.what}", ())
    reasons: list[tuple[Name, str]] = []
    for candidate in NAMES:
        try:
            backend = _OPENERS[candidate](bundle, options)
        except BcaError as error:
            reasons.append((candidate, str(error)))
            continue
        return backend, Explanation(f"{backend.name}: {backend.what}", tuple(reasons))
    raise BcaError("nothing here runs this bundle: " + "; ".join(f"{name}: {reason}" for name, reason in reasons))


def _engine(library: Literal["tensorrt", "rtx"]) -> Callable[[Bundle, Options], Backend]:
    def open_engine(bundle: Bundle, options: Options) -> Backend:
        if not any(entry.library == library for entry in bundle.manifest.engines):
            raise EngineError(f"the bundle has no {library} engine; build one: bca build {bundle.source} --engine {library}")
        if not (gpus := query()).found:
            raise EngineError(f"no GPU: {gpus.why_none}")
        raise EngineError("this version builds engines and does not run them; use backend='onnxruntime-cuda'")

    return open_engine


def _cuda(bundle: Bundle, options: Options) -> Backend:
    from bca_deploy.ort_backend import OrtBackend, providers

    if "CUDAExecutionProvider" not in providers():
        raise EngineError("this onnxruntime has no CUDA provider; run: pip install 'bca-deploy[gpu]' on the GPU machine")
    if not (gpus := query()).found:
        raise EngineError(f"no GPU: {gpus.why_none}")
    return OrtBackend(bundle, _portable(bundle, options, ("fp16", "bf16", "fp32")), options, "onnxruntime-cuda")


def _cpu(bundle: Bundle, options: Options) -> Backend:
    from bca_deploy.ort_backend import OrtBackend

    if options.precision == "bf16":
        raise InputError("onnxruntime has no bfloat16 products on the CPU; open with precision='fp32' or 'fp16', or on a GPU")
    own = [m for m in bundle.manifest.models if m.runtime == "onnxruntime-cpu" and options.precision in (None, m.precision)]
    return OrtBackend(bundle, own[0] if own else _portable(bundle, options, ("fp32", "fp16")), options, "onnxruntime-cpu")


def _portable(bundle: Bundle, options: Options, order: tuple[Precision, ...]) -> ModelEntry:
    models = {model.precision: model for model in bundle.manifest.models if model.runtime == "portable"}
    for precision in (options.precision,) if options.precision else order:
        if precision in models:
            return models[precision]
    has = ", ".join(models)
    raise InputError(
        f"precision {options.precision or ' or '.join(order)} is not in the bundle, which has {has}; export it with "
        f"--precision {options.precision or order[0]}"
    )


_OPENERS: dict[str, Callable[[Bundle, Options], Backend]] = {
    "tensorrt": _engine("tensorrt"),
    "rtx": _engine("rtx"),
    "onnxruntime-cuda": _cuda,
    "onnxruntime-cpu": _cpu,
}
