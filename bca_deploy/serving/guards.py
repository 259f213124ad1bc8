"""Around every request, on REST and gRPC alike: the token, the places, the access log, and from an error to a status."""

import hmac
import logging
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from grpc import StatusCode
from kserve.errors import ModelNotFound, ModelNotReady
from starlette.exceptions import HTTPException

from bca_deploy.errors import BcaError, InputError
from bca_deploy.serving.flight import BusyError, Flight

access = logging.getLogger("bca_deploy.access")
_log = logging.getLogger("bca_deploy.serving.server")

#: Methods that have a label of their own; a client may send any word of any length, and each label stays for good.
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
#: The label, and the name in the log, of all others, and of gRPC methods that are not served.
OTHER = "other"
#: gRPC sends messages in headers, which hold little; a client's own names may be long.
_LONGEST_MESSAGE = 1000
#: Characters of a field in the access log, and of a line and lines of a traceback in the server's own.
_LONGEST_FIELD, _LONGEST_LINE, _MOST_LINES = 200, 500, 100
#: Probes ask without a token, and find a place where nobody else does.
_OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
#: Bytes of an answer that is sent in one piece; the end of a longer one waits until the client has taken most of it.
_SMALL_ANSWER = 64 * 1024


class UnauthenticatedError(BcaError):
    """Not the token that this server asks for."""


class NotFoundError(BcaError):
    """Something that this server has not, by its name."""


class StoppingError(BcaError):
    """The server ends."""


#: What an error means to HTTP and to gRPC. A missing text is the error's own.
_VERDICTS: tuple[tuple[type[Exception], int, StatusCode, str | None], ...] = (
    (UnauthenticatedError, 401, StatusCode.UNAUTHENTICATED, "a valid bearer token is needed"),
    (StoppingError, 503, StatusCode.UNAVAILABLE, "the server is stopping; ask another replica"),
    (InputError, 400, StatusCode.INVALID_ARGUMENT, None),
    (BusyError, 429, StatusCode.RESOURCE_EXHAUSTED, None),
    (TimeoutError, 504, StatusCode.DEADLINE_EXCEEDED, "the request was not answered before the server's deadline"),
    (NotFoundError, 404, StatusCode.NOT_FOUND, None),
    (ModelNotFound, 404, StatusCode.NOT_FOUND, None),
    (ModelNotReady, 503, StatusCode.UNAVAILABLE, "the model is not ready"),
    (NotImplementedError, 501, StatusCode.UNIMPLEMENTED, None),
    (Exception, 500, StatusCode.INTERNAL, "the server failed; its log says why"),
)
#: What HTTP wants beside a status.
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    415: {"Accept-Encoding": "identity"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}


def verdict(error: Exception) -> tuple[int, StatusCode, str]:
    """Return the HTTP status, the gRPC status and the message for an error; one that nobody expected is logged."""
    if isinstance(error, HTTPException):
        return error.status_code, StatusCode.UNKNOWN, cut(error.detail, _LONGEST_MESSAGE)
    http, grpc, text = next(rest for kind, *rest in _VERDICTS if isinstance(error, kind))
    if http == 500:
        _log.error("request failed\n%s", _trace(error))
    return http, grpc, cut(text or getattr(error, "reason", str(error)), _LONGEST_MESSAGE)  # KServe's keep their text there


def cut(text: str, longest: int) -> str:
    """Return the text, or its beginning where it is longer."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def _trace(error: Exception) -> str:
    """Return the traceback, whatever a client has put into the error's text, and however deep it comes from."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    kept = lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES // 2], "...", *lines[-_MOST_LINES // 2 :]]
    return "\n".join(cut(line, _LONGEST_LINE) for line in kept)


class Guard:
    """What REST and gRPC share.

    Args:
        token: that requests must carry; None asks for none.
        flight: the places.
    """

    def __init__(self, token: str | None, flight: Flight) -> None:
        self._token = token.encode() if token is not None else None
        self.flight = flight
        self.requests: Counter[tuple[str, str]] = Counter()

    def check_token(self, given: bytes) -> None:
        """Refuse an ``authorization`` value that is not the right one, in a time that tells nothing about it.

        Raises:
            UnauthenticatedError: it is not.
        """
        scheme, _, token = given.partition(b" ")
        if self._token is None or (hmac.compare_digest(token.strip(b" "), self._token) and scheme.lower() == b"bearer"):
            return
        raise UnauthenticatedError

    def log(self, peer: str, kind: str, what: str, status: str, start: float) -> None:
        """Write a line of the access log and count the request. Kind and status are words of ours, the rest is cut."""
        self.requests[kind, status] += 1
        fields = (cut(peer, _LONGEST_FIELD), kind, cut(what, _LONGEST_FIELD), status)
        access.info("%s %s %s %s %.1f ms", *fields, (time.perf_counter() - start) * 1e3)


Scope = dict[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class RestGuard:
    """ASGI middleware. Endpoints find the request's place as ``scope["place"]``."""

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
            await _send_counted(message, scope, send)

        try:
            await self._pass(scope, receive, noting)
        except Exception as error:
            if status != "closed":  # an answer had begun, and no other can follow
                raise
            await _answer(None, error)(scope, receive, noting)
        finally:
            kind = scope["method"] if scope["method"] in METHODS else OTHER
            peer, path = (scope["client"] or ("-",))[0], scope["raw_path"].decode("latin-1")
            self._guard.log(peer, kind, path, status, start)

    async def _pass(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        self._guard.check_token(headers.get(b"authorization", b""))
        if b"transfer-encoding" in headers and b"content-length" in headers:  # a proxy may have read the other one
            text = "the request has both Transfer-Encoding and Content-Length; send one of them"
            raise HTTPException(400, text, {"Connection": "close"})
        with self._guard.flight.place() as scope["place"]:
            await self._app(scope, receive, send)


async def _send_counted(message: Any, scope: Scope, send: Any) -> None:
    """Send a part of an answer. The last part of a long one returns when it is taken, so that its place is held until then."""
    size, place = len(message.get("body", b"")), scope.get("place")
    if place is not None:
        place.owe(size)
    if size > _SMALL_ANSWER and not message.get("more_body", False):
        await send(message | {"more_body": True})
        message = {"type": "http.response.body", "body": b""}
    await send(message)


def _answer(_: Any, error: Exception) -> JSONResponse:
    """Return an error's status and ``{"error": message}``."""
    status, _, message = verdict(error)
    given = getattr(error, "headers", None) or {}  # such as the methods that are allowed
    return JSONResponse({"error": message}, status, {**given, **_HEADERS.get(status, {})})


def handle_errors(app: FastAPI) -> None:
    """Have every error answered, but for those that nobody expected: the guard sees to them, or they would not be counted."""
    app.add_exception_handler(HTTPException, _answer)
    for expected, *_ in _VERDICTS[:-1]:
        app.add_exception_handler(expected, _answer)
