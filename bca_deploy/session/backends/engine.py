"""A bundle's engine as a backend: any number of threads share a few lanes, each of which runs one call at a time."""

from contextlib import contextmanager
from queue import LifoQueue
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from bca_deploy.bundle.manifest import EngineEntry, signature_of_engine
from bca_deploy.bundle.read import Bundle
from bca_deploy.engines import libraries, usable
from bca_deploy.engines.gpus import query
from bca_deploy.engines.profiles import shapes
from bca_deploy.errors import EngineError
from bca_deploy.session.backends.backend import Arrays, Name, Options
from bca_deploy.session.backends.cuda import Gpu, failing_as, open_gpu
from bca_deploy.session.backends.engine_lane import Lane
from bca_deploy.session.backends.loaded_engine import EngineOptions, LoadedEngine, load_engine
from bca_deploy.signature import Signature
from bca_deploy.spec import EngineLibrary
from bca_deploy.threads import ForkLock

if TYPE_CHECKING:
    from collections.abc import Iterator


Array = NDArray[Any]


class LanePool:
    """Lanes for any number of threads; a thread waits where all are at work. No lock is held while one works.

    Args:
        engine: what they run.
        gpu: where.
        lanes: how many at most; each has a scratch memory and buffers of its own.
        graphs: CUDA graphs that each keeps.
        poison: as for :class:`bca_deploy.session.backends.engine_lane.Lane`.
    """

    def __init__(self, engine: LoadedEngine, gpu: Gpu, lanes: int = 1, graphs: int = 0, poison: bool = False) -> None:
        self.engine, self.gpu, self._lanes, self._graphs, self._poison = engine, gpu, lanes, graphs, poison
        # The one used last comes first: its buffers are warm, and lanes that load does not ask for are never made.
        self._idle: LifoQueue[Lane | None] = LifoQueue()
        for lane in (*[None] * (lanes - 1), self._make()):  # one now, to know that the engine runs here
            self._idle.put(lane)

    def run(self, inputs: Arrays, outputs: Arrays | None = None) -> dict[str, Array]:
        """Run once; as for :meth:`bca_deploy.session.backends.engine_lane.Lane.run`."""
        with self._lane() as lane:
            return lane.run(inputs, outputs)

    @contextmanager
    def _lane(self) -> "Iterator[Lane]":
        lane = self._idle.get()
        try:
            if lane is None:
                lane = self._make()
            yield lane
        finally:
            self._idle.put(lane)

    def warm(self, inputs: Arrays) -> None:
        """Run once on every lane."""
        taken = [self._idle.get() for _ in range(self._lanes)]
        try:
            for index, lane in enumerate(taken):
                taken[index] = lane or self._make()
                taken[index].run(inputs)  # type: ignore[union-attr]
        finally:
            for lane in taken:
                self._idle.put(lane)
        self.engine.save()

    def _make(self) -> Lane:
        with failing_as("preparing the engine"):
            self.gpu.enter()
            lane = Lane(self.engine, self.gpu, self._graphs, self._poison)
            lane.prepare()
            return lane


class EngineBackend:
    """A bundle's engine; see :class:`bca_deploy.session.backends.backend.Backend`."""

    pads = True

    def __init__(self, entry: EngineEntry, signature: Signature, pool: LanePool) -> None:
        self.name: Name = entry.library
        self.precision = entry.precision
        self.signature, self.profiles = signature, entry.profiles
        self.what = f"{entry.file} on {entry.library} {entry.version}"
        self.gpu: Gpu | None = pool.gpu
        self._pool: LanePool | None = pool
        self._lock = ForkLock()

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs by name, in the manifest's order, which need not be the engine's."""
        found = self._open().run(inputs)
        return {tensor.name: found[tensor.name] for tensor in self.signature.outputs}

    def run_into(self, inputs: Arrays, outputs: Arrays) -> None:
        """Write the outputs into the caller's arrays, on the CPU or on the GPU."""
        self._open().run(inputs, outputs)

    def run_alone(self, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs: on a GPU there is no other way to run."""
        return self.run(inputs)

    def warm(self, inputs: Arrays) -> None:
        """Run once in every context."""
        self._open().warm(inputs)

    def trim(self, inputs: Arrays) -> None:
        """Keep everything: the lanes are few, and each has what the largest sizes need."""

    def close(self) -> None:
        """Write the runtime cache and let go of the engine; it is freed when the last call is done."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool:
            pool.engine.save()

    def _open(self) -> LanePool:
        pool = self._pool
        if pool is None:
            raise EngineError("the session is closed; open the bundle again")
        return pool


def open_engine(library: EngineLibrary, bundle: Bundle, options: Options) -> EngineBackend:
    """Return the bundle's engine, ready to run on this machine's GPU.

    Raises:
        EngineError: no engine, a stale one, no GPU, or an engine that does not open.
        MissingDependencyError: the library or cuda-core is not installed.
    """
    usable.of_library(bundle, library, options.precision)
    if not (gpus := query()).found:
        raise EngineError(f"no GPU: {gpus.why_none}")
    version, gpu = str(libraries.load(library).__version__), open_gpu()
    entry, path = usable.engine_for(bundle, library, version, gpu.capability, options.precision)
    digest = bundle.manifest.files[entry.file].sha256[:16]  # bundles may share a cache directory
    cache = options.cache / f"{path.stem}-{digest}.runtime-cache" if options.cache else None
    loaded = load_engine(path, library, EngineOptions(options.host_code, cache, options.cuda_graphs > 0))
    signature = signature_of_engine(bundle.manifest, entry)
    _check_engine(entry, signature, loaded, usable.rebuild_command(entry, bundle.source))
    return EngineBackend(entry, signature, LanePool(loaded, gpu, options.contexts, options.cuda_graphs))


def _check_engine(entry: EngineEntry, signature: Signature, engine: LoadedEngine, rebuild: str) -> None:
    """Refuse an engine that is not the one that the manifest describes: requests are checked against the manifest."""
    wanted = [shapes(profile, signature.inputs) for profile in entry.profiles]
    dtypes = {tensor.name: tensor.dtype for tensor in (*signature.inputs, *signature.outputs)}
    if wanted != engine.profiles or dtypes != {name: dtype.name for name, dtype in engine.dtypes.items()}:
        raise EngineError(f"{entry.file} is not the engine that the manifest describes; rebuild it: {rebuild}")
