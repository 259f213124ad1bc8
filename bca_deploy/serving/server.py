"""`bca serve`: KServe's parts put together over one session, bound by hand, and stopped without dropping a request."""

import asyncio
import contextlib
import logging
import math
import os
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
from bca_deploy.serving.queue import Batcher, Limits, queue_collector
from bca_deploy.session.contract import numpy_dtype
from bca_deploy.session.metrics import prometheus_collector
from bca_deploy.session.opening import open_session
from bca_deploy.session.session import Session
from bca_deploy.spec import Precision

#: Seconds for a client to read the last answer.
READING_S = 0.5
TOKEN_VARIABLE = "BCA_TOKEN"  # noqa: S105  (a name, not a token)

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
        deadline_s: the longest that a request's body may take to arrive, and the request to be answered.
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
    deadline_s: float = 30.0
    grace_s: float = 20.0
    token: str | None = None
    tls: tuple[Path, Path] | None = None


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
    _check_tls(options.tls)
    with (
        _bind(options.host, options.http_port) as listening,
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


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only where the protocol is named; with it every answer would take 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(512)
    except OSError as error:
        listening.close()
        raise InputError(
            f"{host} port {port} cannot be listened on: {error.strerror}; choose another port or address"
        ) from error
    return listening


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
    text = file.read_text(encoding="utf-8") if file else os.environ.get(TOKEN_VARIABLE)
    if text is None:
        return None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(f"the token in {file or TOKEN_VARIABLE} must be one word of ASCII characters; write a new one")
    return token


async def _serve(session: Session, options: Options, listening: socket.socket) -> None:
    from bca_deploy.serving import endpoints as serving
    from bca_deploy.serving import guards

    size = options.max_body_bytes or largest_request(session)
    limits = replace(options.limits, max_batch=options.limits.max_batch or suitable_batch(session))
    batcher, guard = Batcher(session.run_prepared, limits), guards.Guard(options.token)
    plane = serving.plane_of(serving.BundleModel(options.name, session, batcher))
    rest = _rest(serving.Endpoints(plane, size, options.deadline_s), guard, options)
    grpc, grpc_port = await _start_grpc(serving.Servicer(plane, options.deadline_s), guards.GrpcGuard(guard), options, size)
    with _collecting(session, batcher, guard, options.name):
        running = asyncio.create_task(rest.serve(sockets=[listening]))
        stop = _stop_signal()
        while not rest.started:
            await asyncio.sleep(0.005)
            if running.done():
                running.result()  # it could not start
        _announce(session, options, listening.getsockname()[1], grpc_port)
        await asyncio.wait({asyncio.create_task(stop.wait()), batcher.worker}, return_when=asyncio.FIRST_COMPLETED)
        _log.warning("stopping: no new requests are taken, those under way are finished")
        rest.should_exit = True
        await asyncio.gather(running, _stop_grpc(grpc, guard, options.grace_s))
        await batcher.close()


async def _stop_grpc(server: Any, guard: Any, grace_s: float) -> None:
    """Stop when the calls under way are answered and their clients have had time to read.

    gRPC closes a connection as soon as the kernel has the last answer, and what the client has sent by then resets it: an
    answer that is not read yet would be lost.
    """
    clock = asyncio.get_running_loop().time
    end, guard.stopping = clock() + grace_s, True
    while guard.calls and clock() < end:
        await asyncio.sleep(0.01)
    await asyncio.sleep(min(READING_S, max(end - clock(), 0)))
    await server.stop(max(end - clock(), 0))


def _stop_signal() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


@contextlib.contextmanager
def _collecting(session: Session, batcher: Batcher, guard: Any, name: str) -> Iterator[None]:
    from prometheus_client import REGISTRY

    collectors = [prometheus_collector(session, {"model": name}), queue_collector(batcher, guard.requests)]
    for collector in collectors:
        REGISTRY.register(collector)
    try:
        yield
    finally:
        for collector in collectors:
            REGISTRY.unregister(collector)


def _rest(endpoints: Any, guard: Any, options: Options) -> Any:
    import uvicorn
    from fastapi import FastAPI

    from bca_deploy.serving import endpoints as serving
    from bca_deploy.serving import guards

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # a signal stops gRPC as well, so it is handled in one place

    app = FastAPI(openapi_url=None)
    app.add_middleware(guards.RestGuard, guard=guard)
    guards.handle_errors(app)
    serving.add_routes(app, endpoints)
    config = uvicorn.Config(
        app,
        http="h11",  # the other one takes headers without end
        log_config=None,
        access_log=False,  # serving/guards.py writes one for both protocols
        lifespan="off",
        ws="none",
        limit_concurrency=1024,
        timeout_graceful_shutdown=math.ceil(options.grace_s),
        ssl_certfile=options.tls[0] if options.tls else None,
        ssl_keyfile=options.tls[1] if options.tls else None,
    )
    return Server(config)


async def _start_grpc(servicer: Any, guard: Any, options: Options, max_bytes: int) -> tuple[Any, int]:
    import grpc
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

    most = min(max_bytes, 2**31 - 1)  # protobuf holds no more
    channel = [("grpc.max_receive_message_length", most), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(interceptors=(guard,), options=channel)
    add_GRPCInferenceServiceServicer_to_server(servicer, server)
    address = f"{_in_url(options.host)}:{options.grpc_port}"
    try:
        port = _listen(server, address, options.tls)
    except RuntimeError as error:
        raise InputError(f"{address} cannot be listened on; choose another --grpc-port or --host") from error
    await server.start()
    return server, port


def _listen(server: Any, address: str, tls: tuple[Path, Path] | None) -> int:
    import grpc

    if tls is None:
        return int(server.add_insecure_port(address))
    certificate, key = (file.read_bytes() for file in tls)
    return int(server.add_secure_port(address, grpc.ssl_server_credentials([(key, certificate)])))


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
