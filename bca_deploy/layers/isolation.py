"""Working with torch inside somebody's process: what their code set does not change the export, and stays as it was.

Of the state that torch keeps for each thread, the export has its own. What belongs to the whole process (the default dtype,
the random numbers, the environment, standard output) is neither changed nor relied on. What cannot be had otherwise (the
libraries' loggers, the filters of their warnings) is changed under a lock, and put back.
"""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from typing import cast

import torch

from bca_deploy.threads import ForkLock, on_own_thread

# The exporter keeps state for the whole process.
_exporting = ForkLock()
_setting_threads = ForkLock()

_LIBRARIES = ("torch", "onnx", "onnx_ir", "onnxscript")
# Warnings that are theirs, or that they cause in our name; copyreg's is about torch.export's way to copy fake tensors.
_OURS = r"bca_deploy\.(layers\.(checkpoint|stored\.weight_files)|tracing\.graph)"
_WARNERS = re.compile(rf"(({'|'.join(_LIBRARIES)})\b.*|{_OURS}|copyreg)\Z")


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Give the calling thread torch's own settings: gradients, no autocast, no inference mode, tensors on the CPU."""
    device = torch.get_default_device()
    # Entered only where needed: the exporter would see it.
    on_cpu = torch.device("cpu") if device.type != "cpu" else contextlib.nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), on_cpu:
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch work on the calling thread alone, and every other thread on as many as it did."""
    before = torch.get_num_threads()
    _set_own_threads(1)
    try:
        yield
    finally:
        _set_own_threads(before)


def _set_own_threads(count: int) -> None:
    """Set how many threads the calling one takes: torch's setting is also what threads begin with that start later."""
    with _setting_threads:
        others = on_own_thread(torch.get_num_threads)
        torch.set_num_threads(count)
        on_own_thread(lambda: torch.set_num_threads(others))


@contextlib.contextmanager
def exporter_alone() -> Iterator[None]:
    """Let one thread at a time use the exporter, without its chatter unless bca's own log level is DEBUG (``-v``).

    An error carries the exporter's message anyway.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_exporting)
        stack.enter_context(_leaving_nothing())
        if not logging.getLogger("bca_deploy").isEnabledFor(logging.DEBUG):
            stack.enter_context(_quiet_loggers())
            stack.enter_context(no_library_warnings())
        yield


@contextlib.contextmanager
def _leaving_nothing() -> Iterator[None]:
    """Take out what the libraries add to the environment and to the filters of warnings when they are first used.

    That is torch's cache directory, which it sets again when it needs it, and sympy's way to show its own warnings.
    """
    names, filters = set(os.environ), list(warnings.filters)
    try:
        yield
    finally:
        for name in set(os.environ) - names:
            if name.startswith("TORCH"):
                del os.environ[name]
        for entry in [entry for entry in warnings.filters if entry not in filters and _is_of_sympy(entry[2])]:
            cast("list[object]", warnings.filters).remove(entry)


def _is_of_sympy(category: type[Warning] | tuple[type[Warning], ...]) -> bool:
    return isinstance(category, type) and category.__module__.startswith("sympy.")


@contextlib.contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Raise the level of the libraries' loggers; those that have none of their own, or are made meanwhile, inherit it."""
    known = [logger for logger in list(logging.root.manager.loggerDict.values()) if isinstance(logger, logging.Logger)]
    tops = [logging.getLogger(name) for name in _LIBRARIES]
    own = [logger for logger in known if logger.level and logger.name.partition(".")[0] in _LIBRARIES]
    before = {logger: logger.level for logger in (*tops, *own)}
    try:
        for logger in before:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


@contextlib.contextmanager
def no_library_warnings() -> Iterator[None]:
    """Put one filter before the caller's, and take out that one alone: catch_warnings would put back an old list.

    What the caller's own code warns of meanwhile, on any thread, goes where it always does.
    """
    entry = ("ignore", None, Warning, _WARNERS, 0)
    filters = cast("list[object]", warnings.filters)
    filters.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # another thread's catch_warnings has put back its own list
            cast("list[object]", warnings.filters).remove(entry)


with _leaving_nothing():
    import onnx_ir  # noqa: F401  (imports sympy: here, before anything else of ours does)
