"""What `bca bench` found, as data: the JSON that charts and reports are made from. docs/benchmarks.md tells it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bca_deploy.benchmarking.contenders import Name
from bca_deploy.spec import Precision
from bca_deploy.timing.machine import Machine


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Ratio(_Model):
    """How many times as long as the session a contender took, each round beside the session's own."""

    median: float = Field(description="over the rounds")
    low: float = Field(description="a quarter of the rounds were lower")
    high: float = Field(description="a quarter of the rounds were higher")
    rounds: int = Field(description="that were compared")


class Measurement(_Model):
    """One contender in one cell of the grid."""

    contender: Name = Field(description="which")
    shape: tuple[int, ...] = Field(description="a size for each of the dims")
    precision: Precision = Field(description="of the model")
    threads: int = Field(description="that it was allowed on the CPU")
    runs: int = Field(description="timed calls")
    min_ms: float = Field(description="the fastest call")
    p50_ms: float = Field(description="median latency")
    p90_ms: float = Field(description="90th percentile")
    p99_ms: float = Field(description="99th percentile")
    pairs_per_s: float = Field(description="entries of the batch per second, one call after another")
    peak_rss_mb: float = Field(description="largest resident memory of its process, in 10**6 bytes")
    call_mb: float = Field(description="how much of that came with the calls; a compiler that works then is counted, too")
    ratio: Ratio = Field(description="to the session")
    interleaved: bool = Field(description="false where the machine could not hold all contenders at once, and each ran alone")


class Growth(_Model):
    """How one contender grows with the lengths, at one batch size, precision and number of threads."""

    contender: Name = Field(description="which")
    precision: Precision = Field(description="of the model")
    threads: int = Field(description="that it was allowed")
    batch: int = Field(description="entries of a call")
    lengths: tuple[float, ...] = Field(description="of each cell the geometric mean of the dimensions besides the batch")
    time_exponent: float = Field(description="k of the least-squares fit of median latency ~ length**k")
    memory_exponent: float | None = Field(description="the same of call_mb; null where fewer than two cells take 1 MB or more")


class Result(_Model):
    """A grid of measurements."""

    format: Literal[1] = 1
    model: str = Field(description="layer, or the class of the whole model")
    dims: tuple[str, ...] = Field(description="the names of the dimensions, in the order of every shape")
    machine: Machine = Field(description="what it ran on")
    backend: str = Field(description="what the session ran on")
    measurements: tuple[Measurement, ...] = Field(description="every contender in every cell")
    growth: tuple[Growth, ...] = Field(description="of every contender that ran at two lengths or more")
    left_out: dict[str, str] = Field(description="contenders that could not run, and why")
