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
from kserve.protocol.rest.v2_datamodels import ModelMetadataResponse, ModelReadyResponse
from kserve.protocol.rest.v2_endpoints import V2Endpoints
from starlette.requests import ClientDisconnect

from bca_deploy import __version__
from bca_deploy.serving import protocol, protocol_rest
from bca_deploy.serving.flight import Place, end_now
from bca_deploy.serving.queue import Batcher
from bca_deploy.session.session import Session

HEADER_LENGTH = "Inference-Header-Content-Length"
#: Of the protocol, as other servers name them.
EXTENSIONS = ["binary_tensor_data"]
#: What servers of the protocol call the project and the format behind a backend.
_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan", "rtx": "tensorrt_rtx_plan"}
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

    @property
    def platform(self) -> str:
        """What runs the model, in the words that servers of the protocol share: a project, and its format."""
        return _PLATFORMS.get(self._session.explain().chosen.split("-")[0].split(",")[0], "")

    def get_input_types(self) -> list[dict[str, Any]]:
        """Return the inputs for the model's metadata; -1 is a size that varies."""
        return [_metadata(tensor) for tensor in self._session.inputs]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Return the outputs likewise."""
        return [_metadata(tensor) for tensor in self._session.outputs]


def _metadata(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": protocol.DATATYPE[tensor.dtype], "shape": protocol.described(tensor.axes)}


class Plane(DataPlane):  # type: ignore[misc]
    """KServe's data plane with one model, in one version."""

    def __init__(self, model: BundleModel) -> None:
        registry = ModelRepository()
        registry.update(model)
        super().__init__(model_registry=registry)
        self._model = model

    def metadata(self) -> dict[str, Any]:
        """Return what the server is, and which extensions of the protocol are there."""
        return {"name": "bca", "version": __version__, "extensions": EXTENSIONS}

    async def model_metadata(self, model_name: str, version: str | None = None) -> dict[str, Any]:
        """Return what the model takes and gives."""
        self.check(model_name, version)
        found: dict[str, Any] = await super().model_metadata(model_name)
        return found | {"versions": [protocol.VERSION], "platform": self._model.platform}

    def check(self, model_name: str, version: str | None) -> None:
        """Refuse a model or a version that is not there; none is any.

        Raises:
            ModelNotFound: it is not.
        """
        self.get_model_from_registry(model_name)
        if version not in (None, "", protocol.VERSION):
            raise ModelNotFound(f"{model_name}, version {version}")


class Endpoints(V2Endpoints):  # type: ignore[misc]
    """KServe's REST endpoints, with tensors that never become lists, a limit on the body and a deadline."""

    def __init__(self, plane: Plane, max_body_bytes: int, deadline_s: float) -> None:
        super().__init__(plane, None)
        self._max_body_bytes, self._deadline_s = max_body_bytes, deadline_s

    async def model_metadata(self, model_name: str, model_version: str | None = None) -> ModelMetadataResponse:
        """Say what the model takes and gives."""
        return ModelMetadataResponse.model_validate(await self.dataplane.model_metadata(model_name, model_version))

    async def model_ready(self, model_name: str, model_version: str | None = None) -> ModelReadyResponse:
        """Say whether the model is ready."""
        self.dataplane.check(model_name, model_version)
        return await super().model_ready(model_name)

    async def infer(self, request: HttpRequest, model_name: str, model_version: str | None = None) -> Response:
        """Run the model."""
        self.dataplane.check(model_name, model_version)
        asked = await self._asked(request)
        async with asyncio.timeout(self._deadline_s):
            answer, _ = await _while_connected(request, self.dataplane.infer(model_name, asked))
        content, head = protocol_rest.to_rest(answer, model_name)
        if head is None:
            return Response(content, media_type="application/json")
        return Response(content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(head)})

    async def _asked(self, request: HttpRequest) -> protocol.Request:
        coding = request.headers.get("content-encoding", "identity")
        if coding.lower() not in ("", "identity"):  # a few bytes would become any number
            raise HTTPException(415, f"Content-Encoding {coding[:40]!r} is not taken here; send the body as it is")
        place: Place = request.scope["place"]
        try:
            async with asyncio.timeout(self._deadline_s) as limit:
                with place.arriving(lambda: end_now(limit)):
                    body = await self._body(request, place)
        except TimeoutError:
            place.check(0)  # it may have been ended for others
            raise HTTPException(408, f"the body did not arrive within {self._deadline_s:g} s") from None
        except ClientDisconnect:
            raise HTTPException(GONE, "the client went away before the end of the body") from None
        length = request.headers.get(HEADER_LENGTH)
        if length is None and len(body) > _LARGE_JSON:  # the health probes do not wait for it
            return await asyncio.to_thread(protocol_rest.from_rest, body, None)
        return protocol_rest.from_rest(body, length)

    async def _body(self, request: HttpRequest, place: Place) -> bytearray:
        body, length = bytearray(), int(request.headers.get("content-length", "0"))
        self._check_size(length)
        place.check(length)
        async for chunk in request.stream():  # what has come counts, not what was promised: promises cost a client nothing
            self._check_size(len(body) + len(chunk))
            place.take(len(chunk))
            body += chunk
        return body

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
    model = "/v2/models/{model_name}"
    version = f"{model}/versions/{{model_version}}"
    for path, endpoint in {
        "/v2": endpoints.metadata,
        "/v2/health/live": endpoints.live,
        "/v2/health/ready": endpoints.ready,
        "/v2/models": endpoints.models,
        model: endpoints.model_metadata,
        version: endpoints.model_metadata,
        f"{model}/ready": endpoints.model_ready,
        f"{version}/ready": endpoints.model_ready,
        "/metrics": metrics_handler,
    }.items():
        app.add_api_route(path, endpoint, methods=["GET", "HEAD"])
    for path in (f"{model}/infer", f"{version}/infer"):
        app.add_api_route(path, endpoints.infer, methods=["POST"], response_model=None)


class Servicer(InferenceServicer):  # type: ignore[misc]
    """KServe's gRPC service, with tensors that share the message's memory, and a deadline."""

    def __init__(self, plane: Plane, deadline_s: float) -> None:
        super().__init__(plane, None)
        self._deadline_s = deadline_s

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802  (the protocol's names)
        """Say whether the model is ready."""
        self._data_plane.check(request.name, request.version)
        return await super().ModelReady(request, context)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Say what the model takes and gives."""
        return pb.ModelMetadataResponse(**await self._data_plane.model_metadata(request.name, request.version))

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Run the model."""
        self._data_plane.check(request.model_name, request.model_version)
        async with asyncio.timeout(self._deadline_s):
            answer, _ = await self._data_plane.infer(request.model_name, protocol.from_grpc(request))
        tensor = pb.ModelInferResponse.InferOutputTensor
        return pb.ModelInferResponse(
            model_name=request.model_name,
            model_version=protocol.VERSION,
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
