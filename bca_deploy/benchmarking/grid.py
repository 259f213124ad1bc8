"""The grid of a benchmark: shapes, precisions, numbers of threads, and how long each contender has."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from bca_deploy.benchmarking.contenders import NAMES, QUICK, Name
from bca_deploy.bundle.manifest import Manifest, precisions
from bca_deploy.errors import InputError, check_one_of
from bca_deploy.session.backends.backend import Options
from bca_deploy.signature import Dims, Signature
from bca_deploy.spec import Precision

#: A size for each of the bundle's dimensions, in order.
Shape = tuple[int, ...]
#: What is measured where nothing is said; each is brought into the bundle's ranges.
BATCHES, LENGTHS, SECONDS = (1, 8), (64, 512), 3.0
#: The same of ``--quick``.
QUICK_BATCHES, QUICK_SECONDS = (1,), 1.0


@dataclass(frozen=True)
class Asked:
    """What somebody wants measured; what is empty or None has a default.

    Attributes:
        shapes: a size for each dimension of the bundle, in order; in place of batches and lengths.
        batches: each is measured with each of the lengths.
        lengths: of every dimension but the batch, all alike, as near as the bundle's ranges allow.
        precisions: default what the session runs in.
        threads: default every core.
        seconds: for each contender in each cell.
        quick: other defaults, that take less than a minute: batch 1, a second, four contenders.
    """

    shapes: tuple[Shape, ...] = ()
    batches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    seconds: float | None = None
    quick: bool = False


@dataclass(frozen=True)
class Cell:
    """One shape at one precision on so many threads."""

    shape: Shape
    precision: Precision
    threads: int

    def __str__(self) -> str:
        """As messages name it."""
        return f"{'x'.join(map(str, self.shape))} in {self.precision} on {self.threads} threads"


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        shapes: a size for each dimension of the bundle, in order.
        precisions: of the model.
        threads: that each contender may use on the CPU.
        seconds: for each contender in each cell.
        among: which contenders, where none was asked for by name.
        rounds: in which the contenders take their turns.
    """

    shapes: tuple[Shape, ...]
    precisions: tuple[Precision, ...]
    threads: tuple[int, ...]
    seconds: float
    among: tuple[Name, ...] = NAMES
    rounds: int = 7

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell."""
        found = product(self.precisions, self.threads, self.shapes)
        return tuple(Cell(shape, precision, threads) for precision, threads, shape in found)

    @property
    def turn_ms(self) -> float:
        """How long a turn goes on."""
        return self.seconds * 1e3 / self.rounds


def make_grid(manifest: Manifest, asked: Asked) -> Grid:
    """Return the grid for a bundle.

    Raises:
        InputError: a shape outside the bundle's dims, a precision that it has not, or threads that no session takes.
    """
    for count in asked.threads:
        Options(threads=count)
    has = precisions(manifest)
    for name in asked.precisions:
        check_one_of("precision", name, has)
    for shape in asked.shapes:
        _check_shape(shape, manifest.signature.dims)
    batches = asked.batches or (QUICK_BATCHES if asked.quick else BATCHES)
    shapes = asked.shapes or product_of(manifest.signature, batches, asked.lengths or LENGTHS)
    chosen = tuple(name for name in has if name in asked.precisions) or has[:1]
    threads = asked.threads or (len(os.sched_getaffinity(0)),)
    seconds = asked.seconds if asked.seconds is not None else QUICK_SECONDS if asked.quick else SECONDS
    return Grid(shapes, chosen, threads, seconds, QUICK if asked.quick else NAMES)


def product_of(signature: Signature, batches: Iterable[int], lengths: Iterable[int]) -> tuple[Shape, ...]:
    """Return every batch with every length, all lengths of a shape alike, each as near as the bundle's ranges allow."""
    found = (
        tuple(allowed.clip(batch if name == signature.batch else length) for name, allowed in signature.dims.items())
        for batch, length in product(batches, lengths)
    )
    return tuple(dict.fromkeys(found))


def _check_shape(shape: Shape, dims: Dims) -> None:
    for name, size in dims.named(shape).items():
        allowed = dims[name]
        if not allowed.min <= size <= allowed.max:
            raise InputError(f"shape {'x'.join(map(str, shape))}: {name} is {size}, allowed {allowed.min} to {allowed.max}")


def parse_shapes(texts: Iterable[str]) -> list[Shape]:
    """Read one size for each dimension, such as ``BATCHxX_LENxCONTEXT_LEN``.

    Raises:
        InputError: anything else.
    """
    found = []
    for text in texts:
        parts = text.split("x")
        if not all(part.isdecimal() for part in parts):
            raise InputError(f"shape {text!r}: give a size for each dimension, BATCHxX_LENxCONTEXT_LEN, such as 1x512x512")
        found.append(tuple(int(part) for part in parts))
    return found
