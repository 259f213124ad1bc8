"""The two NVIDIA libraries: how each is imported and installed, what it compiles for, and what it cannot do."""

from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

from bca_deploy.errors import InputError, MissingDependencyError, nearest
from bca_deploy.optional import missing
from bca_deploy.signature import DType
from bca_deploy.spec import EngineLibrary, Precision

#: TensorRT's names of element types, as in ONNX and numpy.
DTYPES: dict[str, DType] = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "BOOL": "bool", "INT32": "int32", "INT64": "int64",
}  # fmt: skip
#: Targets that TensorRT-RTX 1.7.1 refuses for a precision: Turing has no bfloat16, and gets no float32 products.
_UNABLE: dict[Precision, tuple[str, ...]] = {"bf16": ("sm75",), "fp32": ("sm75",), "fp16": ()}


@dataclass(frozen=True)
class Library:
    """One library.

    Attributes:
        name: as on the command line.
        module: what is imported.
        packages: the PyPI distributions that may bring it, the one to install first.
        targets: compute capabilities that it compiles for ahead of time; empty where it compiles for the GPU at hand.
        lacks: engine options that it cannot honour, with the reason and the way out.
    """

    name: EngineLibrary
    module: str
    packages: tuple[str, ...]
    targets: tuple[str, ...] = ()
    lacks: dict[str, str] = field(default_factory=dict)

    @property
    def needs_gpu(self) -> bool:
        """Whether building needs the GPU that the engine is for."""
        return not self.targets


_OTHER = "use --engine tensorrt on the GPU"
_NO_REFIT = f"TensorRT-RTX strips and refits weights only where a GPU is; {_OTHER}, or rebuild: it takes a second"

LIBRARIES: dict[EngineLibrary, Library] = {
    "rtx": Library(
        name="rtx",
        module="tensorrt_rtx",
        packages=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
        # ComputeCapability of TensorRT-RTX 1.7.1; https://docs.nvidia.com/deeplearning/tensorrt-rtx/
        targets=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
        lacks={
            "strip_weights": _NO_REFIT,
            "refittable": _NO_REFIT,
            "timing_cache": "TensorRT-RTX times nothing while it builds; leave the timing cache out",
            "version_compatible": f"TensorRT-RTX ships no lean runtime to put into the engine; {_OTHER}",
            "hardware_compatibility": "TensorRT-RTX compiles for --target instead; name every GPU generation there",
        },
    ),
    "tensorrt": Library(
        name="tensorrt",
        module="tensorrt",
        packages=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    ),
}


def load(name: EngineLibrary) -> ModuleType:
    """Import a library.

    Raises:
        MissingDependencyError: it is not installed, or its CUDA libraries do not load; the message says what to do.
    """
    library = LIBRARIES[name]
    try:
        module = import_module(library.module)
    except ModuleNotFoundError:
        raise _absent(library) from None
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"{library.module} does not load ({error}); run: pip install --force-reinstall {library.packages[0]}"
        ) from error
    if not hasattr(module, "Builder"):  # type stubs alone make an empty module of that name
        raise _absent(library)
    return module


def _absent(library: Library) -> MissingDependencyError:
    return missing(library.module, library.name)


def check_targets(library: Library, targets: tuple[str, ...], precision: Precision) -> tuple[str, ...]:
    """Return the targets to compile for, in the library's order and without repeats.

    Args:
        library: from ``LIBRARIES``.
        targets: as asked for; empty means all that can run the precision.
        precision: of the model.

    Raises:
        InputError: an unknown target, one that this library has not, or one that cannot run the precision.
    """
    if library.needs_gpu:
        if targets:
            raise InputError(
                f"target {', '.join(targets)} with --engine {library.name}: it compiles for the GPU at hand, so leave --target "
                "out and build on that GPU; --engine rtx compiles ahead of time"
            )
        return ()
    for target in targets:
        _check_target(library, target)
    unable = _UNABLE[precision]
    if refused := [target for target in targets if target in unable]:
        able = ", ".join(target for target in library.targets if target not in unable)
        raise InputError(
            f"precision {precision} with target {refused[0]}: TensorRT-RTX compiles no {precision} products for it; use fp16 "
            f"there, or other targets: {able}"
        )
    return tuple(target for target in library.targets if (target in targets if targets else target not in unable))


def _check_target(library: Library, target: str) -> None:
    if target in library.targets:
        return
    allowed = f"allowed: {', '.join(library.targets)}"
    if target in ("sm90", "sm100", "sm103"):
        chips = "H100 and H200" if target == "sm90" else "B200 and B300"
        raise InputError(
            f"target {target} ({chips}): TensorRT-RTX does not compile for it; use --engine tensorrt on that GPU; {allowed}"
        )
    raise InputError(f"target {target!r} is not known{nearest(target, library.targets)}; {allowed}")
