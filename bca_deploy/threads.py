"""Calls on a thread of their own."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


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
