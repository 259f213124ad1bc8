"""`bca bench`: a bundle's session beside what else could run the model, one process for each, over a grid.

In each cell of the grid all contenders are ready at once and take short turns, round by round, so that whatever disturbs the
machine disturbs all of them; a ratio compares two turns of one round.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np

from bca_deploy.benchmarking import contenders
from bca_deploy.benchmarking.contenders import NAMES, Name
from bca_deploy.benchmarking.grid import Asked, Cell, Grid, make_grid
from bca_deploy.benchmarking.growth import growth_of
from bca_deploy.benchmarking.process import Process
from bca_deploy.benchmarking.result import Measurement, Ratio, Result
from bca_deploy.benchmarking.setting import Place, Setting, feeds_of
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import BcaError, InputError, check_one_of, first_line
from bca_deploy.progress import Progress
from bca_deploy.session.backends.backend import Options
from bca_deploy.spec import Precision
from bca_deploy.timing.machine import machine
from bca_deploy.timing.memory import available_mb
from bca_deploy.timing.turns import ratios


@dataclass(frozen=True)
class _Suite:
    """One run: what is measured, on what, and who runs.

    Attributes:
        bundle: open.
        folder: for graphs and inputs.
        grid: what is measured.
        names: the contenders that were asked for by name; a failure of theirs ends the run.
        backend: the session's.
        place: of a whole model's code.
        progress: told about cells and turns.
        left_out: who does not run, and why.
    """

    bundle: Bundle
    folder: Path
    grid: Grid
    names: Sequence[str]
    backend: str
    place: Place | None
    progress: Progress
    left_out: dict[str, str] = field(default_factory=dict)

    def run(self) -> Iterator[Measurement]:
        """Measure cell by cell."""
        for precision in self.grid.precisions:
            running = [name for name in self._entrants(precision) if self._made_ready(name, precision)]
            for cell in self.grid.cells:
                if cell.precision == precision:
                    self.progress.stage(str(cell))
                    yield from self._cell(cell, running)

    def _entrants(self, precision: Precision) -> list[Name]:
        """Return who runs in a precision; one that was asked for by name must be able to."""
        found = list[Name]()
        for name in NAMES:
            why = contenders.obstacle(name, self.bundle.manifest, _installed, precision, self.place is not None)
            if why and name in self.names:
                raise InputError(f"contender {name} cannot run here: {why}")
            if name not in (self.names or self.grid.among) and name != "session":
                continue
            if why:
                self.left_out[name] = why
            else:
                found.append(name)
        return found

    def _setting(self, precision: Precision, threads: int) -> Setting:
        return Setting(self.bundle, self.folder, precision, threads, self.backend, self.place)

    def _made_ready(self, name: Name, precision: Precision) -> bool:
        try:
            contenders.prepare(name, self._setting(precision, 1))
        except Exception as error:  # PyTorch's exporter raises what it likes
            self._drop(name, f"it could not be made: {first_line(error)}", error)
            return False
        return True

    def _drop(self, name: Name, why: str, error: Exception) -> None:
        """Go on without a contender, unless it was asked for."""
        if name in self.names or name == "session":
            raise error if isinstance(error, BcaError) else BcaError(f"contender {name}: {why}") from error
        self.left_out[name] = why

    def _cell(self, cell: Cell, running: list[Name]) -> list[Measurement]:
        feeds = self.folder / "feeds.npz"
        np.savez(feeds, **feeds_of(self.bundle, self.bundle.manifest.signature.dims.named(cell.shape)))  # type: ignore[arg-type]
        setting = self._setting(cell.precision, cell.threads)
        together = self._together(setting, feeds, running)
        done = together if together is not None else self._apart(setting, feeds, running)
        session = next(process for process in done if process.name == "session")
        return [self._measurement(cell, process, session, together is not None) for process in done]

    def _together(self, setting: Setting, feeds: Path, running: list[Name]) -> list[Process] | None:
        """Let all take turns; None where the machine cannot hold them all."""
        with ExitStack() as stack:
            ready = list[Process]()
            for name in running:
                if ready and available_mb() < max(process.peak_rss_mb for process in ready):
                    return None
                self._enter(stack, Process(name, setting, feeds), ready)
            for number in range(self.grid.rounds):
                self.progress.steps(number, self.grid.rounds)
                for process in ready[:: -1 if number % 2 else 1]:
                    process.turn(self.grid.turn_ms)
            return ready

    def _apart(self, setting: Setting, feeds: Path, running: list[Name]) -> list[Process]:
        """Let each run alone, all of its turns."""
        done = list[Process]()
        for number, name in enumerate(running):
            self.progress.steps(number, len(running))
            with ExitStack() as stack:
                self._enter(stack, Process(name, setting, feeds), done)
                for _ in range(self.grid.rounds if done and done[-1].name == name else 0):
                    done[-1].turn(self.grid.turn_ms)
        return done

    def _enter(self, stack: ExitStack, process: Process, ready: list[Process]) -> None:
        try:
            ready.append(stack.enter_context(process))
        except BcaError as error:
            self._drop(process.name, str(error), error)

    def _measurement(self, cell: Cell, process: Process, session: Process, interleaved: bool) -> Measurement:
        times = [ms for turn in process.turns_ms for ms in turn]
        p50, p90, p99 = (float(p) for p in np.percentile(times, (50, 90, 99)))
        signature = self.bundle.manifest.signature
        return Measurement(
            contender=process.name,
            shape=cell.shape,
            precision=cell.precision,
            threads=cell.threads,
            runs=len(times),
            min_ms=min(times),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            pairs_per_s=signature.entries(signature.dims.named(cell.shape)) * len(times) / sum(times) * 1e3,
            peak_rss_mb=process.peak_rss_mb,
            call_mb=process.call_mb,
            ratio=_ratio(process, session),
            interleaved=interleaved,
        )


def _ratio(process: Process, session: Process) -> Ratio:
    found = ratios([median(turn) for turn in process.turns_ms], [median(turn) for turn in session.turns_ms])
    low, middle, high = (float(value) for value in np.percentile(found, (25, 50, 75)))
    return Ratio(median=middle, low=low, high=high, rounds=len(found))


def _installed(package: str) -> bool:
    return find_spec(package) is not None


def bench(
    path: Path,
    asked: Asked,
    names: Sequence[str] = (),
    *,
    backend: str = "auto",
    place: Place | None = None,
    progress: Progress,
) -> Result:
    """Measure every contender in every cell of a grid.

    Args:
        path: the bundle.
        asked: which shapes, precisions and threads, and for how long.
        names: contenders; empty takes all that can run here. The session is always one.
        backend: the session's.
        place: of a whole model's code, for the contenders that need it. Runs that code.
        progress: told about cells and turns.

    Raises:
        InputError: an unknown contender, one that cannot run, a grid that the bundle does not take, or other code than the
            bundle's.
        BcaError: the session, or a contender that was asked for by name, failed; with its last words.
    """
    before = machine()
    for name in names:
        check_one_of("contender", name, NAMES)
    with Bundle.open(path) as bundle, tempfile.TemporaryDirectory(prefix="bca-bench-") as folder:
        grid = make_grid(bundle.manifest, asked)
        chosen, precision = _chosen(bundle, backend, asked, grid)
        if not asked.precisions:
            grid = replace(grid, precisions=(precision,))
        suite = _Suite(bundle, Path(folder), grid, names, backend, place, progress)
        if place is not None:
            _check_code(bundle, place)
        found = tuple(suite.run())
        return Result(
            model=bundle.manifest.source,
            dims=tuple(bundle.manifest.signature.dims),
            machine=before,
            backend=chosen,
            measurements=found,
            growth=growth_of(found, bundle.manifest.signature),
            left_out=suite.left_out,
        )


def _chosen(bundle: Bundle, backend: str, asked: Asked, grid: Grid) -> tuple[str, Precision]:
    """Return what a session runs on, and in which precision where none was asked for; errors as for opening it."""
    from bca_deploy.session.backends.choice import choose

    chosen, explanation = choose(bundle, backend, Options(precision=grid.precisions[0] if asked.precisions else None))
    chosen.close()
    return explanation.chosen, chosen.precision


def _check_code(bundle: Bundle, place: Place) -> None:
    from bca_deploy.benchmarking import torch_forms

    torch_forms.check_model(bundle, place)
