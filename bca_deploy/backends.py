"""What a session runs on: the interface, and the choice among what this machine and this bundle really have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from numpy.typing import NDArray

from bca_deploy.bundle import Bundle
from bca_deploy.cuda import DeviceArray, Gpu
from bca_deploy.errors import BcaError, EngineError, InputError, check_one_of
from bca_deploy.gpus import query
from bca_deploy.manifest import ModelEntry, TensorEntry
from bca_deploy.spec import PRECISIONS, Dims, EngineLibrary, Precision

Array = NDArray[Any]
#: Inputs or outputs by name, on the CPU or on the GPU.
Arrays = Mapping[str, Array | DeviceArray]
Name = Literal["tensorrt", "rtx", "onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-cpu"]

#: Every backend, the one to prefer first: the order in which ``auto`` tries them. onnxruntime's TensorRT provider compiles
#: for minutes when it is opened, so it comes after its CUDA provider.
NAMES: tuple[Name, ...] = get_args(Name)


class Backend(Protocol):
    """Runs checked inputs. Any number of threads may call it at once.

    Attributes:
        name: as chosen.
        precision: of what runs.
        what: the file that runs and what runs it, in a few words.
        inputs: what it takes; ``outputs`` what it gives.
        dims: the sizes that it takes; ``profiles`` the combinations of them, where not every one will do.
        pads: whether many requests of different lengths are faster padded into batches than side by side.
        gpu: where it runs; None on the CPU.
    """

    name: Name
    precision: Precision
    what: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    dims: Dims
    profiles: tuple[Dims, ...]
    pads: bool
    gpu: Gpu | None

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs by name, on the CPU."""

    def run_into(self, inputs: Arrays, outputs: Arrays) -> None:
        """Write the outputs into the caller's arrays; those on the GPU are complete on return, too."""

    def run_alone(self, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs, using the calling thread alone, for callers that run many at once."""

    def warm(self, inputs: Arrays) -> None:
        """Run once wherever a later call may run."""

    def close(self) -> None:
        """Free what it holds; calls that are under way end as they would have."""


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        precision: of the model; None takes the best that the backend has.
        threads: for onnxruntime on CPU; None takes every core.
        spinning: onnxruntime on CPU: idle threads wait for the next call by spinning, which makes calls one after another
            faster, and takes the cores from whatever else runs on them.
        contexts: engines: how many calls may be on the GPU at once, each with memory of its own; more calls wait.
        cuda_graphs: engines: for how many shapes each context keeps a CUDA graph, for arrays on the CPU; 0 keeps none.
        cache: directory for what a backend compiles on this machine, so that the next process need not; None forgets it.
        host_code: engines: let a version-compatible one bring code that runs on the CPU; for engines that you trust only.

    Raises:
        InputError: an unknown precision, fewer than one thread or context, or less than no graphs.
    """

    precision: Precision | None = None
    threads: int | None = None
    spinning: bool = True
    contexts: int = 2
    cuda_graphs: int = 0
    cache: Path | None = None
    host_code: bool = False

    def __post_init__(self) -> None:
        if self.precision is not None:
            check_one_of("precision", self.precision, PRECISIONS)
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}; it must be at least 1, or None for every core")
        if self.contexts < 1:
            raise InputError(f"contexts is {self.contexts}; it must be at least 1")
        if self.cuda_graphs < 0:
            raise InputError(f"cuda_graphs is {self.cuda_graphs}; it must be at least 0")


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
        check_one_of("backend", name, ("auto", *NAMES))
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


def _engine(library: EngineLibrary) -> Callable[[Bundle, Options], Backend]:
    def open_it(bundle: Bundle, options: Options) -> Backend:
        from bca_deploy.engine_backend import open_engine

        return open_engine(library, bundle, options)

    return open_it


def _cuda(bundle: Bundle, options: Options) -> Backend:
    from bca_deploy.ort_backend import OrtBackend

    _need_provider("CUDA")
    return OrtBackend(bundle, _portable(bundle, options, ("fp16", "bf16", "fp32")), options, "onnxruntime-cuda")


def _tensorrt(bundle: Bundle, options: Options) -> Backend:
    from bca_deploy.ort_backend import OrtBackend

    if options.precision not in (None, "fp32"):
        raise InputError(
            f"precision {options.precision} with onnxruntime-tensorrt: that provider lets TensorRT round what a half graph "
            f"keeps in float32; use precision='fp32', or an engine: bca build {bundle.source} --engine tensorrt"
        )
    _need_provider("Tensorrt")
    return OrtBackend(bundle, _portable(bundle, options, ("fp32",)), options, "onnxruntime-tensorrt")


def _need_provider(kind: str) -> None:
    from bca_deploy.ort_backend import providers

    if f"{kind}ExecutionProvider" not in providers():
        raise EngineError(f"this onnxruntime has no {kind} provider; run: pip install 'bca-deploy[gpu]' on the GPU machine")
    if not (gpus := query()).found:
        raise EngineError(f"no GPU: {gpus.why_none}")


def _cpu(bundle: Bundle, options: Options) -> Backend:
    from bca_deploy.ort_backend import OrtBackend

    if options.precision == "bf16":
        raise InputError("onnxruntime has no bfloat16 products on the CPU; open with precision='fp32' or 'fp16', or on a GPU")
    own = [m for m in bundle.manifest.models if m.runtime == "onnxruntime-cpu" and options.precision in (None, m.precision)]
    return OrtBackend(bundle, own[0] if own else _portable(bundle, options, ("fp32", "fp16")), options, "onnxruntime-cpu")


def _portable(bundle: Bundle, options: Options, order: tuple[Precision, ...]) -> ModelEntry:
    models = {model.precision: model for model in bundle.manifest.models if model.runtime == "portable"}
    for precision in (options.precision,) if options.precision else order:
        if precision in models and (options.precision or _has_numpy_edges(models[precision])):
            return _with_numpy_edges(models[precision])
    has = ", ".join(models)
    raise InputError(
        f"precision {options.precision or ' or '.join(order)} is not in the bundle, which has {has}; export it with "
        f"--precision {options.precision or order[0]}"
    )


def _with_numpy_edges(model: ModelEntry) -> ModelEntry:
    if not _has_numpy_edges(model):
        raise InputError(
            f"{model.file} takes bfloat16, which onnxruntime does not take from numpy; export it with --keep-io-types, or "
            "choose another precision"
        )
    return model


def _has_numpy_edges(model: ModelEntry) -> bool:
    return all(tensor.dtype != "bfloat16" for tensor in (*model.inputs, *model.outputs))


_OPENERS: dict[str, Callable[[Bundle, Options], Backend]] = {
    "tensorrt": _engine("tensorrt"),
    "rtx": _engine("rtx"),
    "onnxruntime-cuda": _cuda,
    "onnxruntime-tensorrt": _tensorrt,
    "onnxruntime-cpu": _cpu,
}
