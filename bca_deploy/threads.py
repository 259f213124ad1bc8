"""Work on a thread of its own, and what is left of threads in the child of a fork.

The child has the parent's memory, and of the parent's threads only the one that forked.

A lock that another thread held is never given back there, work that is handed to a thread is never done, and a library that
waits for its own threads before it frees something waits for ever.
"""

import ctypes
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bca_deploy.errors import BcaError

T = TypeVar("T")

_locks: "weakref.WeakSet[ForkLock]" = weakref.WeakSet()
_kept: "weakref.WeakSet[Home]" = weakref.WeakSet()


def on_own_thread(make: Callable[[], T]) -> T:
    """Call ``make`` on a thread of its own, so that whatever it does to the floating-point mode ends with that thread."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(make())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="bca-open")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class ForkLock:
    """A lock that is free in the child of a fork, whoever held it in the parent."""

    def __init__(self) -> None:
        self.renew()
        _locks.add(self)

    def renew(self) -> None:
        """Begin again, held by nobody."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Home:
    """The process that something was opened in. In a child it is neither used nor freed: its threads are the parent's.

    Args:
        what: it is, for the error.
        owner: what was opened; it holds the home and everything that a child must not free.
    """

    def __init__(self, what: str, owner: object) -> None:
        self._what, self._owner, self._pid = what, weakref.ref(owner), os.getpid()
        _kept.add(self)

    @property
    def here(self) -> bool:
        """Whether this is the process."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Refuse to go on in a child.

        Raises:
            BcaError: with the way out.
        """
        if not self.here:
            raise BcaError(
                f"{self._what} was opened before a fork, in process {self._pid}, and its threads stayed there; "
                "open it after the fork, in each process that uses it"
            )

    def keep(self) -> None:
        """Give the owner a reference that nobody ever takes back."""
        if (owner := self._owner()) is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


class PrivateDirectory:
    """A temporary directory that goes with the process that made it; a child that ends leaves its parent's where it is.

    Args:
        prefix: of its name.
    """

    def __init__(self, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._remove = weakref.finalize(self, _remove, self.path, os.getpid())

    def close(self) -> None:
        """Remove it."""
        self._remove()


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)


def _in_child() -> None:
    for lock in list(_locks):
        lock.renew()
    for home in list(_kept):
        home.keep()


os.register_at_fork(after_in_child=_in_child)
