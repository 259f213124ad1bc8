"""What a session runs on: the interface that every backend has, and how it is asked to run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from numpy.typing import NDArray

from bca_deploy.errors import InputError, check_one_of
from bca_deploy.session.backends.cuda import DeviceArray, Gpu
from bca_deploy.signature import Dims, Signature
from bca_deploy.spec import PRECISIONS, Precision

Array = NDArray[Any]


#: Inputs or outputs by name, on the CPU or on the GPU.
Arrays = Mapping[str, Array | DeviceArray]


Name = Literal["tensorrt", "rtx", "onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-cpu"]


#: Every backend, the one to prefer first: the order in which ``auto`` tries them. onnxruntime's TensorRT provider compiles
#: for minutes when it is opened, so it comes after its CUDA provider.
NAMES: tuple[Name, ...] = get_args(Name)

#: More than any machine has cores; onnxruntime tries to start as many as it is told, and the process hangs.
MOST_THREADS = 1024


class Backend(Protocol):
    """Runs checked inputs. Any number of threads may call it at once.

    Attributes:
        name: as chosen.
        precision: of what runs.
        what: the file that runs and what runs it, in a few words.
        signature: what it takes and gives.
        profiles: the combinations of sizes, where not every one within the signature's ranges will do.
        pads: whether many requests of different lengths are faster padded into batches than side by side.
        gpu: where it runs; None on the CPU.
    """

    name: Name
    precision: Precision
    what: str
    signature: Signature
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

    def trim(self, inputs: Arrays) -> None:
        """Let go of memory that is kept for later calls as large as earlier ones, if by running these small ones."""

    def close(self) -> None:
        """Free what it holds; calls that are under way end as they would have."""


@dataclass(frozen=True)
class Options:
    """How to run: what :func:`bca_deploy.open` was given, and says of each.

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
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise InputError(
                f"threads is {self.threads}; it must be at least 1 and at most {MOST_THREADS}, or None for every core"
            )
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
