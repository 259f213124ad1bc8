"""Counts and latencies of a session, cheap enough for every call."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from bca_deploy import optional
from bca_deploy.threads import ForkLock

#: Upper bounds of the latency histogram in milliseconds, a factor of about two apart; the last bucket is open.
BOUNDS_MS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)


@dataclass(frozen=True)
class Metrics:
    """A snapshot.

    Attributes:
        calls: finished calls; ``failures`` of them raised.
        failures: calls that raised.
        pairs: entries of the batches, over all calls: pairs of sequences.
        rows: rows of all their sequences, padding included.
        padded_rows: rows that ``run_many`` added.
        seconds: time spent in calls, summed over threads.
        histogram: calls by latency, one count for each of ``BOUNDS_MS`` and one for what is slower.
    """

    calls: int = 0
    failures: int = 0
    pairs: int = 0
    rows: int = 0
    padded_rows: int = 0
    seconds: float = 0.0
    histogram: tuple[int, ...] = field(default=(0,) * (len(BOUNDS_MS) + 1))


@dataclass(frozen=True, slots=True)
class Call:
    """One call on the backend, for an observer: enough for an OpenTelemetry span that is started and ended with its times.

    Attributes:
        start_ns: when it began, in nanoseconds since the epoch.
        end_ns: when it ended.
        backend: what it ran on.
        sizes: of each named dimension, padding included.
        failed: whether it raised.
    """

    start_ns: int
    end_ns: int
    backend: str
    sizes: Mapping[str, int]
    failed: bool


#: Told of every call; what it raises is logged.
Observer = Callable[[Call], None]


class Meter:
    """Collects; any number of threads may use it."""

    def __init__(self) -> None:
        self._lock = ForkLock()
        self._calls = self._failures = self._pairs = self._rows = self._padded = 0
        self._seconds = 0.0
        self._histogram = [0] * (len(BOUNDS_MS) + 1)

    def add(self, seconds: float, pairs: int, rows: int, failed: bool = False) -> None:
        """Count one call."""
        bucket = bisect_left(BOUNDS_MS, seconds * 1e3)
        with self._lock:
            self._calls += 1
            self._failures += failed
            self._pairs += pairs
            self._rows += rows
            self._seconds += seconds
            self._histogram[bucket] += 1

    def pad(self, rows: int) -> None:
        """Count rows that were added to make lengths equal."""
        with self._lock:
            self._padded += rows

    def snapshot(self) -> Metrics:
        """Return the counts so far."""
        with self._lock:
            counts = self._calls, self._failures, self._pairs, self._rows, self._padded
            return Metrics(*counts, self._seconds, tuple(self._histogram))


def prometheus_collector(session: Any, labels: dict[str, str] | None = None) -> Any:
    """Return a collector for prometheus_client's registry: ``registry.register(prometheus_collector(session))``.

    Raises:
        MissingDependencyError: prometheus_client is not installed.
    """
    core = optional.load("prometheus_client.core", "prometheus_client", "metrics")
    names, values = list(labels or {}), list((labels or {}).values())

    class Collector:
        def collect(self) -> Any:
            found = session.metrics()
            for name in ("calls", "failures", "pairs", "rows", "padded_rows"):
                counter = core.CounterMetricFamily(f"bca_session_{name}", f"{name} of a bca_deploy session", labels=names)
                counter.add_metric(values, getattr(found, name))
                yield counter
            buckets = cumulative([bound / 1e3 for bound in BOUNDS_MS], found.histogram)
            histogram = core.HistogramMetricFamily("bca_session_seconds", "seconds of a call", labels=names)
            histogram.add_metric(values, buckets, found.seconds)
            yield histogram

    return Collector()


def cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return the buckets as Prometheus has them: how many were at or below each bound."""
    return list(zip((*map(str, bounds), "+Inf"), accumulate(counts), strict=True))
