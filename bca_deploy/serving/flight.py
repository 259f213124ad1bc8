"""What is under way on a server at once, in requests, bytes and messages that arrive: bounded, what is over is refused."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bca_deploy.errors import BcaError


class BusyError(BcaError):
    """There is no place for the request now; try again later."""


@dataclass
class Flight:
    """Requests of both protocols, and the bytes of them and of their answers.

    Attributes:
        most_requests: at once; more are refused.
        most_bytes: that requests may bring in while others are under way. The answers count, but no answer is refused.
    """

    most_requests: int
    most_bytes: int
    requests: int = field(default=0, init=False)
    bytes: int = field(default=0, init=False)
    #: Requests that have had a place so far.
    entered: int = field(default=0, init=False)
    #: Those whose body is on its way, the youngest last, and what ends them.
    arriving: "dict[Place, Callable[[], None]]" = field(default_factory=dict, init=False)

    def enter(self) -> "Place":
        """Take a place; its ``leave`` gives it back.

        Raises:
            BusyError: there is none.
        """
        if self.requests >= self.most_requests:
            raise BusyError(f"{self.requests} requests are under way, the most here; try again later, or on another replica")
        self.requests += 1
        self.entered += 1
        return Place(self)

    @contextmanager
    def place(self) -> Iterator["Place"]:
        """Hold a place; as ``enter``."""
        place = self.enter()
        try:
            yield place
        finally:
            place.leave()


class Place:
    """One request's share."""

    def __init__(self, flight: Flight) -> None:
        self._flight, self._bytes, self._left = flight, 0, False
        #: Refused while its body was on its way.
        self.refused = False

    @contextmanager
    def arriving(self, end: Callable[[], None]) -> Iterator[None]:
        """While a body comes: where bytes run short, the youngest such request gives its own back.

        Else all that have come at once would be refused, each for the others' halves.

        Args:
            end: ends the wait for the body.
        """
        self._flight.arriving[self] = end
        try:
            yield
        finally:
            self._flight.arriving.pop(self, None)

    def check(self, size: int) -> None:
        """Refuse what is to come, before it comes.

        Raises:
            BusyError: so many bytes more would be too many.
        """
        under_way, most = self._flight.bytes, self._flight.most_bytes
        if self.refused or under_way + size > most:
            raise BusyError(
                f"requests and answers of {under_way} bytes are under way, and this server holds {most}; "
                "try again later, or on another replica"
            )

    def take(self, size: int) -> None:
        """Count bytes of the request that have come; errors as for ``check``."""
        while self._flight.bytes + size > self._flight.most_bytes:
            youngest = next(reversed(self._flight.arriving), self)
            if youngest is self:
                break
            youngest.refuse()
        self.check(size)
        self.owe(size)

    def refuse(self) -> None:
        """Give the bytes back, and end the wait for more."""
        self.refused = True
        self._flight.bytes -= self._bytes
        self._bytes = 0
        self._flight.arriving.pop(self)()

    def owe(self, size: int) -> None:
        """Count bytes of the answer, which the work has been done for: they are over no limit, and keep others out."""
        if not self._left:
            self._flight.bytes += size
            self._bytes += size

    def leave(self) -> None:
        """Give the place back, once."""
        if not self._left:
            self._left = True
            self._flight.requests -= 1
            self._flight.bytes -= self._bytes


class Arrivals:
    """How many messages may be on their way at once: how large one is shows when it is here, and not before.

    One that takes long goes on for as long as no other waits.

    Args:
        most: messages.
        limit_s: for one to begin, and for it to arrive.
        patience_s: after which one on its way gives place to another.
    """

    def __init__(self, most: int, limit_s: float, patience_s: float) -> None:
        self._most, self._limit_s, self._patience_s = most, limit_s, patience_s
        self._now: dict[asyncio.Timeout, None] = {}
        self._freed = asyncio.Event()

    async def one(self, read: Callable[[], Awaitable[Any]]) -> Any:
        """Return what is read, one message or its like.

        Raises:
            TimeoutError: it did not come in time.
        """
        async with asyncio.timeout(self._limit_s):
            while len(self._now) >= self._most:
                await self._one_ends()
        async with asyncio.timeout(self._limit_s) as limit:
            self._now[limit] = None
            try:
                return await read()
            finally:
                self._now.pop(limit, None)
                self._freed.set()

    async def _one_ends(self) -> None:
        self._freed.clear()
        try:
            async with asyncio.timeout(self._patience_s):
                await self._freed.wait()
        except TimeoutError:
            for longest in list(self._now)[:1]:
                del self._now[longest]
                end_now(longest)


def end_now(limit: asyncio.Timeout) -> None:
    """End the wait that a limit is set to, unless it ends just now by itself."""
    if not limit.expired():
        limit.reschedule(0)
