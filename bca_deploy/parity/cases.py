"""The parity matrix: which inputs a model is tried on. Plain numpy, and the same cases for the same question every time."""

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)
import numpy as np
from numpy.typing import NDArray

from bca_deploy.signature import Dims
from bca_deploy.spec import DTYPE_OF, MASK_NAMES, Interface, LayerSpec, Precision, layer_signature

Array = NDArray[Any]
Scope = Literal["quick", "full"]
Sharpness = Literal["plain", "sharp", "steep"]
Family = Literal[
    "no mask", "padded", "scattered", "x only", "context only", "dead rows", "opposed", "loud", "quiet", "bias extremes"
]

NUMPY_DTYPES: dict[Precision, np.dtype[Any]] = {precision: np.dtype(name) for precision, name in DTYPE_OF.items()}

#: Each scope runs at least this many cases.
LEAST_CASES: dict[Scope, int] = {"quick": 40, "full": 200}

# Random weights make attention nearly uniform, which hides everything, so the query weights are scaled until the largest
# |logit| is about this. ``steep`` tells a mask's fill of -10000 from the true one: twenty times that, as most logits are far
# smaller than the largest.
_LOGIT_TARGETS: dict[Sharpness, float] = {"sharp": 30.0, "steep": 2e5}
# In float16 no logit may overflow, neither here nor, before it is scaled, in PyTorch eager.
_FLOAT16_STEEP = 9000.0
_FLOAT16_MAX = 65504.0

# Each length pair at its scope's cap; equal lengths are there because swapped masks or an unturned bias fit no others.
_LENGTHS: dict[Scope, tuple[tuple[int, int], ...]] = {
    "quick": ((1, 1), (7, 5), (16, 16)),
    "full": ((1, 1), (1, 9), (7, 5), (33, 33), (96, 130)),
}
# Every way to be dead takes four rows.
_BATCHES: dict[Family, int] = {"dead rows": 4, "opposed": 8}
# An ``opposed`` row has one logit per head, and only a negative one beside padding tells anything: that is one row in four of
# two tokens. For each pair of lengths so many are drawn, in as many cases as it takes: all are silent once in 10,000 layers.
_OPPOSED_LOGITS = 32
# Squares of loud activations overflow float16; beside a variance of 1e-4 a wrong epsilon of the normalisation shows.
_VOLUMES: dict[Family, float] = {"loud": 2500.0, "quiet": 0.01}
_OPT_CAP: dict[Scope, int] = {"quick": 64, "full": 256}
_LONG_CAP: dict[Scope, int] = {"quick": 256, "full": 2048}

#: No case's float64 attention maps, six of them alive at once, take more than this.
MEMORY_BUDGET_BYTES = 2 * 2**30
#: Multiply-adds that the whole matrix may take per scope: about 3 s and 30 s on two cores in float32.
WORK_BUDGET: dict[Scope, float] = {"quick": 4e10, "full": 4e11}


@dataclass(frozen=True)
class Case:
    """One point of the matrix.

    Attributes:
        family: what the masks (or the bias) look like.
        sharpness: how large the logits are.
        batch: batch size.
        x_len: length of ``x``.
        context_len: length of ``context``.
        seed: of the random numbers.
    """

    family: Family
    sharpness: Sharpness
    batch: int
    x_len: int
    context_len: int
    seed: int

    @property
    def name(self) -> str:
        """The case in a few words, unique in its matrix."""
        return f"{self.family} {self.sharpness} {self.batch}x{self.x_len}x{self.context_len} seed {self.seed}"


def families(spec: LayerSpec, interface: Interface) -> list[Family]:
    """Return the families that this interface can show."""
    found: list[Family] = ["no mask"]
    if interface.masked:
        found += ["padded", "scattered", "dead rows", "opposed"]
    if interface.mask and interface.context_mask:
        found += ["x only", "context only"]
    if spec.prenorm and spec.depth is None:
        found += ["loud", "quiet"]
    if interface.rel_pos_bias != "none":
        found.append("bias extremes")
    return found


def logit_target(sharpness: Sharpness, precision: Precision, scale: float) -> float:
    """Return the largest |logit| to aim at."""
    target = _LOGIT_TARGETS[sharpness]
    return min(target, _FLOAT16_STEEP, 0.8 * _FLOAT16_MAX * scale) if precision == "fp16" else target


def matrix(spec: LayerSpec, interface: Interface, dims: Dims, scope: Scope, most_weights: int | None = None) -> list[Case]:
    """Return the cases of one scope: families x lengths x sharpness x seeds, within the memory and work budgets.

    Args:
        spec: the layer; its widths decide how long the long cases may be.
        interface: decides the families.
        dims: every case lies inside these ranges.
        scope: ``quick`` (at least 40 cases) or ``full`` (at least 200).
        most_weights: attention weights (batch x heads x lengths) that a case may have at most, for a slow runtime.

    Returns:
        Distinct cases. Those too large for a budget are halved in length until they fit or the ranges forbid it.
    """

    def fits(case: Case) -> bool:
        allowance = WORK_BUDGET[scope] / LEAST_CASES[scope] * (8 if case.batch == 1 else 2)
        small = most_weights is None or _weights(case, spec) <= most_weights
        return (
            small
            and _weights(case, spec) * 6 * 8 <= MEMORY_BUDGET_BYTES
            and work(spec, case.batch, case.x_len, case.context_len) <= allowance
        )

    cases: dict[Case, None] = {}
    seeds = 0
    while len(cases) < LEAST_CASES[scope]:
        cases |= dict.fromkeys(_shrink(case, dims, fits) for case in _one_seed(spec, interface, dims, scope, seeds))
        seeds += 1
    later = [_one_seed(spec, interface, dims, scope, seed) for seed in range(seeds, _opposed_seeds(spec, dims))]
    opposed = [case for case in itertools.chain(*later) if case.family == "opposed"]
    return list(cases | dict.fromkeys(_shrink(case, dims, fits) for case in opposed))


def _opposed_seeds(spec: LayerSpec, dims: Dims) -> int:
    return math.ceil(_OPPOSED_LOGITS / (dims["batch"].clip(_BATCHES["opposed"]) * spec.heads))


def _one_seed(spec: LayerSpec, interface: Interface, dims: Dims, scope: Scope, seed: int) -> Iterator[Case]:
    for family, (x_len, context_len) in itertools.product(families(spec, interface), _lengths(dims, scope)):
        batch = dims["batch"].clip(_BATCHES.get(family, 2))
        levels: tuple[Sharpness, ...] = ("steep",) if family == "opposed" else ("plain", "sharp")
        for sharpness in levels:
            yield Case(family, sharpness, batch, x_len, context_len, seed)
    if seed == 0:
        for family in [f for f in families(spec, interface) if f in ("no mask", "padded")]:
            long = [dim.clip(_LONG_CAP[scope]) for dim in (dims["x_len"], dims["context_len"])]
            yield Case(family, "sharp", dims["batch"].clip(1), long[0], long[1], seed)


def _lengths(dims: Dims, scope: Scope) -> list[tuple[int, int]]:
    cap = _OPT_CAP[scope]
    pairs = [*_LENGTHS[scope], (min(dims["x_len"].opt, cap), min(dims["context_len"].opt, cap))]
    return list(
        dict.fromkeys((dims["x_len"].clip(x_len), dims["context_len"].clip(context_len)) for x_len, context_len in pairs)
    )


def _shrink(case: Case, dims: Dims, fits: Callable[[Case], bool]) -> Case:
    while not fits(case):
        smaller = replace(
            case, x_len=dims["x_len"].clip(case.x_len // 2), context_len=dims["context_len"].clip(case.context_len // 2)
        )
        if smaller == case:
            break
        case = smaller
    return case


def _weights(case: Case, spec: LayerSpec) -> int:
    return case.batch * spec.heads * case.x_len * case.context_len


def work(spec: LayerSpec, batch: int, x_len: int, context_len: int) -> int:
    """Return about how many multiply-adds one run takes."""
    tokens = x_len * (spec.dim + (spec.ff_hidden or 0)) + context_len * (spec.context_dim + (spec.context_ff_hidden or 0))
    attention = 4 * spec.inner_dim * x_len * context_len
    return batch * (3 * spec.inner_dim * tokens + attention) * (spec.depth or 1)


def make_inputs(case: Case, spec: LayerSpec, interface: Interface, precision: Precision) -> dict[str, Array]:
    """Return the case's inputs by name.

    Floats are float32 arrays whose values ``precision`` represents exactly, so that rounding the inputs is no part of
    the error; masks are bool.
    """
    rng = np.random.default_rng([case.seed, zlib.crc32(case.name.encode())])
    sizes = {"batch": case.batch, "x_len": case.x_len, "context_len": case.context_len}
    shapes = {tensor.name: tensor.shape(sizes) for tensor in layer_signature(spec, interface).inputs}
    masks = {name: _MASKS[case.family](rng, name, shapes[name]) for name in shapes if name in MASK_NAMES}
    floats = {name: rng.standard_normal(shapes[name]) for name in shapes if name not in masks}
    if case.family == "opposed":
        floats |= {name: _oppose(floats[name], masks.get(mask)) for name, mask in (("x", "mask"), ("context", "context_mask"))}
    if case.family in _VOLUMES:
        floats |= {name: floats[name] * _VOLUMES[case.family] for name in ("x", "context")}
    if case.family == "bias extremes":
        floats["rel_pos_bias"] = _extreme(rng, floats["rel_pos_bias"], precision)
    return {name: round_to(floats[name], precision) if name in floats else masks[name] for name in shapes}


def round_to(values: Array, precision: Precision) -> Array:
    """Round to ``precision`` and return as float32."""
    with np.errstate(over="ignore"):
        rounded: Array = values.astype(NUMPY_DTYPES[precision]).astype(np.float32)
    return rounded


def _all_true(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    return np.ones(shape, dtype=bool)


def _padded(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    lengths = rng.integers(1, shape[1] + 1, size=shape[0])
    return np.arange(shape[1]) < lengths[:, None]


def _scattered(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    return rng.random(shape) < 0.6


def _only(wanted: str) -> Callable[[np.random.Generator, str, tuple[int, ...]], Array]:
    return lambda rng, name, shape: (_scattered if name == wanted else _all_true)(rng, name, shape)


def _dead_rows(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """Batch row 0 is dead on x's side, row 1 on context's, row 2 on both, the rest padded."""
    mask = _padded(rng, name, shape)
    mask[(0 if name == "mask" else 1) :: 4] = False
    mask[2::4] = False
    return mask


_MASKS: dict[Family, Callable[[np.random.Generator, str, tuple[int, ...]], Array]] = {
    "no mask": _all_true,
    "padded": _padded,
    "scattered": _scattered,
    "x only": _only("mask"),
    "context only": _only("context_mask"),
    "dead rows": _dead_rows,
    "opposed": _padded,
    "loud": _padded,
    "quiet": _padded,
    "bias extremes": _padded,
}


def _oppose(tokens: Array, mask: Array | None) -> Array:
    """Make all live tokens of a batch row equal and all dead ones their opposite.

    Live logits are then one number whatever its rounding, and dead ones its negative: only a wrong fill can show.
    """
    first = np.broadcast_to(tokens[:, :1], tokens.shape)
    return first.copy() if mask is None else np.where(mask[..., None], first, -first)


def _extreme(rng: np.random.Generator, bias: Array, precision: Precision) -> Array:
    """Put -1e9, near-lowest and -inf on some pairs, but never on position 0, which is live: no live row is without a key."""
    lowest = -6e4 if precision == "fp16" else -3e38
    penalty = rng.choice([-1e9 if precision != "fp16" else -2e4, lowest, -np.inf], size=bias.shape)
    hit = rng.random(bias.shape) < 0.3
    hit[..., 0, :] = hit[..., :, 0] = False
    return np.where(hit, penalty, bias)
