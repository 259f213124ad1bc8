"""Compile one ONNX file into one engine, in a process of its own, and turn whatever happens there into a result or an error.

Requires: options and targets checked by libraries.py, profiles by profiles.py. Ensures: a whole engine at the place asked for,
or nothing there and an :class:`EngineError` with the last lines of the builder's log.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bca_deploy.engines import build_log
from bca_deploy.engines.build_log import BuildLog
from bca_deploy.engines.builder_process import Facts, Request
from bca_deploy.errors import EngineError

#: How long a builder that was asked to stop may take before it is killed.
GRACE_S = 5.0


@dataclass(frozen=True)
class Built:
    """A finished engine: what the builder counted, its log, and how long it took."""

    facts: Facts
    log: BuildLog
    seconds: float


def compile_engine(request: Request, time_limit_s: float, report: Callable[[float], None]) -> Built:
    """Run the builder process.

    Args:
        request: what to build; ``log`` and ``events`` are filled in here.
        time_limit_s: after this many seconds the builder is stopped.
        report: called with the finished share, 0 to 1.

    Returns:
        What was built; the engine is at ``request.out``.

    Raises:
        EngineError: the builder refused, crashed, was killed or took too long; nothing is at ``request.out``.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bca-build-") as scratch:
        path = Path(scratch) / "log"
        with _process(replace(request, log=str(path)), Path(scratch) / "printed") as (process, events):
            ended = _follow(process, events, started + time_limit_s, report)
        log = build_log.read(path)
        if "facts" not in ended:
            printed = (Path(scratch) / "printed").read_text(errors="replace")
            raise EngineError(_why(ended, process.returncode, time_limit_s, log, printed))
        report(1.0)
        return Built(Facts(**ended["facts"]), log, round(time.perf_counter() - started, 3))


@contextmanager
def _process(request: Request, printed: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start the builder; on the way out, whatever the reason, it is gone."""
    reader, writer = os.pipe()
    with printed.open("wb") as sink:
        process = subprocess.Popen(
            # -P: nothing is imported from where the user happens to be.
            [sys.executable, "-P", "-m", "bca_deploy.engines.builder_process"],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            pass_fds=[writer],
            # Unbuffered, or what it printed would come after what it died of.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"},
        )
    os.close(writer)
    try:
        assert process.stdin is not None  # noqa: S101  (asked for above)
        with suppress(BrokenPipeError):  # it is gone already, and how it ended says more
            process.stdin.write(json.dumps(asdict(replace(request, events=writer))).encode())
            process.stdin.close()
        yield process, reader
    finally:
        _stop(process)
        os.close(reader)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the builder to stop between two steps; kill it where it does not listen."""
    if process.poll() is None:
        process.terminate()
        _reap(process)
    process.wait()


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end a little; a second ctrl-C, too, leaves no process behind."""
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
    except BaseException:
        process.kill()
        raise


def _follow(process: subprocess.Popen[bytes], events: int, deadline: float, report: Callable[[float], None]) -> dict[str, Any]:
    """Pass progress on until the builder closes its end; return how it ended: ``facts``, ``refused``, ``late`` or none."""
    rest = b""
    ended: dict[str, Any] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(events, selectors.EVENT_READ)
        while selector.select(max(deadline - time.perf_counter(), 0)):
            chunk = os.read(events, 65536)
            if not chunk:
                _reap(process)  # a library may hang while it unloads
                return ended
            *lines, rest = (rest + chunk).split(b"\n")
            for event in map(json.loads, lines):
                if "progress" in event:
                    report(event["progress"])
                else:
                    ended = event
    return {"late": True}


def _why(ended: dict[str, Any], code: int, time_limit_s: float, log: BuildLog, printed: str) -> str:
    """Return the message for a build that made nothing."""
    at, tail = log.last_place(), f"; the last lines of its log:\n{log.last_lines()}"
    if "refused" in ended:
        return ": ".join([f"the engine was not built: {ended['refused']}", *filter(None, ["; ".join(log.errors[:3])])])
    if "late" in ended:
        return f"the build took longer than {time_limit_s:g} s, at {at}; raise engine.time_limit_s in the recipe{tail}"
    if code == -signal.SIGKILL:
        return f"the builder was killed at {at}; usually memory ran out: give the machine more, or narrow the profile{tail}"
    if code < 0:
        return f"the builder crashed ({signal.Signals(-code).name}) at {at}; please report this{tail}"
    said = printed.strip().splitlines()[-1:] or ["nothing"]
    return f"the builder failed (exit code {code}): {said[0]}{tail}"
