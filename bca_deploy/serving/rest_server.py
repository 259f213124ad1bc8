"""The REST side's sockets: uvicorn, with a time limit on everything that a client may leave undone, and connections bounded."""

import asyncio
import contextlib
import math
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bca_deploy.errors import InputError
from bca_deploy.serving.guards import OTHER, Guard

#: Seconds from the connection, or from the first byte of a later request, to the end of the headers.
HEADERS_S = 10.0
#: Seconds more than the deadline that a connection has for a body: within it the endpoint refuses a late one with a status.
_AFTER_S = 1.0
#: Files that are left to everything but REST's connections.
_OTHER_FILES = 256


def most_connections() -> int:
    """Return how many connections each of REST and gRPC may have; lets the process have as many files as it may at all."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    files = 2**20 if most == resource.RLIM_INFINITY else most
    return max((files - _OTHER_FILES) // 2, 64)


@dataclass
class Connections:
    """What the connections of one server share.

    Attributes:
        guard: counts and logs requests that never come as far as the application.
        most: connections; where there are more, the one that has waited longest without a request is closed.
        most_per_peer: connections from one address; more are closed. None sets no limit.
        body_s: seconds from the headers to the end of the body, and for the client to take what is written.
    """

    guard: Guard
    most: int
    most_per_peer: int | None
    body_s: float
    of_peer: Counter[str] = field(default_factory=Counter)
    #: Those that no request is under way on, the longest wait first.
    waiting: dict["Protocol", None] = field(default_factory=dict)
    open: int = 0

    def close_longest_wait(self) -> None:
        """Make room for whoever has something to say."""
        longest = next(iter(self.waiting), None)
        if longest is not None:
            del self.waiting[longest]
            longest.transport.abort()


class Protocol(H11Protocol):
    """uvicorn's connection with timers. Silent clients are closed, and slow ones answered 408 where they can still hear it."""

    shared: Connections
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _peer = "-"

    def connection_made(self, transport: Any) -> None:
        """Take a connection, or close it."""
        super().connection_made(transport)
        if self.client:
            self._peer = str(self.client[0])
        self.shared.open += 1
        self.shared.of_peer[self._peer] += 1
        most = self.shared.most_per_peer
        if most is not None and self.shared.of_peer[self._peer] > most:
            transport.abort()
            return
        self._wait()
        if self.shared.open > self.shared.most:
            self.shared.close_longest_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._work()
        self._unset_unread()
        self.shared.open -= 1
        self.shared.of_peer[self._peer] -= 1
        if not self.shared.of_peer[self._peer]:
            del self.shared.of_peer[self._peer]
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; the first of a later request start its time."""
        if self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._wait()
        super().data_received(data)

    def handle_events(self) -> None:
        """Go on with what has come, and see how far the request is."""
        had = self.cycle
        super().handle_events()
        match self.conn.their_state:
            case h11.SEND_BODY if self.cycle is not had:
                self._work()
                self._timer = self.loop.call_later(self.shared.body_s + _AFTER_S, self._late)
            case h11.DONE | h11.MUST_CLOSE:
                self._work()
            case h11.IDLE if self.cycle is not None and self not in self.shared.waiting:  # the request is behind it
                self._wait()

    def pause_writing(self) -> None:
        """The client does not take its answer as fast as it is written: give it a while."""
        super().pause_writing()
        self._unset_unread()
        self._unread = self.loop.call_later(self.shared.body_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken most of it."""
        super().resume_writing()
        self._unset_unread()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; an answer that has begun cannot be followed by another."""
        self._refuse(h11.Response(status_code=400, headers=_HEADERS, reason=b"Bad Request"), msg)

    def _wait(self) -> None:
        """Wait for the headers of a request."""
        self._stop_timer()
        self.shared.waiting[self] = None
        self._timer = self.loop.call_later(HEADERS_S, self._late)

    def _work(self) -> None:
        """There is a request."""
        self._stop_timer()
        self.shared.waiting.pop(self, None)

    def _late(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(h11.Response(status_code=408, headers=_HEADERS, reason=b"Request Timeout"), "the headers are late")
        else:  # it has said nothing, or has its answer and goes on
            self.transport.abort()

    def _refuse(self, response: h11.Response, text: str) -> None:
        """Answer outside the application, and close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or (self.cycle and not self.cycle.response_complete):
            self.transport.abort()
            return
        for event in (response, h11.Data(data=text.encode()), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()
        self.shared.guard.log(self._peer, OTHER, "-", str(response.status_code), time.perf_counter())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _unset_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


_HEADERS = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # a signal stops gRPC as well, so it is handled in one place


def rest_server(app: Any, connections: Connections, grace_s: float, tls: tuple[Path, Path] | None) -> uvicorn.Server:
    """Return the server of an application, to be given a socket that listens."""
    config = uvicorn.Config(
        app,
        http=type("Protocol", (Protocol,), {"shared": connections}),  # h11; the other one takes headers without end
        log_config=None,
        access_log=False,  # serving/guards.py writes one for both protocols
        proxy_headers=False,  # else a client on this machine would choose what the log calls it
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=math.ceil(grace_s),
        ssl_certfile=tls[0] if tls else None,
        ssl_keyfile=tls[1] if tls else None,
    )
    return _Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        InputError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only where the protocol is named; with it every answer would take 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(512)
    except (OSError, ValueError) as error:  # of which a name that can be none is one
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host} port {port} cannot be listened on: {reason}; choose another port or address") from error
    return listening
