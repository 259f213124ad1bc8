"""`bca serve`: KServe's parts put together over one session, bound by hand, and stopped without dropping a request."""

import asyncio
import contextlib
import ctypes
import logging
import math
import os
import re
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bca_deploy.errors import InputError
from bca_deploy.optional import missing
from bca_deploy.serving.flight import Flight
from bca_deploy.serving.queue import Batcher, Limits, queue_collector
from bca_deploy.session.contract import numpy_dtype
from bca_deploy.session.metrics import prometheus_collector
from bca_deploy.session.opening import open_session
from bca_deploy.session.session import Session
from bca_deploy.spec import Precision

#: Requests under way at once, each of which is small until its body comes.
MOST_REQUESTS = 1024
#: Seconds without a request after which memory is given back.
QUIET_S = 3.0
#: The least that a server may hold of requests and answers at once, where nobody says how much.
LEAST_IN_FLIGHT_BYTES = 64 * 2**20
TOKEN_VARIABLE = "BCA_TOKEN"  # noqa: S105  (a name, not a token)

#: Of mallopt, in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_log = logging.getLogger("bca_deploy.serving.server")


@dataclass(frozen=True)
class Options:
    """How to serve.

    Attributes:
        host: address to bind; anything but loopback opens the server to the network.
        http_port: for REST; 0 takes a free one.
        grpc_port: for gRPC; 0 takes a free one.
        name: of the model in URLs.
        limits: of the queue; without a ``max_batch`` the one that suits the backend.
        max_body_bytes: of one request; None takes what the largest request that the bundle allows needs.
        max_in_flight_bytes: of all requests under way and their answers, over which more requests are refused; None takes
            four of the largest, at least ``LEAST_IN_FLIGHT_BYTES``.
        max_connections_per_peer: REST connections from one address; None sets no limit.
        deadline_s: the longest that a request's body may take to arrive, the request to be answered, and the client to take it.
        grace_s: the longest that stopping waits for requests under way.
        token: that clients must send; None for no check.
        tls: files of the certificate chain and of its key.
    """

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 8081
    name: str = "bca"
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int | None = None
    max_in_flight_bytes: int | None = None
    max_connections_per_peer: int | None = None
    deadline_s: float = 30.0
    grace_s: float = 20.0
    token: str | None = None
    tls: tuple[Path, Path] | None = None

    def __post_init__(self) -> None:
        for name, value, most in (
            ("max_delay_ms", self.limits.max_delay_ms, 60_000.0),
            ("deadline_s", self.deadline_s, 86_400.0),
            ("grace_s", self.grace_s, 86_400.0),
        ):
            if not 0 <= value <= most:  # which nan is not either
                raise InputError(f"{name} is {value}; allowed 0 to {most:g}")


def serve(
    bundle: str | Path,
    options: Options,
    backend: str = "auto",
    *,
    precision: Precision | None = None,
    threads: int | None = None,
) -> None:
    """Serve a bundle until SIGTERM or SIGINT; returns when the last request is answered.

    Raises:
        InputError: a port that is taken, an address that is not here, or options that do not fit.
        BcaError: as for :func:`bca_deploy.open`; the self-test is run as well before the first request is taken.
    """
    _import_kserve()
    from bca_deploy.serving.rest_server import listen

    _check_tls(options.tls)
    _keep_little()
    with (
        listen(options.host, options.http_port) as listening,
        open_session(bundle, backend, precision=precision, threads=threads, spinning=False) as session,
    ):
        session.selftest()
        asyncio.run(_serve(session, options, listening))


def _import_kserve() -> None:
    """Import KServe without its look at the command line, which it parses as its own."""
    kept, sys.argv = sys.argv, sys.argv[:1]
    try:
        import kserve  # noqa: F401
    except ImportError as error:
        raise missing(error.name or "kserve", "serve") from error
    finally:
        sys.argv = kept


def _check_tls(tls: tuple[Path, Path] | None) -> None:
    if tls is None:
        return
    for file in tls:
        if not file.is_file():
            raise InputError(f"{file} does not exist or is not a file; give the certificate and its key, both PEM")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*tls, password="")  # never asks the terminal
    except ssl.SSLError as error:
        raise InputError(
            f"{tls[0]} and {tls[1]} are no certificate and its key ({error.reason}); give both as PEM, without a password"
        ) from error


def read_token(file: Path | None) -> str | None:
    """Return the token from a file, or else from the environment; None where there is none.

    Raises:
        InputError: it is empty or not plain text.
    """
    text = file.read_text(encoding="latin-1") if file else os.environ.get(TOKEN_VARIABLE)
    if text is None:
        return None
    token = text.strip()
    if not re.fullmatch(r"[!-~]{1,4096}", token):  # headers hold little more
        raise InputError(
            f"the token in {file or TOKEN_VARIABLE} must be one word of ASCII characters, at most 4096; write a new one"
        )
    return token


async def _serve(session: Session, options: Options, listening: socket.socket) -> None:
    from bca_deploy.serving import endpoints as serving
    from bca_deploy.serving import grpc_server, guards
    from bca_deploy.serving.rest_server import most_connections

    size, held, most = *_sizes(session, options), most_connections()
    limits = replace(options.limits, max_batch=options.limits.max_batch or suitable_batch(session))
    batcher, guard = Batcher(session.run_prepared, limits), guards.Guard(options.token, Flight(MOST_REQUESTS, held))
    plane = serving.Plane(serving.BundleModel(options.name, session, batcher))
    rest = _rest(serving.Endpoints(plane, size, options.deadline_s), guard, options, most)
    grpc = await grpc_server.start(
        serving.Servicer(plane, options.deadline_s),
        grpc_server.GrpcGuard(guard, size, options.deadline_s),
        f"{_in_url(options.host)}:{options.grpc_port}",
        options.tls,
        grpc_server.Limits(size, most, reflection=options.token is None),
    )
    with _collecting(session, batcher, guard, options.name):
        running = asyncio.create_task(rest.serve(sockets=[listening]))
        stop = _stop_signal()
        while not rest.started:
            await asyncio.sleep(0.005)
            if running.done():
                running.result()  # it could not start
        _announce(session, options, listening.getsockname()[1], grpc.port)
        tidying = asyncio.create_task(_tidied(session, guard.flight))
        await asyncio.wait({asyncio.create_task(stop.wait()), batcher.worker}, return_when=asyncio.FIRST_COMPLETED)
        _log.warning("stopping: no new requests are taken, those under way are finished")
        rest.should_exit = True
        tidying.cancel()
        await asyncio.gather(running, grpc.stop(options.grace_s))
        await batcher.close()


def _sizes(session: Session, options: Options) -> tuple[int, int]:
    """Return the bytes that one request may have, and those of all that are under way."""
    one = options.max_body_bytes or largest_request(session)
    every = options.max_in_flight_bytes or max(4 * one, LEAST_IN_FLIGHT_BYTES)
    if every < one:
        raise InputError(
            f"--max-in-flight-mib is {every >> 20}, and one request may have {one / 2**20:.1f} MiB; "
            "raise it, or give a smaller --max-body-mib"
        )
    return one, every


async def _tidied(session: Session, flight: Flight) -> None:
    """Give memory back whenever a peak is over, which the allocators would keep for the next."""
    tidied, before = 0, 0
    while True:
        await asyncio.sleep(QUIET_S)
        if not flight.requests and tidied != flight.entered == before:
            tidied = flight.entered
            await asyncio.to_thread(_tidy, session)
        before = flight.entered


def _tidy(session: Session) -> None:
    try:
        session.trim()
    except Exception:  # the next request finds what is wrong, and says so
        _log.exception("the session's memory could not be given back")
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _keep_little() -> None:
    """Tell glibc to give every large block back when it is freed, and not to scatter small ones over many arenas.

    By itself it learns from large blocks to keep them, and after a burst half of that stays between what is in use.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 2**20)
        library.mallopt(_M_TRIM_THRESHOLD, 2**26)  # smaller blocks go back when it is quiet
        library.mallopt(_M_ARENA_MAX, 2)


def _stop_signal() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


@contextlib.contextmanager
def _collecting(session: Session, batcher: Batcher, guard: Any, name: str) -> Iterator[None]:
    from prometheus_client import REGISTRY

    collectors = [prometheus_collector(session, {"model": name}), queue_collector(batcher, guard)]
    for collector in collectors:
        REGISTRY.register(collector)
    try:
        yield
    finally:
        for collector in collectors:
            REGISTRY.unregister(collector)


def _rest(endpoints: Any, guard: Any, options: Options, most: int) -> Any:
    from fastapi import FastAPI

    from bca_deploy.serving import endpoints as serving
    from bca_deploy.serving import guards
    from bca_deploy.serving.rest_server import Connections, rest_server

    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_middleware(guards.RestGuard, guard=guard)
    guards.handle_errors(app)
    serving.add_routes(app, endpoints)
    connections = Connections(guard, most, options.max_connections_per_peer, options.deadline_s)
    return rest_server(app, connections, options.grace_s, options.tls)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _announce(session: Session, options: Options, http_port: int, grpc_port: int) -> None:
    host, s = _in_url(options.host), "s" if options.tls else ""
    if options.token is None and host not in ("127.0.0.1", "[::1]", "localhost"):
        _log.warning("%s is open to the network without a token; set %s or --token-file", host, TOKEN_VARIABLE)
    print(  # noqa: T201
        f"serving {options.name} on http{s}://{host}:{http_port} and grpc{s}://{host}:{grpc_port}: {session.explain()}",
        flush=True,
    )


def suitable_batch(session: Session) -> int:
    """Return how many requests run together by default.

    On the CPU two for each core: a batch of everybody's requests would leave the model idle while everybody's answers are
    written, and nothing is gained by padding there. Elsewhere 16, since a GPU gains from each one.
    """
    return 2 * len(os.sched_getaffinity(0)) if session.explain().chosen.startswith("onnxruntime-cpu") else 16


def largest_request(session: Session) -> int:
    """Return the bytes of the largest request that the bundle allows, and room for what goes around the tensors."""
    sizes = session.dims.at("max")
    counts = (math.prod(t.shape(sizes)) * numpy_dtype(t.dtype).itemsize for t in session.inputs)
    return sum(counts) + 64 * 1024
