"""Telling what is going on, and timing it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told what is going on; the command line draws it."""

    def stage(self, name: str) -> None:
        """Say which stage begins."""

    def steps(self, done: int, total: int) -> None:
        """Say how many steps of the running stage are done: parity cases, or hundredths of a build."""


class Silent:
    """A progress that says nothing."""

    def stage(self, name: str) -> None:
        """Ignore it."""

    def steps(self, done: int, total: int) -> None:
        """Ignore it."""


class Clock:
    """Times the stages for build.json and passes them on."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and time it."""
        self.progress.stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
