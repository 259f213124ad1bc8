"""The session as a KServe model: its REST endpoints and its gRPC service, on arrays instead of lists."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from kserve import Model, ModelRepository
from kserve.errors import ModelNotFound
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest.server import metrics_handler
from kserve.protocol.rest.v2_endpoints import V2Endpoints
from starlette.requests import ClientDisconnect

from bca_deploy.serving import protocol, protocol_rest
from bca_deploy.serving.queue import Batcher
from bca_deploy.session.session import Session

HEADER_LENGTH = "Inference-Header-Content-Length"
#: Of the model; there is one, and the protocol lets a client name it.
VERSION = "1"
#: What nginx's log calls a client that went away; nobody is there to read it.
GONE = 499
#: Bytes of JSON that are read beside the event loop.
_LARGE_JSON = 64 * 1024


class BundleModel(Model):  # type: ignore[misc]  # kserve has no types
    """A session behind a queue, under KServe's interface."""

    def __init__(self, name: str, session: Session, batcher: Batcher) -> None:
        super().__init__(name)
        self._session, self._batcher = session, batcher
        self._outputs = [tensor.name for tensor in session.outputs]
        self.ready = True

    def validate(self, payload: protocol.Request) -> protocol.Request:
        """Return the request; its inputs are checked in ``predict``."""
        return payload

    async def predict(self, payload: protocol.Request, headers: Any = None) -> protocol.Answer:
        """Check one request, wait for its turn, and return its outputs."""
        protocol.check_outputs(payload, self._outputs)
        ready = self._session.prepare(payload.inputs, cast=payload.cast)
        return protocol.wanted(payload, await self._batcher.submit(ready))

    def get_input_types(self) -> list[dict[str, Any]]:
        """Return the inputs for the model's metadata; -1 is a size that varies."""
        return [_metadata(tensor) for tensor in self._session.inputs]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Return the outputs likewise."""
        return [_metadata(tensor) for tensor in self._session.outputs]


def _metadata(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": protocol.DATATYPE[tensor.dtype], "shape": protocol.described(tensor.axes)}


def plane_of(model: BundleModel) -> DataPlane:
    """Return KServe's data plane with this model alone."""
    registry = ModelRepository()
    registry.update(model)
    return DataPlane(model_registry=registry)


class Endpoints(V2Endpoints):  # type: ignore[misc]
    """KServe's REST endpoints, with tensors that never become lists, a limit on the body and a deadline."""

    def __init__(self, plane: DataPlane, max_body_bytes: int, deadline_s: float) -> None:
        super().__init__(plane, None)
        self._max_body_bytes, self._deadline_s = max_body_bytes, deadline_s

    async def infer(self, request: HttpRequest, model_name: str) -> Response:
        """Run the model."""
        asked = await self._asked(request)
        async with asyncio.timeout(self._deadline_s):
            answer, _ = await _while_connected(request, self.dataplane.infer(model_name, asked))
        content, head = protocol_rest.to_rest(answer, model_name)
        if head is None:
            return Response(content, media_type="application/json")
        return Response(content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(head)})

    async def _asked(self, request: HttpRequest) -> protocol.Request:
        try:
            async with asyncio.timeout(self._deadline_s):
                body = await self._body(request)
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {self._deadline_s:g} s") from None
        except ClientDisconnect:
            raise HTTPException(GONE, "the client went away before the end of the body") from None
        length = request.headers.get(HEADER_LENGTH)
        if length is None and len(body) > _LARGE_JSON:  # the health probes do not wait for it
            return await asyncio.to_thread(protocol_rest.from_rest, body, None)
        return protocol_rest.from_rest(body, length)

    async def _body(self, request: HttpRequest) -> bytes:
        chunks, size = [], 0
        self._check_size(int(request.headers.get("content-length", "0")))
        async for chunk in request.stream():
            size += len(chunk)
            self._check_size(size)
            chunks.append(chunk)
        return b"".join(chunks)

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise HTTPException(413, f"the body has more than {self._max_body_bytes} bytes, which is the limit here")


async def _while_connected(request: HttpRequest, answer: Coroutine[Any, Any, Any]) -> Any:
    """Return the answer, unless the client goes away first: then its request gives up its place."""
    working, gone = asyncio.create_task(answer), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(GONE, "the client went away before its answer")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    """Add the routes that serve; KServe's others, which load and unload models, are left out."""
    for path, endpoint in {
        "/v2": endpoints.metadata,
        "/v2/health/live": endpoints.live,
        "/v2/health/ready": endpoints.ready,
        "/v2/models": endpoints.models,
        "/v2/models/{model_name}": endpoints.model_metadata,
        "/v2/models/{model_name}/ready": endpoints.model_ready,
        "/metrics": metrics_handler,
    }.items():
        app.add_api_route(path, endpoint, methods=["GET"])
    app.add_api_route("/v2/models/{model_name}/infer", endpoints.infer, methods=["POST"], response_model=None)


class Servicer(InferenceServicer):  # type: ignore[misc]
    """KServe's gRPC service, with tensors that share the message's memory, and a deadline."""

    def __init__(self, plane: DataPlane, deadline_s: float) -> None:
        super().__init__(plane, None)
        self._deadline_s = deadline_s

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802  (the protocol's name)
        """Run the model."""
        if request.model_version not in ("", VERSION):
            raise ModelNotFound(f"{request.model_name}, version {request.model_version}")
        async with asyncio.timeout(self._deadline_s):
            answer, _ = await self._data_plane.infer(request.model_name, protocol.from_grpc(request))
        tensor = pb.ModelInferResponse.InferOutputTensor
        return pb.ModelInferResponse(
            model_name=request.model_name,
            id=request.id,
            outputs=[
                tensor(name=name, datatype=protocol.DATATYPE[array.dtype.name], shape=array.shape)
                for name, array in answer.outputs.items()
            ],
            raw_output_contents=[array.tobytes() for array in answer.outputs.values()],
        )

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refuse: one server, one bundle."""
        raise NotImplementedError("this server has one bundle, and keeps it")

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refuse likewise."""
        raise NotImplementedError("this server has one bundle, and keeps it")
