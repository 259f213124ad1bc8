"""The inputs that a whole model is tried on: the user's samples, and sizes of every kind with masks of every pattern."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from bca_deploy.parity.cases import Scope, round_to
from bca_deploy.signature import Signature
from bca_deploy.spec import Precision
from bca_deploy.whole.draws import PATTERNS, Draws, Pattern
from bca_deploy.whole.samples import Sample

Arrays = dict[str, NDArray[Any]]
#: Of each dimension; to be hashed.
Sizes = tuple[tuple[str, int], ...]

#: Each output's pool has at least so many values: with fewer, right models are refused by chance (docs/parity.md).
POOL_VALUES = 512
# So many times all sizes and patterns are run, with other numbers.
_LEAST_SEEDS: dict[Scope, int] = {"quick": 1, "full": 4}
# A model that gives one number a call is not run more often than this.
_MOST_CASES: dict[Scope, int] = {"quick": 64, "full": 256}

# One row for each kind of sizes: the smallest, odd, even, equal, unequal. A dimension takes the number of its place.
_SIZES = ((1,) * 8, (7, 5, 9, 3, 11, 13, 15, 17), (6, 8, 4, 10, 12, 14, 16, 2), (6,) * 8, (3, 16, 8, 5, 13, 2, 9, 11))
_BATCH = 4  # every way to be dead takes four entries


@dataclass(frozen=True)
class Case:
    """Inputs to try.

    Attributes:
        name: in words.
        sizes: of the dimensions; empty for a sample of the user's.
        pattern: of the masks.
        seed: of the numbers.
        sample: which of the user's samples, from 0.
    """

    name: str
    sizes: Sizes = ()
    pattern: Pattern = "all live"
    seed: int = 0
    sample: int | None = None


def cases_of(
    draws: Draws, signature: Signature, samples: Sequence[Sample], scope: Scope, tries: Sequence[Mapping[str, int]] = ()
) -> list[Case]:
    """Return the cases of a matrix: the user's samples, then sizes of every kind with masks of every pattern.

    There are as many as it takes for every output to be a pool of :data:`POOL_VALUES`.

    Args:
        draws: of the inputs.
        signature: of the model.
        samples: the user's.
        scope: ``full`` has more of them.
        tries: sizes of some dimensions that a trace leaves in doubt.
    """
    patterns: Sequence[Pattern] = PATTERNS if draws.masks else ("all live",)
    usual = [_sizes(signature, row) for row in _SIZES]
    sizes = list(dict.fromkeys([*usual, *(_tried(usual[1], some) for some in tries)]))
    found = [Case(f"sample {number + 1}", sample=number) for number in range(len(samples))]
    seed = 0
    while seed < _LEAST_SEEDS[scope] or (len(found) < _MOST_CASES[scope] and _smallest_pool(found, signature) < POOL_VALUES):
        for size, pattern in itertools.product(sizes, patterns):
            shown = "x".join(str(n) for _, n in size)
            found.append(Case(f"{pattern} {shown} seed {seed}", size, pattern, seed))
        seed += 1
    return found


def _tried(usual: Sizes, some: Mapping[str, int]) -> Sizes:
    return tuple((name, some.get(name, size)) for name, size in usual)


def _smallest_pool(cases: Sequence[Case], signature: Signature) -> int:
    """Return how many values of the output that has the fewest all these cases have."""
    return min(sum(math.prod(t.shape(dict(case.sizes))) for case in cases if case.sample is None) for t in signature.outputs)


def _sizes(signature: Signature, row: tuple[int, ...]) -> Sizes:
    """Return sizes within the ranges; a batch has room for every way to be dead."""
    dims, lengths = signature.dims, itertools.cycle(row)
    return tuple((name, r.clip(_BATCH if name == signature.batch else next(lengths))) for name, r in dims.items())


def inputs_of(case: Case, draws: Draws, samples: Sequence[Sample], precision: Precision) -> Arrays:
    """Return a case's inputs; floats as float32 that the precision represents."""
    if case.sample is None:
        return draws.inputs(dict(case.sizes), case.pattern, case.seed, precision)
    arrays = {name: tensor.numpy() for name, tensor in samples[case.sample].items()}
    return {name: round_to(a, precision) if a.dtype.kind == "f" else a for name, a in arrays.items()}
