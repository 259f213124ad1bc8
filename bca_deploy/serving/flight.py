"""What is under way on a server at once, in requests and in bytes: bounded, and what comes on top is refused."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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
