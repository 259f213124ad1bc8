"""`bca bench`: a bundle's session beside what else could run the layer, one process for each, over a grid of shapes.

One process a contender and shape, in turn: thread pools of two runtimes in one process disturb each other.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bca_deploy.bundle.manifest import Manifest
from bca_deploy.bundle.read import Bundle
from bca_deploy.cli import contenders
from bca_deploy.cli.contenders import NAMES, Name, contender, write_literal
from bca_deploy.errors import BcaError, InputError, check_one_of
from bca_deploy.progress import Progress
from bca_deploy.session.backends.backend import Options
from bca_deploy.session.contract import numpy_dtype
from bca_deploy.signature import Signature, Tensor

Array = NDArray[Any]
#: A size for each of the bundle's dimensions, in order.
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Measurement:
    """One contender at one shape.

    Attributes:
        contender: which.
        shape: a size for each dimension, in order.
        runs: timed calls.
        p50_ms: median latency; ``p90_ms``, ``p99_ms`` the percentiles; ``min_ms`` the fastest.
        pairs_per_s: pairs of sequences per second, one call after another.
        peak_rss_mb: largest resident memory of its process, in 10**6 bytes.
    """

    contender: Name
    shape: Shape
    runs: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    pairs_per_s: float
    peak_rss_mb: float


@dataclass(frozen=True)
class Report:
    """A grid.

    Attributes:
        machine: processor architecture, and the threads that were allowed.
        backend: what the session ran on.
        measurements: every contender at every shape.
        left_out: contenders that could not run, and why.
    """

    machine: str
    backend: str
    measurements: tuple[Measurement, ...]
    left_out: dict[Name, str]

    def as_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=2)


def inputs(signature: Signature, shape: Shape) -> dict[str, Array]:
    """Return seeded inputs of a padded batch: every row keeps three quarters of its positions or more."""
    rng, sizes = np.random.default_rng(0), signature.dims.named(shape)

    def one(tensor: Tensor) -> Array:
        found = tensor.shape(sizes)
        if tensor.name in signature.masks.values():
            rows = rng.integers((3 * found[-1] + 3) // 4, found[-1] + 1, size=(*found[:-1], 1))
            return np.asarray(np.arange(found[-1]) < rows)
        if tensor.is_float:
            return rng.standard_normal(found).astype(np.float32)
        return np.full(found, tensor.fill or 0, numpy_dtype(tensor.dtype))

    return {tensor.name: one(tensor) for tensor in signature.inputs}


def bench(
    path: Path,
    shapes: Sequence[Shape],
    names: Sequence[str] = (),
    *,
    backend: str = "auto",
    threads: int | None = None,
    seconds: float = 3.0,
    progress: Progress,
) -> Report:
    """Measure every contender at every shape.

    Args:
        path: the bundle.
        shapes: a size for each dimension of the bundle, in order.
        names: contenders; empty takes all that can run here. The session is always one.
        backend: the session's.
        threads: that each may use on the CPU; None takes every core.
        seconds: time for each contender and shape; at least seven calls are timed.
        progress: told about each.

    Raises:
        InputError: an unknown contender, or a shape outside the bundle's dims.
        BcaError: a contender failed; with its last words.
    """
    Options(threads=threads)  # refuses what no session takes
    allowed = threads or len(os.sched_getaffinity(0))
    with Bundle.open(path) as bundle, tempfile.TemporaryDirectory(prefix="bca-bench-") as scratch:
        left_out = _left_out(names, bundle.manifest)
        running = [name for name in NAMES if name not in left_out and (name in names or not names or name == "session")]
        for shape in shapes:
            _check_shape(shape, bundle.manifest)
        if "literal" in running:
            write_literal(bundle, Path(scratch))
        found = []
        for index, (shape, name) in enumerate((s, n) for s in shapes for n in running):
            progress.steps(index, len(shapes) * len(running))
            found.append(_in_own_process(name, shape, bundle, Path(scratch), allowed, backend, seconds))
        chosen = _backend_of(path, backend)
    machine = f"{platform.machine()}, {allowed} threads"
    return Report(machine, chosen, tuple(found), {n: why for n, why in left_out.items() if why})


def _left_out(names: Sequence[str], manifest: Manifest) -> dict[Name, str]:
    """Return the contenders that do not run, with the reason; one that was asked for by name must be able to."""
    for name in names:
        check_one_of("contender", name, NAMES)
    why = {name: contenders.obstacle(name, manifest, lambda package: find_spec(package) is not None) for name in NAMES}
    for name in NAMES:
        if name in names and why[name]:
            raise InputError(f"contender {name} cannot run here: {why[name]}")
    return {name: reason for name, reason in why.items() if reason}


def _check_shape(shape: Shape, manifest: Manifest) -> None:
    for name, size in manifest.signature.dims.named(shape).items():
        allowed = manifest.signature.dims[name]
        if not allowed.min <= size <= allowed.max:
            raise InputError(f"shape {'x'.join(map(str, shape))}: {name} is {size}, allowed {allowed.min} to {allowed.max}")


def _backend_of(path: Path, backend: str) -> str:
    from bca_deploy.session.opening import open_session

    with open_session(path, backend, verify="off") as session:
        return session.explain().chosen


def _in_own_process(
    name: Name, shape: Shape, bundle: Bundle, scratch: Path, threads: int, backend: str, seconds: float
) -> Measurement:
    asked = [name, str(bundle.source), str(scratch), str(threads), backend, str(seconds), *map(str, shape)]
    command = [sys.executable, "-m", "bca_deploy.cli.bench", *asked]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603  (ourselves)
    if done.returncode != 0:
        last = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise BcaError(f"contender {name} failed at {'x'.join(map(str, shape))}: {last}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return Measurement(**result | {"shape": tuple(result["shape"])})


def measure(name: Name, bundle: Bundle, scratch: Path, threads: int, backend: str, seconds: float, shape: Shape) -> Measurement:
    """Time one contender in this process."""
    run = contender(name, bundle, scratch, threads, backend, inputs(bundle.manifest.signature, shape))
    for _ in range(3):
        run()
    times_ms, start = list[float](), time.perf_counter()
    while len(times_ms) < 7 or (time.perf_counter() - start < seconds and len(times_ms) < 2000):
        before = time.perf_counter()
        run()
        times_ms.append((time.perf_counter() - before) * 1e3)
    p50, p90, p99 = (float(p) for p in np.percentile(times_ms, (50, 90, 99)))
    signature = bundle.manifest.signature
    rate = signature.entries(signature.dims.named(shape)) * len(times_ms) / sum(times_ms) * 1e3
    return Measurement(name, shape, len(times_ms), min(times_ms), p50, p90, p99, rate, peak_rss_mb())


def peak_rss_mb() -> float:
    """Return this process's largest resident memory, in 10**6 bytes; getrusage's would count the parent's before exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


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


def _main(arguments: list[str]) -> None:
    name, path, scratch, threads, backend, seconds, *shape = arguments
    with Bundle.open(path, "off") as bundle:
        sizes = tuple(map(int, shape))
        found = measure(cast("Name", name), bundle, Path(scratch), int(threads), backend, float(seconds), sizes)
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
