"""A session on another machine: the same calls, over gRPC to any server of the Open Inference Protocol."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import numpy as np

from bca_deploy import tensors
from bca_deploy.contract import Contract
from bca_deploy.errors import InputError, ServerError, missing
from bca_deploy.manifest import TensorEntry
from bca_deploy.session import Pair
from bca_deploy.spec import Axis
from bca_deploy.wire import DATATYPE, NUMPY

#: The server's own limits are not in the protocol's metadata; it says them when a size is refused.
_LARGEST = 2**31 - 1
_SIZES: Any = SimpleNamespace(min=0, max=_LARGEST)
_DIMS: Any = SimpleNamespace(batch=_SIZES, x_len=_SIZES, context_len=_SIZES)
_AXES = {
    "x": ("batch", "x_len"),
    "context": ("batch", "context_len"),
    "mask": ("batch", "x_len"),
    "context_mask": ("batch", "context_len"),
    "out": ("batch", "x_len"),
    "context_out": ("batch", "context_len"),
}
_PAIRS: tuple[Axis, ...] = ("x_len", "context_len")


class RemoteSession:
    """Calls a server as :class:`bca_deploy.session.Session` calls the model in this process.

    Call it from any number of threads.

    Args:
        url: ``grpc://host:port``, or ``grpcs://`` for TLS.
        model: its name on the server.
        deadline_s: the longest that one call may take, retries included.
        attempts: how often a call is tried while the server is unavailable, 1 to 5; four take some 2.5 s.
        token: bearer token, where the server asks for one.
        root_certificates: PEM file that vouches for the server's certificate; None takes gRPC's.

    Raises:
        InputError: the URL is none of these, or the attempts are too many.
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
        scheme, _, self._address = url.partition("://")
        if scheme not in ("grpc", "grpcs") or not self._address:
            raise InputError(f"url {url!r}: give grpc://host:port, or grpcs://host:port for TLS")
        if not 1 <= attempts <= 5:  # gRPC would quietly make no more
            raise InputError(f"attempts is {attempts}; allowed 1 to 5")
        self._model, self._deadline_s = model, deadline_s
        self._headers = {"authorization": f"Bearer {token}"} if token else None
        self._library = _library()
        self._client = self._library.InferenceServerClient(
            self._address,
            ssl=scheme == "grpcs",
            root_certificates=str(root_certificates) if root_certificates else None,
            channel_args=_channel(attempts),
        )

    def __call__(self, *args: Any, cast: bool = False, **named: Any) -> tuple[Any, ...]:
        """Run the model on the server; arguments and results as for the session.

        Raises:
            InputError: what is wrong with which input; most of it is found before anything is sent.
            ServerError: the server cannot be reached, is busy, took too long or failed.
        """
        return tuple(self._run(self._contract.bind(args, named), cast).values())

    def run(self, inputs: Mapping[str, Any], *, cast: bool = False) -> dict[str, Any]:
        """Return the outputs by name; arguments and errors as for calling the session."""
        return self._run(self._contract.bind((), inputs), cast)

    def run_many(self, pairs: Iterable[Pair], *, cast: bool = False) -> list[tuple[Any, ...]]:
        """Return the outputs of many pairs, in order: 16 are asked for at once, and the server puts together what it likes."""
        with ThreadPoolExecutor(16, thread_name_prefix="bca-remote") as pool:
            return list(pool.map(lambda pair: self(*pair, cast=cast), pairs))

    async def run_async(self, *args: Any, cast: bool = False, **named: Any) -> tuple[Any, ...]:
        """Run the model without blocking the event loop; as for calling the session."""
        return await asyncio.to_thread(self, *args, cast=cast, **named)

    @property
    def inputs(self) -> tuple[TensorEntry, ...]:
        """What the model takes, in order; asked of the server once."""
        return self._metadata[0]

    @property
    def outputs(self) -> tuple[TensorEntry, ...]:
        """What it gives, in order."""
        return self._metadata[1]

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @cached_property
    def _metadata(self) -> tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]]:
        found = self._asked(
            lambda: self._client.get_model_metadata(self._model, headers=self._headers, client_timeout=self._deadline_s)
        )
        return tuple(map(_entry, found.inputs)), tuple(map(_entry, found.outputs))

    @cached_property
    def _contract(self) -> Contract:
        return Contract(self.inputs, _DIMS, "send less at once")

    def _run(self, given: Mapping[str, Any], cast: bool) -> dict[str, Any]:
        arrays = {name: tensors.as_array(name, value) for name, value in given.items()}
        ready = self._contract.check(arrays, cast)
        sent = [self._input(name, ready[name]) for name in ready if name in given]
        result = self._asked(
            lambda: self._client.infer(self._model, sent, headers=self._headers, client_timeout=self._deadline_s)
        )
        back = tensors.back(given.values()) or (lambda array: array)
        # Copied: the arrays are views of the message, and read-only.
        return {tensor.name: back(np.array(result.as_numpy(tensor.name))) for tensor in self.outputs}

    def _input(self, name: str, array: Any) -> Any:
        made = self._library.InferInput(name, array.shape, DATATYPE[array.dtype.name])
        return made.set_data_from_numpy(array)

    def _asked(self, ask: Any) -> Any:
        from tritonclient.utils import InferenceServerException

        try:
            return ask()
        except InferenceServerException as error:
            raise self._failure(error) from None

    def _failure(self, error: Any) -> Exception:
        status, where = str(error.status()).removeprefix("StatusCode."), f"{self._address}, model {self._model}"
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
                    f"{where}: no answer within {self._deadline_s:g} s ({said}); raise deadline_s, or ask for less"
                )
        return ServerError(f"{where}: {status}: {said}")


def _library() -> Any:
    try:
        import tritonclient.grpc
    except ImportError:
        raise missing("tritonclient", "client") from None
    return tritonclient.grpc


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


def _entry(tensor: Any) -> TensorEntry:
    if tensor.datatype not in NUMPY:
        raise ServerError(f"{tensor.name} is {tensor.datatype}, so this model is no bidirectional cross-attention")
    named = _AXES.get(tensor.name, ("batch",) if len(tensor.shape) == 4 else ())
    axes = (*named, *_PAIRS) if tensor.name in ("rel_pos_bias", "attn", "context_attn") else named
    sizes = [int(size) for size in tensor.shape]
    names = iter(axes)
    return TensorEntry(
        name=tensor.name, dtype=NUMPY[tensor.datatype], axes=tuple(size if size > 0 else next(names, "batch") for size in sizes)
    )
