"""The gRPC side: its server with health and reflection, and around every call what serving/guards.py asks for."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

from bca_deploy.errors import InputError
from bca_deploy.serving.flight import Arrivals, Flight, Place
from bca_deploy.serving.guards import OTHER, Guard, NotFoundError, StoppingError, verdict

SERVICE = "inference.GRPCInferenceService"
#: Seconds for a client to read the last answer.
READING_S = 0.5
#: Probes ask without a token, and find a place where nobody else does.
_OPEN = (f"/{SERVICE}/ServerLive", f"/{SERVICE}/ServerReady", "/grpc.health.v1.Health/Check")
_WITH_TENSORS = f"/{SERVICE}/ModelInfer"
#: Bytes of a message without tensors. How many of these may be on their way at once, and how many probes may be here.
_SMALL, _SMALL_AT_ONCE, _MOST_PROBES = 4096, 8, 256
#: Seconds for such a message; and after which one on its way gives place to another: without tensors, and with.
_SMALL_S, _PATIENCE_S = 5.0, (0.1, 2.0)
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 10_000),  # else a silent connection stays for two minutes
    ("grpc.max_connection_idle_ms", 300_000),  # clients connect again by themselves
]


class GrpcGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Lets calls through, or not. Messages are read here, when the token was looked at and there is room for them.

    Args:
        guard: what REST and gRPC share.
        max_bytes: of a message with tensors.
        deadline_s: for it to arrive.
    """

    def __init__(self, guard: Guard, max_bytes: int, deadline_s: float) -> None:
        self.guard, self.probes = guard, Flight(_MOST_PROBES, _MOST_PROBES * _SMALL)
        self.large = Arrivals(max(guard.flight.most_bytes // max_bytes, 1), deadline_s, _PATIENCE_S[1])
        self.small = Arrivals(_SMALL_AT_ONCE, _SMALL_S, _PATIENCE_S[0])
        #: Calls under way; whether new ones are refused; and streams, which end when the server does.
        self.calls, self.stopping = 0, False
        self.streams: set[asyncio.Task[Any]] = set()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Return a handler that lets one call through, or not."""
        found = await continuation(details)
        call = _Call(self, details, found)
        # Handlers of streams, whatever the client takes them for: the others are given the message before they are asked.
        if found is None or found.response_streaming:
            return grpc.stream_stream_rpc_method_handler(call.stream, None, found and found.response_serializer)
        return grpc.stream_unary_rpc_method_handler(call.answer, None, found.response_serializer)

    def stop(self) -> None:
        """Refuse new calls, and end the streams."""
        self.stopping = True
        for stream in self.streams:
            stream.cancel()


class _Call:
    """One call.

    Args:
        shared: what all calls share.
        details: gRPC's, of the call.
        found: gRPC's handler of the method; None where there is none.
    """

    def __init__(self, shared: GrpcGuard, details: Any, found: Any) -> None:
        self._shared, self._found, self._path = shared, found, details.method
        self._token = dict(details.invocation_metadata).get("authorization", "")
        self._start = time.perf_counter()

    async def answer(self, _: Any, context: Any) -> Any:
        """Return the answer; None and a status where there is none."""
        self._shared.calls += 1
        status = grpc.StatusCode.CANCELLED
        try:
            place = self._place(context)
            answer = await self._found.unary_unary(await self._message(context, place), context)
            place.owe(answer.ByteSize())
            status = grpc.StatusCode.OK
            return answer
        except Exception as error:
            status = _refused(context, error)
            return None
        finally:
            self._shared.calls -= 1
            self._log(context, status)

    async def stream(self, _: Any, context: Any) -> None:
        """Write the answers; ends with the server."""
        status = grpc.StatusCode.CANCELLED
        try:
            await self._while_serving(self._answers(self._place(context), context))
            status = grpc.StatusCode.OK
        except Exception as error:
            status = _refused(context, error)
        finally:
            self._log(context, status)

    async def _while_serving(self, work: Coroutine[Any, Any, None]) -> None:
        """Work until the server stops; gRPC would wait for a call whose own task is ended."""
        task = asyncio.create_task(work)
        self._shared.streams.add(task)
        task.add_done_callback(self._shared.streams.discard)
        try:
            await task
        except asyncio.CancelledError:
            if self._shared.stopping:
                raise StoppingError from None
            raise

    async def _answers(self, place: Place, context: Any) -> None:
        if self._found.unary_stream:
            found = self._found.unary_stream(await self._message(context, place), context)
        else:
            found = self._found.stream_stream(self._messages(context, place), context)
        if not hasattr(found, "__aiter__"):  # it writes by itself
            await found
            return
        async for part in found:
            await context.write(part)

    def _place(self, context: Any) -> Place:
        """Return a place, which is left when the answer is at the client's or the call has ended otherwise."""
        if self._shared.stopping:
            raise StoppingError
        flight = self._shared.probes
        if self._path not in _OPEN:
            self._shared.guard.check_token(self._token.encode("latin-1", "replace"))
            flight = self._shared.guard.flight
        if self._found is None:
            raise NotImplementedError("this server has no such method")
        place = flight.enter()
        context.add_done_callback(lambda _: place.leave())
        return place

    async def _message(self, context: Any, place: Place) -> Any:
        async for message in self._messages(context, place):
            return message
        raise InputError("the call ended before its message; send one")

    async def _messages(self, context: Any, place: Place) -> AsyncIterator[Any]:
        """Yield the client's messages, parsed."""
        small = self._path != _WITH_TENSORS
        while (raw := await self._read(context, place, small)) is not grpc.aio.EOF:
            try:
                message = self._found.request_deserializer(raw)
            except DecodeError:
                text = f"these {len(raw)} bytes are no message of the Open Inference Protocol; send its protobuf"
                raise InputError(text) from None
            del raw
            yield message

    async def _read(self, context: Any, place: Place, small: bool) -> Any:
        place.check(1)  # before it comes
        raw = await (self._shared.small if small else self._shared.large).one(context.read)
        if raw is grpc.aio.EOF:
            return raw
        if small and len(raw) > _SMALL:
            raise InputError(f"the message has {len(raw)} bytes; one without tensors has at most {_SMALL} here")
        place.take(len(raw))
        return raw

    def _log(self, context: Any, status: Any) -> None:
        name = OTHER if self._found is None else self._path.rsplit("/", 1)[-1]
        self._shared.guard.log(context.peer(), "grpc", name, status.name, self._start)


def _refused(context: Any, error: Exception) -> Any:
    """Set the status. ``abort`` would raise an error whose traceback holds the request until the next collection."""
    _, status, message = verdict(error)
    context.set_code(status)
    context.set_details(message)
    return status


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802  (the protocol's name)
        if request.service not in ("", SERVICE):
            raise NotFoundError(f"this server has no service {request.service!r}; it has {SERVICE}")
        return await super().Check(request, context)


@dataclass(frozen=True)
class Limits:
    """Of a server.

    Attributes:
        max_bytes: of a message.
        most_connections: at once.
        reflection: let clients ask what the methods are; a server that asks for a token keeps that to itself.
    """

    max_bytes: int
    most_connections: int
    reflection: bool

    def options(self) -> list[tuple[str, int]]:
        """Return gRPC's."""
        most = min(self.max_bytes, 2**31 - 1)  # protobuf holds no more
        return [
            ("grpc.max_receive_message_length", most),
            ("grpc.max_allowed_incoming_connections", self.most_connections),
        ]


@dataclass(frozen=True)
class GrpcServer:
    """A server that has started.

    Attributes:
        port: that it listens on.
    """

    port: int
    _server: Any
    _guard: GrpcGuard
    _health: _Health

    async def stop(self, grace_s: float) -> None:
        """Stop when the calls under way are answered and their clients have had time to read.

        gRPC closes a connection as soon as the kernel has the last answer, and what the client has sent by then resets it: an
        answer that is not read yet would be lost.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + grace_s
        await self._health.enter_graceful_shutdown()
        self._guard.stop()
        while self._guard.calls and clock() < end:
            await asyncio.sleep(0.01)
        await asyncio.sleep(min(READING_S, max(end - clock(), 0)))
        await self._server.stop(max(end - clock(), 0))


async def start(servicer: Any, guard: GrpcGuard, address: str, tls: tuple[Path, Path] | None, limits: Limits) -> GrpcServer:
    """Start to serve.

    Args:
        servicer: of the Open Inference Protocol.
        guard: lets calls through, or not.
        address: host and port.
        tls: files of the certificate chain and of its key.
        limits: of the channel.

    Raises:
        InputError: the address cannot be listened on.
    """
    server = grpc.aio.server(interceptors=(guard,), options=[*_CHANNEL, *limits.options()])
    add_GRPCInferenceServiceServicer_to_server(servicer, server)
    health_servicer = _Health()
    await health_servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    if limits.reflection:
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    try:
        port = _listen(server, address, tls)
    except RuntimeError as error:
        raise InputError(f"{address} cannot be listened on; choose another --grpc-port or --host") from error
    await server.start()
    return GrpcServer(port, server, guard, health_servicer)


def _listen(server: Any, address: str, tls: tuple[Path, Path] | None) -> int:
    if tls is None:
        return int(server.add_insecure_port(address))
    certificate, key = (file.read_bytes() for file in tls)
    return int(server.add_secure_port(address, grpc.ssl_server_credentials([(key, certificate)])))
