"""Clients that mean harm, or are broken: silent, slow, many, or with 50 kB wherever a word is expected."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import hostile
import pytest
from grpc_health.v1 import health_pb2
from support.requests import INFER, by_grpc, make, metrics, request
from support.servers import BCA, PATIENCE_S, Server, bca_serve, held, holding, until
from tritonclient.grpc import service_pb2 as pb

from bca_deploy.bundle.read import Bundle

TOKEN = "open-sesame"  # noqa: S105
LONG = "x" * 50_000
SERVICE = "/inference.GRPCInferenceService"


def connected(server: Server, source: str = "127.0.0.1") -> socket.socket:
    host, port = server.http.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S, source_address=(source, 0))


def said(client: socket.socket) -> bytes:
    """What the server says until it closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(65536):
            found += data
    return found


def impatient(more: str = "") -> tuple[str, ...]:
    """`bca serve` with little time for headers."""
    return (*BCA[:2], f"from bca_deploy.serving import rest_server as r; r.HEADERS_S = 0.5; {more}\n{BCA[2]}")


# ---- every label and every field of the log: who says what stands there, and that it is short


#: Of every metric: what the label may be.
LABELS: dict[str, Callable[[str], bool]] = {
    "kind": {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other", "grpc"}.__contains__,
    "status": lambda value: bool(re.fullmatch(r"\d{3}|closed|[A-Z_]{2,20}", value)),
    "model": "bca".__eq__,
    "model_name": "bca".__eq__,
    "le": lambda value: len(value) < 20,
    **dict.fromkeys(("implementation", "major", "minor", "patchlevel", "version", "generation"), lambda value: len(value) < 20),
}
#: Of a line of the access log: when, peer, kind, path or method, status, time.
LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (127\.0\.0\.1|ipv4:127\.0\.0\.1:\d+) "
    r"[A-Za-z]{3,7} \S{1,203} [A-Z_a-z0-9]{2,20} \d+\.\d ms"
)


def rest_messages(authorization: str) -> Iterator[bytes]:
    """50 kB in every place of a REST request that a client fills."""

    def message(method: str = "POST", path: str = INFER, headers: str = "", body: object = None) -> bytes:
        content = b"" if body is None else json.dumps(body).encode()
        lines = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{authorization}{headers}Content-Length: {len(content)}\r\n"
        return f"{lines}Connection: close\r\n\r\n".encode() + content

    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    yield message(method="M" + LONG)
    yield message(method="GET", path="/" + LONG)
    yield message(method="GET", path="/v2/models/" + LONG)
    yield message(method="GET", path=f"/v2/models/bca/versions/{LONG}")
    yield message(method="GET", path="/v2/health/live?" + LONG)
    yield message(method="GET", path="/metrics?name[]=" + LONG)
    for header in ("X-Forwarded-For", "Host", "Accept", "Content-Encoding", "Inference-Header-Content-Length", LONG):
        yield message(headers=f"{header}: {LONG}\r\n", body={})
        yield message(method="GET", path="/metrics", headers=f"{header}: {LONG}\r\n")
    yield message(body={"id": LONG, "inputs": [tensor]})
    yield message(body={"inputs": [tensor | {"name": LONG}]})
    yield message(body={"inputs": [tensor | {"datatype": LONG}]})
    yield message(body={"inputs": [tensor | {"data": [LONG]}]})
    yield message(body={"inputs": [tensor], "outputs": [{"name": LONG}]})
    yield message(body={LONG: LONG, "inputs": LONG})
    yield f"GET / {LONG}\r\n\r\n".encode()
    yield LONG.encode() + b"\r\n\r\n"


def grpc_calls(channel: grpc.Channel, token: str | None) -> Iterator[None]:
    """The same over gRPC."""
    metadata = [("authorization", f"Bearer {token}")] if token else []

    def call(path: str, message: bytes, more: tuple[str, str] | None = None) -> None:
        with contextlib.suppress(grpc.RpcError):
            channel.unary_unary(path)(message, metadata=[*metadata, *([more] if more else [])], timeout=PATIENCE_S)

    good = pb.ModelInferRequest(model_name="bca")
    for path in (f"{SERVICE}/{LONG[:3000]}", f"/{LONG[:3000]}/ModelInfer", f"/{LONG}/{LONG}"):  # headers hold no more
        yield call(path, good.SerializeToString())
    yield call(f"{SERVICE}/ModelInfer", good.SerializeToString(), ("x-long", LONG))
    yield call(f"{SERVICE}/ModelInfer", good.SerializeToString(), ("authorization", LONG[:3000]))
    for changed in (
        pb.ModelInferRequest(model_name=LONG),
        pb.ModelInferRequest(model_name="bca", model_version=LONG),
        pb.ModelInferRequest(model_name="bca", id=LONG),
        pb.ModelInferRequest(model_name="bca", inputs=[pb.ModelInferRequest.InferInputTensor(name=LONG)]),
        pb.ModelInferRequest(model_name="bca", inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype=LONG)]),
        pb.ModelInferRequest(model_name="bca", outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=LONG)]),
    ):
        yield call(f"{SERVICE}/ModelInfer", changed.SerializeToString())
    yield call(f"{SERVICE}/ModelReady", pb.ModelReadyRequest(name=LONG, version=LONG).SerializeToString())
    yield call(f"{SERVICE}/ModelMetadata", pb.ModelMetadataRequest(name=LONG).SerializeToString())
    yield call(f"{SERVICE}/RepositoryModelLoad", LONG.encode())
    for method in ("Check", "Watch"):
        yield call(f"/grpc.health.v1.Health/{method}", health_pb2.HealthCheckRequest(service=LONG).SerializeToString())


@pytest.mark.parametrize("token", [None, TOKEN], ids=["refused", "let in"])
def test_fifty_kilobytes_in_any_place_are_in_no_label_and_no_field_of_the_log(
    exported: Bundle, tmp_path: Path, token: str | None
) -> None:
    with bca_serve(exported.directory, tmp_path / "log", env={"BCA_TOKEN": TOKEN}) as server:
        for message in rest_messages(f"Authorization: Bearer {token or LONG}\r\n"):
            with connected(server) as client, contextlib.suppress(ConnectionError):
                client.sendall(message)
                said(client)
        with grpc.insecure_channel(server.grpc) as channel:
            calls = list(grpc_calls(channel, token))
        text = server.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
        assert server.get("/v2/health/ready").status_code == 200
    assert len(calls) == 16
    found = re.findall(r'(\w+)="([^"]*)"', text)
    assert {name for name, _ in found} <= LABELS.keys()
    assert [(name, value[:60]) for name, value in found if not LABELS[name](value)] == []
    assert len(text) < 30_000
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert [line[:300] for line in lines if not LINE.fullmatch(line)] == []
    assert any(" other " in line for line in lines)
    assert any(" grpc other " in line for line in lines)


# ---- connections that say nothing, or not enough


def test_silent_connections_are_harmless_and_closed(exported: Bundle, tmp_path: Path) -> None:
    with (
        bca_serve(exported.directory, tmp_path / "log", program=impatient()) as server,
        contextlib.ExitStack() as stack,
    ):
        silent = [stack.enter_context(connected(server, f"127.0.0.{1 + index % 50}")) for index in range(1100)]
        assert server.get("/v2/health/live").status_code == 200
        assert server.get("/v2/health/ready").status_code == 200
        assert len(by_grpc(server, make(1, 4, 3))) == 2
        body, headers = request(make(1, 4, 3))
        assert server.post(INFER, content=body, headers=headers).status_code == 200
        assert {said(client) for client in silent} == {b""}, "closed, with nothing to say"


@pytest.mark.parametrize(
    ("sent", "drip"),
    [(b"GET /v2 HTTP/1.1\r\nHo", b"o"), (b"GET /v2 HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n")],
    ids=["in a line", "line by line"],
)
def test_headers_that_come_slowly_are_cut_off_on_new_connections_and_on_used_ones(
    exported: Bundle, tmp_path: Path, sent: bytes, drip: bytes
) -> None:
    with bca_serve(exported.directory, tmp_path / "log", program=impatient()) as server:
        for before in (b"", b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"):
            with connected(server) as client:
                if before:
                    client.sendall(before)
                    assert b" 200 " in client.recv(65536)
                client.sendall(sent)
                with contextlib.suppress(ConnectionError):
                    for _ in range(60):
                        client.sendall(drip)
                        time.sleep(0.05)
                assert said(client).startswith((b"HTTP/1.1 408 ", b""))
        until(lambda: server.log.read_text(encoding="utf-8").count(" other - 408 ") == 2)


def test_a_body_that_comes_slowly_is_cut_off_though_its_request_was_answered(exported: Bundle, tmp_path: Path) -> None:
    after = "r._AFTER_S = 0.1"
    options = ("--deadline-s", "1")
    log = tmp_path / "log"
    with bca_serve(exported.directory, log, *options, env={"BCA_TOKEN": TOKEN}, program=impatient(after)) as server:
        for path in (INFER, "/nothing"):
            with connected(server) as client:
                client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode())
                assert said(client).startswith(b"HTTP/1.1 401 ")
        with connected(server) as client:
            authorization = f"Authorization: Bearer {TOKEN}"
            client.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{authorization}\r\nContent-Length: 100\r\n\r\n".encode())
            assert said(client).startswith(b"HTTP/1.1 408 ")


def test_an_answer_that_nobody_takes_is_held_in_its_place_and_let_go(exported: Bundle, tmp_path: Path) -> None:
    few = """
listen = r.listen
def with_little_room(*where):
    found = listen(*where)
    found.setsockopt(1, 7, 65536)  # SO_SNDBUF: else the kernel holds the whole answer
    return found
r.listen = with_little_room
"""
    body, headers = request(make(8, 2048, 2048))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    log, program = tmp_path / "log", (*BCA[:2], f"from bca_deploy.serving import rest_server as r{few}{BCA[2]}")
    with bca_serve(exported.directory, log, "--deadline-s", "20", program=program) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.http.rsplit(":", 1)
        client.connect((host, int(port)))
        client.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: metrics(server)["bca_in_flight_bytes"] > 1.5 * len(body))
        until(lambda: metrics(server)["bca_in_flight_bytes"] == 0)
        until(lambda: f"POST {INFER} 200" in server.log.read_text(encoding="utf-8"))


def test_more_connections_than_a_peer_may_have_are_closed_and_by_default_it_may_have_any(
    exported: Bundle, tmp_path: Path
) -> None:
    with (
        bca_serve(exported.directory, tmp_path / "log", "--max-connections-per-peer", "5") as server,
        contextlib.ExitStack() as stack,
    ):
        kept = [stack.enter_context(connected(server, "127.0.0.2")) for _ in range(5)]
        with connected(server, "127.0.0.2") as sixth:
            assert said(sixth) == b""
        assert server.get("/v2/health/live").status_code == 200, "another peer"
        kept[0].close()

        def again() -> bool:
            with connected(server, "127.0.0.2") as client:
                with contextlib.suppress(ConnectionError):
                    client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                return b" 200 " in said(client)

        until(again)


def test_where_connections_run_out_the_longest_silent_one_makes_room(exported: Bundle, tmp_path: Path) -> None:
    few = "r.HEADERS_S = 600; r.most_connections = lambda: 20"
    with (
        bca_serve(exported.directory, tmp_path / "log", program=impatient(few)) as server,
        contextlib.ExitStack() as stack,
    ):
        silent = [stack.enter_context(connected(server)) for _ in range(20)]
        assert server.get("/v2/health/ready").status_code == 200
        assert said(silent[0]) == b""
        silent[-1].sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b" 200 " in said(silent[-1])


def test_silent_grpc_calls_hold_up_nobody(exported: Bundle, tmp_path: Path) -> None:
    ended = threading.Event()

    def nothing() -> Iterator[bytes]:
        ended.wait()
        yield from ()

    methods = (f"{SERVICE}/ModelInfer", f"{SERVICE}/ModelMetadata", "/grpc.health.v1.Health/Check")
    with bca_serve(exported.directory, tmp_path / "log") as server, grpc.insecure_channel(server.grpc) as channel:
        try:
            for method in methods:
                for _ in range(40):
                    channel.stream_unary(method).future(nothing())
            assert len(by_grpc(server, make(1, 4, 3))) == 2
            assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=PATIENCE_S)
        finally:
            ended.set()


# ---- bytes and requests


def test_bytes_in_flight_are_bounded_on_both_protocols_and_probes_answer(exported: Bundle, tmp_path: Path) -> None:
    inputs = make(8, 1600, 1600)
    body, headers = request(inputs)
    assert 2**20 < len(body) < 3 * 2**20
    options = ("--max-in-flight-mib", "5", "--max-body-mib", "3")
    log = tmp_path / "log"
    with (
        bca_serve(exported.directory, log, *options, program=held(log)) as server,
        grpc.insecure_channel(server.grpc) as channel,
        ThreadPoolExecutor(12) as pool,
    ):
        call, sent = channel.unary_unary(f"{SERVICE}/ModelInfer"), large_message(inputs)

        def over_grpc() -> str:
            try:
                call(sent, timeout=PATIENCE_S)
            except grpc.RpcError as error:
                return f"{error.code().name}: {error.details()}"
            return "OK"

        with holding(server):
            rest = [pool.submit(server.post, INFER, content=body, headers=headers) for _ in range(6)]
            until(lambda: sum(one.done() for one in rest) >= 4)
            assert "RESOURCE_EXHAUSTED: requests and answers of" in over_grpc()
            assert metrics(server)["bca_in_flight_bytes"] <= 5 * 2**20
            assert server.get("/v2/health/ready").status_code == 200
            assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=PATIENCE_S)
        answers = [one.result() for one in rest]
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert "and this server holds 5242880; try again later, or on another replica" in refused.json()["error"]
        assert refused.headers["retry-after"] == "1"
        until(lambda: metrics(server)["bca_in_flight_bytes"] == 0)
        assert over_grpc() == "OK"
        until(lambda: metrics(server)["bca_in_flight_requests"] == 1)  # the one that asks


def large_message(inputs: "hostile.Inputs") -> bytes:
    message = pb.ModelInferRequest(model_name="bca", raw_input_contents=[array.tobytes() for array in inputs.values()])
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype="BOOL" if array.dtype == bool else "FP32", shape=array.shape)
    return bytes(message.SerializeToString())


def test_requests_beyond_the_most_are_refused_and_probes_are_not(exported: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = (*BCA[:2], f"from bca_deploy.serving import server; server.MOST_REQUESTS = 2\n{held(log)[2]}")
    body, headers = request(make(1, 4, 3))
    with bca_serve(exported.directory, log, program=program) as server, ThreadPoolExecutor(2) as pool:
        with holding(server):
            calls = [pool.submit(server.post, INFER, content=body, headers=headers) for _ in range(2)]
            until(lambda: server.get("/v2/models/bca").status_code == 429)
            assert server.get("/v2/health/live").status_code == 200
            with grpc.insecure_channel(server.grpc) as channel:
                assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=PATIENCE_S)
        assert {call.result().status_code for call in calls} == {200}


def test_a_small_attack_leaves_the_probes_answering_and_every_no_is_the_protocols(exported: Bundle, tmp_path: Path) -> None:
    with bca_serve(exported.directory, tmp_path / "log") as server:
        found = hostile.attack(server, make(1, 2048, 2048), hostile.QUICK)
        assert found.faults(memory=False) == []
        assert found.probes > 3
        assert found.statuses["200"] + found.statuses["OK"] > 0
        text = server.get("/metrics").text
    assert len(text) < 30_000
