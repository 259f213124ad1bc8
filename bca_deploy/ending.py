"""How a command ends early, and by which exit code: 130 by ctrl-C, 143 by SIGTERM, 141 when nobody reads what it prints.

As a shell has it: 128 and the signal's number. 1 says that parity failed, and nothing else does. This module is the first that
a command imports, and must be quick: until it is there, ctrl-C ends in Python's own traceback.
"""

import os
import signal
import sys

TYPE_CHECKING = False  # typing takes longer to import than all of the above
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TextIO

CLOSED_PIPE = 128 + signal.SIGPIPE
_WORDS = {signal.SIGINT: "interrupted; nothing was left behind", signal.SIGTERM: "terminated; nothing was left behind"}


class Ended(KeyboardInterrupt):
    """The process was asked to end; what is half done is cleaned up on the way out.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(_WORDS[signal.Signals(number)])
        self.exit_code = 128 + number


class _Handling:
    """A context manager that gives the numbers of the signals seen inside, one for each time it is used."""

    def __init__(self, react: "Callable[[int], None]") -> None:
        self._react = react
        self._seen: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> list[int]:
        for number in _WORDS:
            before = signal.getsignal(number)
            if before in (signal.SIG_IGN, None):  # who ignores a signal, as nohup and a shell's & do, means it
                continue
            try:
                signal.signal(number, self._handle)
            except ValueError:  # only the main thread may
                continue
            self._before[number] = before
        return self._seen

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, number: int, frame: object) -> None:
        self._seen.append(number)
        self._react(number)


def at_once() -> _Handling:
    """End without another word while there is nothing to clean up: an exception gets lost in the import of some libraries."""
    return _Handling(_exit)


def cleanly() -> _Handling:
    """Raise :class:`Ended`, and keep the signal's number: raised in a destructor or a library's callback, it is lost."""
    return _Handling(_raise)


def _exit(number: int) -> None:
    os.write(2, f"error: {_WORDS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


def _raise(number: int) -> None:
    raise Ended(number)


def code_for(out: "TextIO | None", code: int) -> int:
    """Return the exit code: ``code``, or that of a closed pipe where what was printed to ``out`` did not get through."""
    if out is None:  # begun without one
        return code
    closed = sys.stdout is not out  # typer puts a stand-in there when a pipe is closed, and says 1
    try:
        out.flush()
    except BrokenPipeError:
        closed = True
    if not closed:
        return code
    # What is left in the buffer must go somewhere, or the interpreter complains as it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    return CLOSED_PIPE
