"""A session on another machine: the same calls, over gRPC to any server of the Open Inference Protocol."""

import asyncio
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import numpy as np

from bca_deploy import optional
from bca_deploy.errors import BcaError, InputError, ServerError
from bca_deploy.serving.protocol import DATATYPE, NUMPY
from bca_deploy.session import arrays
from bca_deploy.session.contract import Pair, bind, converted, named_axes, numpy_dtype
from bca_deploy.signature import DType, Tensor
from bca_deploy.threads import Home

_LARGEST = 2**31 - 1
_URL = re.compile(r"(grpcs?)://((?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5}))")


@dataclass(frozen=True)
class _Model:
    """What the server says of the model."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class RemoteSession:
    """Calls a server as :class:`bca_deploy.session.session.Session` calls the model in this process.

    Call it from any number of threads, in the process that made it: in the child of a fork every call is an error.

    Args:
        url: ``grpc://host:port``, or ``grpcs://`` for TLS; an IPv6 address stands in brackets.
        model: its name on the server.
        deadline_s: the longest that one call may take, retries included.
        attempts: how often a call is tried while the server is unavailable, 1 to 5; four take some 2.5 s.
        token: bearer token, where the server asks for one.
        root_certificates: PEM file that vouches for the server's certificate; None takes gRPC's.

    Raises:
        InputError: the URL is none of these, the attempts are too many, the token is no single word, or the file of root
            certificates cannot be read.
        BcaError: the process has imported a package that excludes tritonclient, as kserve does.
        MissingDependencyError: tritonclient is not installed.
    """

    def __init__(
        self,
        url: str,
        model: str = "bca",
        *,
        deadline_s: float = 30.0,
        attempts: int = 4,
        token: str | None = None,
        root_certificates: str | Path | None = None,
    ) -> None:
        scheme, self._address = _parts(url)
        if not 1 <= attempts <= 5:  # gRPC would quietly make no more
            raise InputError(f"attempts is {attempts}; allowed 1 to 5")
        _check_certificates(root_certificates)
        self._name, self._deadline_s = model, deadline_s
        self._headers = _headers(token)
        self._known: _Model | None = None
        self._closed = False
        self._library = _library()
        self._client = self._library.InferenceServerClient(
            self._address,
            ssl=scheme == "grpcs",
            root_certificates=str(root_certificates) if root_certificates else None,
            channel_args=_channel(attempts),
        )
        self._home = Home("the RemoteSession", self)

    def __call__(self, *args: Any, cast: bool = False, **named: Any) -> tuple[Any, ...]:
        """Run the model on the server; arguments and results as for the session.

        Raises:
            InputError: what is wrong with which input, in the session's words: names, ranks, fixed sizes, dtypes and masks are
                looked at before anything is sent, the sizes that vary by the server, which alone knows their limits.
            ServerError: the server cannot be reached, is busy, took too long or failed.
            BcaError: the session is closed, or was made before a fork.
        """
        self._check_open()
        return tuple(self._run(self._bound(args, named), cast).values())

    def run(self, inputs: Mapping[str, Any], *, cast: bool = False) -> dict[str, Any]:
        """Return the outputs by name; arguments and errors as for calling the session."""
        self._check_open()
        return self._run(self._bound((), inputs), cast)

    def run_many(self, pairs: Iterable[Pair], *, cast: bool = False) -> list[tuple[Any, ...]]:
        """Return the outputs of many pairs, in order: 16 are asked for at once, and the server puts together what it likes.

        Raises:
            InputError: naming the pair.
        """
        self._check_open()
        with ThreadPoolExecutor(16, thread_name_prefix="bca-remote") as pool:
            return list(pool.map(self._run_pair, count(), pairs, repeat(cast)))

    async def run_async(self, *args: Any, cast: bool = False, **named: Any) -> tuple[Any, ...]:
        """Run the model without blocking the event loop; as for calling the session."""
        return await asyncio.to_thread(self, *args, cast=cast, **named)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the model takes, in order; asked of the server once. The protocol names no axis: one that varies is ``?``."""
        return self._model().inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What it gives, in order."""
        return self._model().outputs

    def close(self) -> None:
        """Close the connection; calling the session is an error from now on. In the child of a fork it stays the parent's."""
        self._closed = True
        if self._home.here:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        self._home.check()
        if self._closed:
            raise BcaError("the session is closed; make another RemoteSession")

    def _model(self) -> _Model:
        # Without a lock: threads that come first may ask twice, which is harmless, and none waits for another's answer.
        if self._known is None:
            self._known = self._asked_model()
        return self._known

    def _asked_model(self) -> _Model:
        self._home.check()
        found = self._asked(
            lambda: self._client.get_model_metadata(self._name, headers=self._headers, client_timeout=self._deadline_s)
        )
        inputs, outputs = (tuple(map(_entry, tensors)) for tensors in (found.inputs, found.outputs))
        return _Model(inputs, outputs)

    def _bound(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        return bind([tensor.name for tensor in self.inputs], args, named)

    def _run_pair(self, index: int, pair: Pair, cast: bool) -> tuple[Any, ...]:
        try:
            return self(*pair, cast=cast)
        except InputError as error:
            raise InputError(f"pair {index}: {error}") from None

    def _run(self, given: Mapping[str, Any], cast: bool) -> dict[str, Any]:
        known = {tensor.name: tensor for tensor in self.inputs}
        sent = [self._input(known[name], arrays.as_array(name, value), cast) for name, value in given.items()]
        result = self._asked(
            lambda: self._client.infer(self._name, sent, headers=self._headers, client_timeout=self._deadline_s)
        )
        back = arrays.back(given.values()) or (lambda array: array)
        # Copied: the arrays are views of the message, and read-only.
        return {tensor.name: back(np.array(result.as_numpy(tensor.name))) for tensor in self.outputs}

    def _input(self, tensor: Tensor, array: Any, cast: bool) -> Any:
        tuple(named_axes(tensor, array.shape))  # refuses what the metadata tells against
        ready = converted(tensor.name, numpy_dtype(tensor.dtype), array, cast)
        made = self._library.InferInput(tensor.name, ready.shape, DATATYPE[ready.dtype.name])
        return made.set_data_from_numpy(ready)

    def _asked(self, ask: Any) -> Any:
        from tritonclient.utils import InferenceServerException

        try:
            return ask()
        except InferenceServerException as error:
            raise self._failure(error) from None
        except ValueError:  # how gRPC says that another thread has closed the channel since the check
            self._check_open()
            raise

    def _failure(self, error: Any) -> Exception:
        status, where = str(error.status()).removeprefix("StatusCode."), f"{self._address}, model {self._name}"
        said = error.message()
        match status:
            case "INVALID_ARGUMENT":
                return InputError(said)
            case "UNAVAILABLE":
                return ServerError(f"{where}: the server is not there or went away ({said}); start it, or try again")
            case "RESOURCE_EXHAUSTED":
                return ServerError(f"{where}: the server is busy, or the request too large ({said})")
            case "DEADLINE_EXCEEDED":
                return ServerError(
                    f"{where}: no answer within {self._deadline_s:g} s ({said}); raise deadline_s, or split the batch"
                )
        return ServerError(f"{where}: {status}: {said}")


def _parts(url: str) -> tuple[str, str]:
    """Return the scheme and the address; gRPC takes much else for an address, and fails late or at another port."""
    found = _URL.fullmatch(url)
    if found is None or not 1 <= int(found[3]) <= 65535:
        raise InputError(
            f"url {url!r}: give grpc://host:port, or grpcs://host:port for TLS, with nothing after it; "
            "the port is 1 to 65535, and an IPv6 address stands in brackets"
        )
    return found[1], found[2]


def _headers(token: str | None) -> dict[str, str] | None:
    if token is None:
        return None
    if not re.fullmatch(r"[!-~]+", token):  # the error does not show it
        raise InputError(
            f"the token of {len(token)} characters is no single word of printable ASCII; "
            "take off the line's end or the spaces, such as by .strip()"
        )
    return {"authorization": f"Bearer {token}"}


def _check_certificates(file: str | Path | None) -> None:
    """Before the client is made, which leaves a traceback of its own behind when it cannot read the file."""
    if file is None:
        return
    try:
        Path(file).read_bytes()
    except OSError as error:
        raise InputError(
            f"root_certificates {file} cannot be read: {error.strerror}; give a PEM file, or leave it out for gRPC's own"
        ) from None


def _library() -> Any:
    try:
        return optional.load("tritonclient.grpc", "tritonclient", "client")
    except TypeError as error:
        if "duplicate symbol" not in str(error):
            raise
        raise BcaError(
            "this process has imported another package with protobuf messages of tritonclient's names, such as kserve; "
            "call the server from another process, for another order of the imports does not help"
        ) from None


def _channel(attempts: int) -> list[tuple[str, Any]]:
    """Return the options of a channel that tries again by itself, as long as the deadline allows."""
    policy = {
        "maxAttempts": attempts,
        "initialBackoff": "0.2s",
        "maxBackoff": "5s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]} if attempts > 1 else {}
    return [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.per_rpc_retry_buffer_size", _LARGEST),  # else a request above 256 KiB is never sent again
        ("grpc.max_reconnect_backoff_ms", 5000),  # else a server that comes back is not looked for, for up to two minutes
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ]


def _entry(tensor: Any) -> Tensor:
    known: dict[str | None, DType] = {name: name for name in get_args(DType)}
    dtype = known.get(NUMPY.get(tensor.datatype))
    if dtype is None:
        raise ServerError(f"{tensor.name} is {tensor.datatype}; models here have {', '.join(get_args(DType))}")
    return Tensor(tensor.name, dtype, tuple(int(size) if int(size) > 0 else "?" for size in tensor.shape))
