"""What parity found, as data: per case, pooled, and the verdict with its reasons."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from bca_deploy.parity.cases import Sharpness
from bca_deploy.spec import Precision

Region = Literal["live", "dead"]
REGIONS: tuple[Region, ...] = get_args(Region)

#: Pooled over a family of cases the RMS error may be this many times the measure's, see parity/rule.py.
POOLED_RATIO = 1.5

# The logarithm of the ratio of two RMS over n independent errors spreads by 1/sqrt(n). A pool whose error is carried by fewer
# rows than this may exceed the ratio by twice what it spreads more than a pool of this size (docs/parity.md).
_FULL_POOL = 512

#: The family of the user's own inputs. One sample is no family to pool: only the per-case rule judges it.
OWN_INPUTS = "own inputs"


@dataclass(frozen=True)
class PeerError:
    """What an evaluation in PyTorch is off by in one region of one case.

    Attributes:
        squares: sum of the squared relative errors; NaN where an output is not finite.
        rows: how many rows carry them: the square of the sum over the sum of the squares, as many as there are where all rows
            are off alike, 1 where one row makes all of the error.
    """

    squares: float
    rows: float


@dataclass(frozen=True)
class RegionError:
    """Errors over the live or the dead rows of one case, relative to the RMS of each output's truth except where said.

    Attributes:
        count: values compared.
        squares: sum of the squared relative errors.
        eager: of PyTorch eager.
        in_order: of the reference with every product summed in order, once for each order; empty where it was not needed.
        mean: mean relative error.
        p99: 99th percentile.
        max: largest absolute error, at the output that comes nearest to its bound.
        bound: what the rule allows there.
    """

    count: int
    squares: float
    eager: PeerError
    in_order: tuple[PeerError, ...]
    mean: float
    p99: float
    max: float
    bound: float


@dataclass(frozen=True)
class CaseResult:
    """What one runtime made of one case."""

    case: str
    family: str
    sharpness: Sharpness
    runtime: str
    regions: dict[Region, RegionError]
    cosine: float
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """All cases of one family and sharpness under one runtime; ratios are RMS error over the measure's, None where empty.

    The dead ratio is that of the whole family, the same at every sharpness. The measure was the worst of PyTorch eager and of
    products summed in so many ``orders``; where that is 0, eager alone was enough.
    """

    family: str
    sharpness: Sharpness
    runtime: str
    cases: int
    live_ratio: float | None
    live_limit: float | None
    dead_ratio: float | None
    dead_limit: float | None
    orders: int
    rms: float
    mean: float
    p99: float
    max: float
    cosine: float


@dataclass(frozen=True)
class Verdict:
    """The outcome for one model; true where it passed.

    Attributes:
        model: which, by the name of its file.
        precision: of the model.
        scope: ``quick`` or ``full``, or ``inputs`` for the user's own.
        results: every case under every runtime.
        groups: the same pooled.
        failures: one sentence each; empty where it passed.
        weight_rounding: RMS change of the outputs, relative, from rounding the weights to the precision; no part of the rule.
        notes: what was left out, and why.
    """

    model: str
    precision: Precision
    scope: str
    results: tuple[CaseResult, ...]
    groups: tuple[Group, ...]
    failures: tuple[str, ...]
    weight_rounding: float
    notes: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        return not self.failures

    def joined(self, other: "Verdict") -> "Verdict":
        """Return this verdict with the other's cases, groups, failures and further notes added."""
        return replace(
            self,
            results=self.results + other.results,
            groups=self.groups + other.groups,
            failures=self.failures + other.failures,
            notes=tuple(dict.fromkeys(self.notes + other.notes)),
        )

    @property
    def worst(self) -> "Pool | None":
        """Of every family of the matrix and either region, the pool that comes nearest to its limit."""
        pools = (found for group in self.groups for found in pools_of(group))
        return max(pools, key=lambda found: found.ratio / found.limit, default=None)

    @property
    def worst_ratio(self) -> float:
        """The RMS ratio of that pool."""
        return self.worst.ratio if self.worst else 0.0

    @property
    def cases(self) -> int:
        """Distinct cases, however many runtimes ran each."""
        return len({result.case for result in self.results})


class Pool(NamedTuple):
    """The RMS error of a family's live or dead rows over the measure's, and what is allowed."""

    region: Region
    ratio: float
    limit: float


def pools_of(group: Group) -> list[Pool]:
    """Return what the pooled rule judges of a group: nothing of the user's own inputs."""
    found: tuple[tuple[Region, float | None, float | None], ...] = (
        ("live", group.live_ratio, group.live_limit),
        ("dead", group.dead_ratio, group.dead_limit),
    )
    judged = [Pool(region, r, limit) for region, r, limit in found if r is not None and limit is not None]
    return judged if group.family != OWN_INPUTS else []


#: So many times its limit beside eager *and* sums in order, a pool is wrong. At the most one number carries the error (a near
#: tie); that two evaluations draw it 30 times too small at once happens in (0.027)², one of 1,400 near ties, themselves one
#: pool in 100,000. Beside eager alone it would be one of 40.
DECIDED = 30.0


def pooled_limit(rows: float) -> float:
    """Return how many times the measure's RMS error a pool may have in which so many rows carry it."""
    spread = max(rows, 1.0) ** -0.5 - _FULL_POOL**-0.5
    return POOLED_RATIO * math.exp(2 * max(spread, 0.0))


def in_doubt(results: Iterable[CaseResult]) -> set[tuple[str, Sharpness]]:
    """Return the family and sharpness of what breaks the rule, and may not beside more evaluations.

    Empty where something failed to run, is NaN or of a wrong shape: no measure changes that.
    """
    found = tuple(results)
    if any(not result.regions for result in found):
        return set()
    pools = [(g.family, g.sharpness, p, g.orders) for g in pool(found) for p in pools_of(g)]
    broken = {(family, sharpness) for family, sharpness, p, _ in pools if p.ratio > p.limit}
    broken |= {(result.family, result.sharpness) for result in found if result.failures}
    # A measure of exactly 0 says that both evaluations were lucky, and nothing of the model.
    decided = {(f, s) for f, s, p, orders in pools if orders and DECIDED * p.limit < p.ratio < math.inf}
    return broken - decided


def pool(results: tuple[CaseResult, ...]) -> tuple[Group, ...]:
    """Pool the cases of each runtime, family and sharpness."""
    groups = []
    for key in dict.fromkeys((r.runtime, r.family, r.sharpness) for r in results):
        family = [r for r in results if (r.runtime, r.family) == key[:2]]
        groups.append(_group([r for r in family if r.sharpness == key[2]], family))
    return tuple(groups)


def problems(results: tuple[CaseResult, ...], groups: tuple[Group, ...]) -> tuple[str, ...]:
    """Return one sentence for each case and each pool that breaks the rule."""
    found = [f"{r.case} under {r.runtime}: {problem}" for r in results for problem in r.failures]
    return (*found, *(problem for group in groups for problem in _pooled_problems(group)))


def _group(results: list[CaseResult], family: list[CaseResult]) -> Group:
    """Pool ``results``, all of one sharpness; dead rows with those of the whole ``family``.

    Logits do not reach a dead row, and all dead rows of a batch row are one value, so that there are few of them to pool.
    """
    first = results[0]
    errors = [error for r in results for error in r.regions.values()]
    count = max(sum(e.count for e in errors), 1)
    live_ratio, live_limit = _pooled([r.regions["live"] for r in results if "live" in r.regions])
    dead_ratio, dead_limit = _pooled([r.regions["dead"] for r in family if "dead" in r.regions])
    return Group(
        first.family,
        first.sharpness,
        first.runtime,
        len(results),
        live_ratio,
        live_limit,
        dead_ratio,
        dead_limit,
        orders=max((len(e.in_order) for e in errors), default=0),
        rms=float(np.sqrt(sum(e.squares for e in errors) / count)),
        mean=sum(e.mean * e.count for e in errors) / count,
        p99=max((e.p99 for e in errors), default=0.0),
        max=max((e.max for e in errors), default=0.0),
        cosine=min(r.cosine for r in results),
    )


def _pooled(errors: list[RegionError]) -> tuple[float | None, float | None]:
    """Return the RMS error over the measure's, and what is allowed; every case weighs the same, whatever its size."""
    found = [e for e in errors if np.isfinite(e.eager.squares)]
    if not found:
        return None, None
    ours = sum(e.squares / e.count for e in found)
    evaluations = zip_longest(*((e.eager, *e.in_order) for e in found))
    measure, rows = max(_mean_squares(found, peers) for peers in evaluations)
    return math.sqrt(ours / measure) if measure else (0.0 if ours == 0 else math.inf), pooled_limit(rows)


def _mean_squares(errors: list[RegionError], peers: Sequence[PeerError | None]) -> tuple[float, float]:
    """Return the mean squares of an evaluation, summed over cases, and the rows that carry them.

    Zeros where a case lacks the evaluation, or it is not finite: that widens nothing.
    """
    found = [(peer.squares / error.count, peer.rows) for error, peer in zip(errors, peers, strict=True) if peer is not None]
    total = sum(squares for squares, _ in found)
    if len(found) < len(errors) or not total > 0 or not math.isfinite(total):
        return 0.0, 0.0
    return total, total**2 / sum(squares**2 / rows for squares, rows in found if rows > 0)


def _pooled_problems(group: Group) -> Iterable[str]:
    measure = f"the worst of PyTorch eager's and of {group.orders} orders of sums" if group.orders else "PyTorch eager's"
    for region, ratio, limit in pools_of(group):
        if ratio > limit:
            yield (
                f"{group.family} {group.sharpness} under {group.runtime}, {region} rows: RMS error {ratio:.3g} times "
                f"{measure}, allowed {limit:.3g}"
            )


def report(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as JSON data, figures to four significant digits."""
    return {
        "model": verdict.model,
        "precision": verdict.precision,
        "scope": verdict.scope,
        "passed": bool(verdict),
        "cases": verdict.cases,
        "worst_ratio": significant(verdict.worst_ratio),
        "weight_rounding_rms": significant(verdict.weight_rounding),
        "notes": list(verdict.notes),
        "failures": list(verdict.failures),
        "groups": [_round(asdict(group)) for group in verdict.groups],
        "results": [_round(asdict(result)) for result in verdict.results],
    }


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return significant(value)
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    return [_round(item) for item in value] if isinstance(value, list | tuple) else value


def significant(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")
