"""What must hold in the child of a fork, which has the parent's memory and of its threads only the one that forked."""

import os
import threading


class ForkLock:
    """A lock of a module's, free in the child of a fork whoever held it in the parent.

    One that a thread held which the child does not have would never be given back.
    """

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
