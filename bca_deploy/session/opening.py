"""`bca_deploy.open`: from a bundle's path to a session, on the backend that was asked for or the fastest that works here."""

import logging
from pathlib import Path

from bca_deploy.bundle.read import Bundle, Check
from bca_deploy.session.backends.backend import Options
from bca_deploy.session.backends.choice import choose
from bca_deploy.session.metrics import Observer
from bca_deploy.session.session import Session
from bca_deploy.spec import Precision

_log = logging.getLogger("bca_deploy.session.opening")


def open_session(  # noqa: PLR0913  (one parameter per option)
    path: str | Path,
    backend: str = "auto",
    *,
    precision: Precision | None = None,
    threads: int | None = None,
    spinning: bool = True,
    contexts: int = 2,
    cuda_graphs: int = 0,
    cache: str | Path | None = None,
    host_code: bool = False,
    verify: Check = "full",
    on_call: Observer | None = None,
) -> Session:
    """Open a bundle to run it. Needs neither torch nor onnx.

    Args:
        path: the bundle's directory or archive.
        backend: ``auto`` takes the fastest that works here; a name takes that one or fails.
        precision: of the model; None takes the first engine that runs here, or the model that the backend runs fastest.
        threads: for onnxruntime on CPU; None takes every core.
        spinning: onnxruntime on CPU: idle threads wait for the next call by spinning, which makes calls one after another
            faster, and takes the cores from whatever else runs on them; a server does without.
        contexts: engines: how many calls may be on the GPU at once, each with memory of its own; more calls wait.
        cuda_graphs: engines: for how many shapes each context keeps a CUDA graph, for arrays on the CPU; 0 keeps none.
        cache: directory for what a backend compiles on this machine, so that the next process need not; None forgets it.
        host_code: engines: let a version-compatible one bring code that runs on the CPU; for engines that you trust only.
        verify: how much of the bundle is checked first: every hash, only sizes, or nothing.
        on_call: called after each call with what it was, on its thread; see :class:`bca_deploy.session.metrics.Call`.

    Returns:
        The session; a context manager.

    Raises:
        BundleError: damaged, unsafe or of a newer format.
        InputError: the backend is not known, the precision not in the bundle, or a number out of range.
        EngineError: the backend asked for does not work here.
        MissingDependencyError: onnxruntime is not installed.
    """
    options = Options(precision, threads, spinning, contexts, cuda_graphs, Path(cache) if cache else None, host_code)
    bundle = Bundle.open(path, verify)
    try:
        chosen, explanation = choose(bundle, backend, options)
    except BaseException:
        bundle.close()
        raise
    _log.info("%s: %s", path, explanation, extra={"bundle": str(path), "backend": chosen.name, "precision": chosen.precision})
    return Session(bundle, chosen, explanation, threads, on_call)
