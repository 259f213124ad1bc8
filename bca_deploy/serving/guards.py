"""Around every request, on REST and gRPC alike: the token, the access log, and from an error to the protocol's status."""

import hmac
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from google.protobuf.message import DecodeError
from grpc import StatusCode
from grpc_interceptor import AsyncServerInterceptor
from kserve.errors import ModelNotFound, ModelNotReady
from starlette.exceptions import HTTPException

from bca_deploy.errors import InputError
from bca_deploy.serving.queue import BusyError

access = logging.getLogger("bca_deploy.access")
_log = logging.getLogger("bca_deploy.serving.server")

#: gRPC sends messages in headers, which hold little; a client's own names may be long.
_LONGEST_MESSAGE = 1000
#: Probes ask without a token.
_OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
_OPEN_METHODS = ("ServerLive", "ServerReady")

#: What an error means to HTTP and to gRPC. A missing text is the error's own.
_VERDICTS: tuple[tuple[type[Exception], int, StatusCode, str | None], ...] = (
    (InputError, 400, StatusCode.INVALID_ARGUMENT, None),
    (BusyError, 429, StatusCode.RESOURCE_EXHAUSTED, None),
    (TimeoutError, 504, StatusCode.DEADLINE_EXCEEDED, "the request was not answered before the server's deadline"),
    (ModelNotFound, 404, StatusCode.NOT_FOUND, None),
    (ModelNotReady, 503, StatusCode.UNAVAILABLE, "the model is not ready"),
    (NotImplementedError, 501, StatusCode.UNIMPLEMENTED, None),
    (Exception, 500, StatusCode.INTERNAL, "the server failed; its log says why"),
)


def _verdict(error: Exception) -> tuple[int, StatusCode, str]:
    """Return the HTTP status, the gRPC status and the message for an error."""
    if isinstance(error, HTTPException):
        return error.status_code, StatusCode.UNKNOWN, error.detail
    http, grpc, text = next(rest for kind, *rest in _VERDICTS if isinstance(error, kind))
    text = text or getattr(error, "reason", str(error))  # KServe's keep their text there
    return http, grpc, text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."


class Guard:
    """What REST and gRPC share.

    Args:
        token: that requests must carry; None asks for none.
    """

    def __init__(self, token: str | None) -> None:
        self._token = f"Bearer {token}".encode() if token is not None else None
        self.requests: Counter[tuple[str, str]] = Counter()
        #: gRPC calls under way; and whether new ones are refused.
        self.calls, self.stopping = 0, False

    def admits(self, given: bytes) -> bool:
        """Whether an ``authorization`` value is the right one, in a time that tells nothing about it."""
        return self._token is None or hmac.compare_digest(given, self._token)

    def log(self, peer: str, what: str, status: str, start: float) -> None:
        """Write a line of the access log and count the request."""
        self.requests[what.split(" ", 1)[0], status] += 1
        access.info("%s %s %s %.1f ms", peer, what, status, (time.perf_counter() - start) * 1e3)


Scope = dict[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class RestGuard:
    """ASGI middleware."""

    def __init__(self, app: App, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Let one request through, or not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), "closed"

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._admitted(scope)(scope, receive, noting)
        except Exception as error:
            if status != "closed":  # an answer had begun, and no other can follow
                raise
            await _answer(None, error)(scope, receive, noting)
        finally:
            peer, path = (scope["client"] or ("-",))[0], scope["raw_path"].decode("latin-1")[:200]
            self._guard.log(peer, f"{scope['method']} {path}", status, start)

    def _admitted(self, scope: Scope) -> App:
        if scope["path"] in _OPEN_PATHS or self._guard.admits(dict(scope["headers"]).get(b"authorization", b"")):
            return self._app
        return JSONResponse({"error": "a valid bearer token is needed"}, 401, {"WWW-Authenticate": "Bearer"})


def _answer(_: Any, error: Exception) -> JSONResponse:
    """Return an error's status and ``{"error": message}``."""
    status, _, message = _verdict(error)
    if status == 500:
        _log.error("request failed", exc_info=error)
    return JSONResponse({"error": message}, status, {"Retry-After": "1"} if status in (429, 503) else None)


def handle_errors(app: FastAPI) -> None:
    """Have every error answered, but for those that nobody expected: the guard sees to them, or they would not be counted."""
    app.add_exception_handler(HTTPException, _answer)
    for expected, *_ in _VERDICTS[:-1]:
        app.add_exception_handler(expected, _answer)


class GrpcGuard(AsyncServerInterceptor):
    """gRPC interceptor."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Let bytes that are no message of the protocol come as far as ``intercept``; gRPC would call them an error of ours."""

        async def tolerant(details: Any) -> Any:
            handler = await continuation(details)
            return handler and handler._replace(request_deserializer=_tolerant(handler.request_deserializer))

        return await super().intercept_service(tolerant, handler_call_details)  # type: ignore[no-untyped-call]

    async def intercept(self, method: Any, request_or_iterator: Any, context: Any, method_name: str) -> Any:
        """Let one call through, or not."""
        start, status, name = time.perf_counter(), StatusCode.CANCELLED, method_name.rsplit("/", 1)[-1]
        self._guard.calls += 1
        try:
            if self._guard.stopping:
                status = StatusCode.UNAVAILABLE
                return _refused(context, status, "the server is stopping; ask another replica")
            given = dict(context.invocation_metadata()).get("authorization", "")
            if name not in _OPEN_METHODS and not self._guard.admits(given.encode("latin-1", "replace")):
                status = StatusCode.UNAUTHENTICATED
                return _refused(context, status, "a valid bearer token is needed")
            try:
                if isinstance(request_or_iterator, Exception):
                    raise request_or_iterator
                answer = await method(request_or_iterator, context)
            except Exception as error:
                _, status, message = _verdict(error)
                if status is StatusCode.INTERNAL:
                    _log.exception("request failed")
                return _refused(context, status, message)
            status = StatusCode.OK
            return answer
        finally:
            self._guard.calls -= 1
            self._guard.log(context.peer(), f"grpc {name}", status.name, start)


def _refused(context: Any, status: StatusCode, message: str) -> None:
    """Set the status. ``abort`` would raise an error whose traceback holds the request until the next collection."""
    context.set_code(status)
    context.set_details(message)


def _tolerant(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse_or_tell(sent: bytes) -> Any:
        try:
            return parse(sent)
        except DecodeError:
            return InputError(f"these {len(sent)} bytes are no message of the Open Inference Protocol; send its protobuf")

    return parse_or_tell
