"""What an export is made from: the bare layer, or a whole model. One writer of bundles serves both."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from bca_deploy.bundle.manifest import LayerEntry, ModelLowering
from bca_deploy.bundle.trust import Trust
from bca_deploy.exporter.recipe import Recipe
from bca_deploy.parity.verdict import Verdict
from bca_deploy.progress import Clock
from bca_deploy.signature import Signature
from bca_deploy.spec import Interface, Lowering, Precision, Runtime


@dataclass(frozen=True)
class Made:
    """One written model.

    Attributes:
        nodes: in its graph.
        verdict: on it.
    """

    nodes: int
    verdict: Verdict


class Source(Protocol):
    """What a bundle's models are made from, and held against."""

    @property
    def name(self) -> str:
        """What it is called in the manifest."""

    @property
    def trust(self) -> Trust:
        """What shows that it is the function that the user runs."""

    @property
    def signature(self) -> Signature:
        """What every model takes and gives."""

    @property
    def layers(self) -> tuple[LayerEntry, ...]:
        """The layers that were lowered."""

    @property
    def interface(self) -> Interface | None:
        """The optional inputs and outputs of the bare layer; None for a whole model."""

    @property
    def guessed(self) -> tuple[str, ...]:
        """The dimensions whose ranges nobody gave."""

    @property
    def lowering(self) -> ModelLowering:
        """The form of the attention in the graphs."""

    def lowering_for(self, runtime: Runtime) -> ModelLowering:
        """Return the form in the graphs for one runtime."""

    @property
    def has_choice(self) -> bool:
        """Whether the graph for the CPU can have another form than it has."""

    def on_cpu(self, lowering: Lowering) -> Self:
        """Return the same with this form in the graph for onnxruntime on the CPU."""

    def usual_inputs(self) -> dict[str, NDArray[Any]]:
        """Return inputs of the sizes to tune for."""

    def write(self, precision: Precision, runtime: Runtime, path: Path, recipe: Recipe) -> int:
        """Trace and write one model, judge nothing, and return the number of its nodes; raises ExportError."""

    def check_precision(self, precision: Precision, opset: int) -> None:
        """Refuse a precision that the opset does not take; raises InputError."""

    def forms(self, precisions: Iterable[Precision]) -> list[tuple[Precision, Runtime]]:
        """Return which models to make."""

    def make(self, precision: Precision, runtime: Runtime, path: Path, recipe: Recipe, clock: Clock) -> Made:
        """Trace, write and judge one model; raises ExportError."""

    def selftest(self, precisions: Sequence[Precision]) -> dict[str, NDArray[Any]]:
        """Return the cases with which a machine without PyTorch proves the models."""

    def write_files(self, directory: Path) -> None:
        """Write what goes with the models."""


def package_version(package: str) -> str:
    """Return the installed version; onnxruntime's under either of its names."""
    names = ("onnxruntime", "onnxruntime-gpu") if package == "onnxruntime" else (package,)
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"
