"""What parity found, as data: per case, pooled, and the verdict with its reasons."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from bca_deploy.cases import Sharpness
from bca_deploy.spec import Precision

Region = Literal["live", "dead"]
REGIONS: tuple[Region, ...] = get_args(Region)

#: Pooled over a family of cases the RMS error may be this many times what PyTorch eager makes.
POOLED_RATIO = 1.5

#: The family of the user's own inputs. One sample is no family to pool: only the per-case rule judges it.
OWN_INPUTS = "own inputs"


@dataclass(frozen=True)
class RegionError:
    """Errors over the live or the dead rows of one case, relative to the RMS of each output's truth except where said.

    Attributes:
        count: values compared.
        squares: sum of the squared relative errors.
        eager_squares: the same for PyTorch eager; NaN where eager is not finite.
        mean: mean relative error.
        p99: 99th percentile.
        max: largest absolute error, at the output that comes nearest to its bound.
        bound: what the rule allows there.
    """

    count: int
    squares: float
    eager_squares: float
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
    """All cases of one family and sharpness under one runtime; ratios are RMS error over eager's, None where empty.

    The dead ratio is that of the whole family, the same at every sharpness.
    """

    family: str
    sharpness: Sharpness
    runtime: str
    cases: int
    live_ratio: float | None
    dead_ratio: float | None
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
        """Return this verdict with the other's cases, groups and failures added."""
        return replace(
            self,
            results=self.results + other.results,
            groups=self.groups + other.groups,
            failures=self.failures + other.failures,
        )

    @property
    def worst_ratio(self) -> float:
        """The largest pooled ratio of any family of the matrix and either region."""
        pooled = [group for group in self.groups if group.family != OWN_INPUTS]
        ratios = [ratio for group in pooled for ratio in (group.live_ratio, group.dead_ratio) if ratio is not None]
        return max(ratios, default=0.0)

    @property
    def cases(self) -> int:
        """Distinct cases, however many runtimes ran each."""
        return len({result.case for result in self.results})


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
    return Group(
        first.family,
        first.sharpness,
        first.runtime,
        len(results),
        live_ratio=_pooled_ratio(r.regions.get("live") for r in results),
        dead_ratio=_pooled_ratio(r.regions.get("dead") for r in family),
        rms=float(np.sqrt(sum(e.squares for e in errors) / count)),
        mean=sum(e.mean * e.count for e in errors) / count,
        p99=max((e.p99 for e in errors), default=0.0),
        max=max((e.max for e in errors), default=0.0),
        cosine=min(r.cosine for r in results),
    )


def _pooled_ratio(errors: Iterable[RegionError | None]) -> float | None:
    """Return RMS error over eager's; every case weighs the same, whatever its size."""
    found = [e for e in errors if e is not None and np.isfinite(e.eager_squares)]
    if not found:
        return None
    ours = sum(e.squares / e.count for e in found)
    eager = sum(e.eager_squares / e.count for e in found)
    return float(np.sqrt(ours / eager)) if eager else (0.0 if ours == 0 else float("inf"))


def _pooled_problems(group: Group) -> Iterable[str]:
    for region, ratio in (("live", group.live_ratio), ("dead", group.dead_ratio)):
        if ratio is not None and ratio > POOLED_RATIO and group.family != OWN_INPUTS:
            yield (
                f"{group.family} {group.sharpness} under {group.runtime}, {region} rows: RMS error {ratio:.3g} times "
                f"PyTorch eager's, allowed {POOLED_RATIO}"
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
