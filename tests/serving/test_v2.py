"""The Open Inference Protocol in detail: versions, metadata, health, reflection, and HTTP's own rules."""

import contextlib
import gzip
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.requests import INFER, make, request
from support.servers import BCA, PATIENCE_S, Server, bca_serve
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from bca_deploy import __version__
from bca_deploy.bundle.read import Bundle

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def channel(served: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.grpc) as opened:
        yield opened


@pytest.fixture(scope="module")
def closed(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a token."""
    log = tmp_path_factory.mktemp("closed") / "log"
    with bca_serve(exported.directory, log, env={"BCA_TOKEN": "open-sesame"}) as server:
        yield server


def refused(call: Any, message: Any) -> str:
    with pytest.raises(grpc.RpcError) as error:
        call(message, timeout=PATIENCE_S)
    found: Any = error.value
    return str(found.code().name)


def test_a_version_may_be_named_in_the_path(served: Server) -> None:
    versioned = "/v2/models/bca/versions/1"
    assert served.get(versioned).json() == served.get("/v2/models/bca").json()
    assert served.get(f"{versioned}/ready").json() == {"name": "bca", "ready": True}
    body, headers = request(make(1, 4, 3))
    answer, plain = (served.post(path, content=body, headers=headers) for path in (f"{versioned}/infer", INFER))
    assert answer.status_code == 200
    assert answer.content == plain.content
    head = json.loads(answer.content[: int(answer.headers["Inference-Header-Content-Length"])])
    assert head["model_version"] == "1"


@pytest.mark.parametrize("version", ["7", "01", "1.0", "latest"])
def test_a_version_that_is_not_there_is_not_found_in_every_call(served: Server, channel: grpc.Channel, version: str) -> None:
    for path in ("", "/ready"):
        answer = served.get(f"/v2/models/bca/versions/{version}{path}")
        assert answer.status_code == 404
        assert f"bca, version {version}" in answer.json()["error"]
    assert served.post(f"/v2/models/bca/versions/{version}/infer", json={"inputs": []}).status_code == 404
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    assert refused(stub.ModelReady, pb.ModelReadyRequest(name="bca", version=version)) == "NOT_FOUND"
    assert refused(stub.ModelMetadata, pb.ModelMetadataRequest(name="bca", version=version)) == "NOT_FOUND"
    assert refused(stub.ModelInfer, pb.ModelInferRequest(model_name="bca", model_version=version)) == "NOT_FOUND"


def test_a_model_that_is_not_there_is_not_found_before_its_version(channel: grpc.Channel) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    assert refused(stub.ModelReady, pb.ModelReadyRequest(name="other")) == "NOT_FOUND"
    assert refused(stub.ModelReady, pb.ModelReadyRequest(name="other", version="1")) == "NOT_FOUND"


def test_the_metadata_say_what_is_there(served: Server, channel: grpc.Channel) -> None:
    about = {"name": "bca", "version": __version__, "extensions": ["binary_tensor_data"]}
    assert served.get("/v2").json() == about
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    found = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (found.name, found.version, list(found.extensions)) == tuple(about.values())
    described = served.get("/v2/models/bca").json()
    assert (described["versions"], described["platform"]) == (["1"], "onnxruntime_onnx")
    model = stub.ModelMetadata(pb.ModelMetadataRequest(name="bca"))
    assert (list(model.versions), model.platform) == (["1"], "onnxruntime_onnx")
    assert [tensor.name for tensor in model.inputs] == [tensor["name"] for tensor in described["inputs"]]


def test_head_is_get_without_a_body(served: Server) -> None:
    import httpx

    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/bca", "/v2/models/bca/ready", "/metrics"):
        answer = httpx.head(f"http://{served.http}{path}", timeout=PATIENCE_S)
        assert (answer.status_code, answer.content) == (200, b"")
        assert int(answer.headers["content-length"]) > 0
    assert sorted(served.post("/v2").headers["allow"].split(", ")) == ["GET", "HEAD"]


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, identity"])
def test_a_body_that_is_coded_is_refused_as_such(served: Server, coding: str) -> None:
    body, headers = request(make(1, 4, 3))
    answer = served.post(INFER, content=gzip.compress(body), headers=headers | {"Content-Encoding": coding})
    assert answer.status_code == 415
    assert answer.headers["accept-encoding"] == "identity"
    assert answer.json() == {"error": f"Content-Encoding {coding!r} is not taken here; send the body as it is"}
    assert served.post(INFER, content=body, headers=headers | {"Content-Encoding": "identity"}).status_code == 200


def test_a_request_with_two_lengths_is_refused_and_its_connection_closed(served: Server) -> None:
    host, port = served.http.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as client:
        lines = f"POST {INFER} HTTP/1.1", "Host: x", "Content-Length: 5", "Transfer-Encoding: chunked", "", "0", "", ""
        client.sendall("\r\n".join(lines).encode())
        found = b""
        while data := client.recv(65536):
            found += data
    assert found.startswith(b"HTTP/1.1 400 ")
    assert b"both Transfer-Encoding and Content-Length" in found


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_schemes_name_is_of_any_case(closed: Server, scheme: str) -> None:
    assert closed.get("/v2", headers={"Authorization": f"{scheme} open-sesame"}).status_code == 200
    with grpc.insecure_channel(closed.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata")
        assert call(b"", metadata=[("authorization", f"{scheme} open-sesame")], timeout=PATIENCE_S)


@pytest.mark.parametrize("value", ["Basic open-sesame", "open-sesame", "Bearer open-sesame x", "Bearer OPEN-SESAME"])
def test_another_scheme_or_word_is_no_token(closed: Server, value: str) -> None:
    assert closed.get("/v2", headers={"Authorization": value}).status_code == 401


def test_grpcs_own_health_service_answers_with_a_token_and_without(served: Server, closed: Server) -> None:
    for server in (served, closed):
        with grpc.insecure_channel(server.grpc) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "inference.GRPCInferenceService"):
                answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S)
                assert answer.status == SERVING
            assert refused(stub.Check, health_pb2.HealthCheckRequest(service="other")) == "NOT_FOUND"


def test_health_may_be_watched_and_the_watch_ends_with_the_server(exported: Bundle, tmp_path: Path) -> None:
    with bca_serve(exported.directory, tmp_path / "log") as server, grpc.insecure_channel(server.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        assert server.stop() == 0, "it does not wait for streams"
        with contextlib.suppress(grpc.RpcError):
            assert [answer.status for answer in watch] in ([], [health_pb2.HealthCheckResponse.NOT_SERVING])
        assert "Traceback" not in server.log.read_text(encoding="utf-8")


def test_reflection_tells_the_methods_and_not_where_a_token_is_set(served: Server, closed: Server) -> None:
    with grpc.insecure_channel(served.grpc) as channel:
        known = ProtoReflectionDescriptorDatabase(channel)
        services = set(known.get_services())
        assert services == {
            "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", "inference.GRPCInferenceService"
        }  # fmt: skip
        service = DescriptorPool(known).FindServiceByName("inference.GRPCInferenceService")
        assert "ModelInfer" in service.methods_by_name
    with grpc.insecure_channel(closed.grpc) as channel, pytest.raises(grpc.RpcError) as error:
        ProtoReflectionDescriptorDatabase(channel).get_services()
    found: Any = error.value
    assert found.code() == grpc.StatusCode.UNAUTHENTICATED
    with grpc.insecure_channel(closed.grpc) as channel:
        call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError, match="no such method"):
            next(call(iter([b""]), metadata=[("authorization", "Bearer open-sesame")]))


def test_a_method_that_is_not_there_is_unimplemented(served: Server, channel: grpc.Channel) -> None:
    for path in ("/inference.GRPCInferenceService/Other", "/other.Service/ModelInfer", "/other"):
        assert refused(channel.unary_unary(path), b"") == "UNIMPLEMENTED"


def test_a_message_too_large_to_ask_with_is_refused(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
    assert refused(call, bytes(5000)) == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--grace-s", "inf"), "grace_s is inf; allowed 0 to 86400"),
        (("--grace-s", "nan"), "Input should be greater than or equal to 0"),
        (("--deadline-s", "inf"), "deadline_s is inf; allowed 0 to 86400"),
        (("--deadline-s", "nan"), "Input should be greater than or equal to 0.001"),
        (("--max-delay-ms", "inf"), "max_delay_ms is inf; allowed 0 to 60000"),
        (("--threads", "100000"), "Input should be less than or equal to 1024"),
        (("--host", "a..b"), "a..b port 0 cannot be listened on"),
        (("--host", "a\x01b"), "cannot be listened on"),
        (("--host", "x" * 5000), "cannot be listened on"),
        (("--max-body-mib", str(10**30), "--max-in-flight-mib", "1"), "--max-in-flight-mib is 1, and one request may have"),
        (("--max-body-mib", "2", "--max-in-flight-mib", "1"), "2.0 MiB; raise it, or give a smaller --max-body-mib"),
    ],
    ids=lambda value: ascii(" ".join(value))[1:40] if isinstance(value, tuple) else "",
)
def test_what_an_option_cannot_be_is_said_in_a_sentence(exported: Bundle, options: tuple[str, ...], message: str) -> None:
    done = serve(exported, *options)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [b"\xff\xfe", "Schlüssel".encode(), b"a b", b"a\x00b", b"x" * 5000, b""])
def test_a_file_that_holds_no_token_is_refused(exported: Bundle, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    done = serve(exported, "--token-file", str(tmp_path / "token"))
    assert done.returncode == 2, done.stderr
    assert "must be one word of ASCII characters, at most 4096; write a new one" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_is_no_token(exported: Bundle, tmp_path: Path) -> None:
    done = serve(exported, "--token-file", str(tmp_path))
    assert (done.returncode, "Is a directory" in done.stderr) == (2, True)


def serve(bundle: Bundle, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [*BCA, "serve", str(bundle.directory), "--http-port", "0", "--grpc-port", "0", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
