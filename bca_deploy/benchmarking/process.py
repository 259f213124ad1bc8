"""A contender's process, seen from outside: started, told to take its turn, ended."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from bca_deploy.benchmarking.contenders import Name
from bca_deploy.benchmarking.setting import Setting
from bca_deploy.errors import BcaError


@dataclass
class Process:
    """One contender, ready to take turns; a context manager.

    Attributes:
        name: of the contender.
        turns_ms: the times of the calls of each turn.
        peak_rss_mb: largest resident memory so far.
        call_mb: how much of it came with the calls.

    Raises:
        BcaError: it failed; with its last words.
    """

    name: Name
    setting: Setting
    feeds: Path
    turns_ms: list[list[float]] = field(default_factory=list)
    peak_rss_mb: float = 0.0
    call_mb: float = 0.0

    def __post_init__(self) -> None:
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed in __exit__)
        command = [sys.executable, "-m", "bca_deploy.benchmarking.worker", json.dumps(self._asked())]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.setting.threads)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        self._running = subprocess.Popen(command, **pipes, text=True, env=environment)  # noqa: S603  (ourselves)

    def _asked(self) -> dict[str, Any]:
        setting, place = self.setting, self.setting.place
        where = {"bundle": str(setting.bundle.source), "folder": str(setting.folder), "feeds": str(self.feeds)}
        how = {"precision": setting.precision, "threads": setting.threads, "backend": setting.backend}
        code = asdict(place) | {"checkpoint": place.checkpoint and str(place.checkpoint)} if place else None
        return {"name": self.name, **where, **how, "place": code}

    def __enter__(self) -> Self:
        """Wait until it is ready."""
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it, whatever it does."""
        self._running.kill()
        self._running.communicate()
        self._said.close()

    def turn(self, at_least_ms: float) -> None:
        """Let it call for so long, at least once."""
        assert self._running.stdin is not None  # noqa: S101  (a pipe)
        try:
            self._running.stdin.write(f"{at_least_ms}\n")
            self._running.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the answer says so
        self.turns_ms.append(self._answer())

    def _answer(self) -> list[float]:
        """Return the times of its calls, and note its memory."""
        assert self._running.stdout is not None  # noqa: S101  (a pipe)
        line = self._running.stdout.readline()
        if not line:
            raise BcaError(f"contender {self.name} failed: {self._last_words()}")
        told = json.loads(line)
        self.peak_rss_mb, self.call_mb = told["peak_rss_mb"], told["call_mb"]
        times: list[float] = told["times_ms"]
        return times

    def _last_words(self) -> str:
        code = self._running.wait()
        self._said.seek(0)
        return next(reversed(self._said.read().strip().splitlines()), f"exit code {code}")
