"""What goes wrong in production: overload, slow and broken clients, stops and kills, requests that make no sense."""

import contextlib
import itertools
import json
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.requests import INFER, make, metrics, request
from support.servers import BCA, PATIENCE_S, Server, bca_serve, free_ports, held, holding, until
from tritonclient.grpc import service_pb2 as pb

from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import BcaError, ServerError
from bca_deploy.serving.client import RemoteSession


@pytest.fixture(scope="module")
def large_request() -> dict[str, np.ndarray]:
    """The largest that the bundle takes."""
    return make(8, 2048, 2048)


@pytest.fixture(scope="module")
def narrow(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One request in a batch, two batches at once, and one request may wait; it can be held."""
    log = tmp_path_factory.mktemp("narrow") / "log"
    with bca_serve(exported.directory, log, "--max-batch", "1", "--max-queue", "1", program=held(log)) as server:
        yield server


def all_but_three(calls: "list[Future[Any]]") -> bool:
    """Whether the narrow server has answered all requests that it has no place for."""
    return sum(call.done() for call in calls) >= len(calls) - 3


def test_overload_is_refused_with_429_and_the_server_recovers(narrow: Server) -> None:
    body, headers = request(make(1, 4, 3))
    with ThreadPoolExecutor(8) as pool, holding(narrow):
        calls = [pool.submit(narrow.post, INFER, content=body, headers=headers) for _ in range(8)]
        until(lambda: all_but_three(calls))
    answers = [call.result() for call in calls]
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"].startswith("1 requests are waiting, and the queue takes 1; try again later")
    assert metrics(narrow)["bca_queue_refused_total"] >= statuses.count(429)
    assert narrow.post(INFER, content=body, headers=headers).status_code == 200


def test_overload_over_grpc_is_resource_exhausted(narrow: Server) -> None:
    with RemoteSession(f"grpc://{narrow.grpc}", deadline_s=PATIENCE_S) as remote:
        with ThreadPoolExecutor(8) as pool, holding(narrow):
            calls = [pool.submit(remote.run, make(1, 4, 3)) for _ in range(8)]
            until(lambda: all_but_three(calls))
        errors = [error for call in calls if (error := call.exception()) is not None]
        assert 5 <= len(errors) < 8
        for error in errors:
            assert isinstance(error, ServerError)
            assert "the server is busy" in str(error)
        assert len(remote.run(make(1, 4, 3))) == 2


def test_a_request_that_does_not_get_its_turn_in_time_is_given_up(exported: Bundle, tmp_path: Path) -> None:
    body, headers = request(make(1, 4, 3))
    options = ("--deadline-s", "1", "--max-batch", "1")
    with (
        bca_serve(exported.directory, tmp_path / "log", *options, program=held(tmp_path / "log")) as server,
        RemoteSession(f"grpc://{server.grpc}", deadline_s=PATIENCE_S) as remote,
    ):

        def late() -> bool:  # on a busy machine it may be refused for the body's arrival instead
            return server.post(INFER, content=body, headers=headers).status_code == 504

        with holding(server):
            for _ in range(3):  # two of them at work, as far as the server goes
                until(late)
            until(lambda: "not answered before the server's deadline" in refusal(remote))
            until(lambda: metrics(server)["bca_queue_depth"] == 0)
        until(lambda: refusal(remote) == "")


def refusal(remote: RemoteSession) -> str:
    """What the server says to a request, nothing where it answers."""
    try:
        remote.run(make(1, 4, 3))
    except ServerError as error:
        return str(error)
    return ""


def test_the_clients_own_deadline_holds(narrow: Server) -> None:
    with RemoteSession(f"grpc://{narrow.grpc}", deadline_s=0.5) as impatient:
        until(lambda: refusal(impatient) == "")  # it is connected
        with holding(narrow):
            assert re.search(r"no answer within 0\.5 s .*; raise deadline_s", refusal(impatient))
        until(lambda: refusal(impatient) == "")


def connected(server: Server) -> socket.socket:
    host, port = server.http.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def head(length: int) -> bytes:
    return f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def begun(server: Server, stack: contextlib.ExitStack) -> socket.socket:
    """A request whose body does not come."""
    client = stack.enter_context(connected(server))
    client.sendall(head(1000) + b'{"inp')
    return client


def test_clients_that_send_slowly_block_nobody(served: Server) -> None:
    with contextlib.ExitStack() as stack:
        slow = [begun(served, stack) for _ in range(20)]
        body, headers = request(make(1, 4, 3))
        assert served.post(INFER, content=body, headers=headers).status_code == 200
        for client in slow:
            client.setblocking(False)
            with pytest.raises(BlockingIOError):  # the server still waits for this one
                client.recv(1)


def test_a_client_that_sends_slowly_is_cut_off(exported: Bundle, tmp_path: Path) -> None:
    with bca_serve(exported.directory, tmp_path / "log", "--deadline-s", "1") as server:
        with contextlib.ExitStack() as stack:
            for client in [begun(server, stack) for _ in range(20)]:
                assert b" 408 " in client.recv(100).split(b"\r\n")[0]
        body, headers = request(make(1, 4, 3))
        until(lambda: server.post(INFER, content=body, headers=headers).status_code == 200)


def test_a_client_that_reads_slowly_blocks_nobody(served: Server, large_request: dict[str, np.ndarray]) -> None:
    body, headers = request(large_request)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(connected(served))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        for _ in range(5):
            small, headers = request(make(1, 4, 3))
            assert served.post(INFER, content=small, headers=headers).status_code == 200
    until(lambda: metrics(served)["bca_queue_depth"] == 0)


def test_a_body_that_breaks_off_is_no_request_and_the_next_one_works(served: Server) -> None:
    body, headers = request(make(1, 4, 3))
    for sent in (b"", body[:10], body[:-1]):
        with connected(served) as client:
            client.sendall(head(len(body)) + sent)
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(100)
        assert answer == b"" or b" 4" in answer.split(b"\r\n")[0]
        assert served.post(INFER, content=body, headers=headers).status_code == 200
    assert "Traceback" not in served.log.read_text(encoding="utf-8")


def test_a_rest_client_that_goes_away_gives_up_its_place(narrow: Server) -> None:
    body, headers = request(make(1, 4, 3))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    sent = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with ThreadPoolExecutor(2) as pool, holding(narrow):
        before, busy = arrived(narrow), []
        for count in (1, 2):  # both lanes, one after the other: there is one place to wait
            busy.append(pool.submit(narrow.post, INFER, content=body, headers=headers))
            until(lambda count=count: metrics(narrow)["bca_batch_size_sum"] == before + count)
        with connected(narrow) as client:
            client.sendall(sent)
            until(lambda: metrics(narrow)["bca_queue_depth"] == 1)
        until(lambda: " 499 " in narrow.log.read_text(encoding="utf-8"))
        assert metrics(narrow)["bca_queue_depth"] == 0
    assert [call.result().status_code for call in busy] == [200, 200]


def test_refused_grpc_requests_are_let_go(attacked: Server) -> None:
    """An error that holds a request's frames would keep each of them until the next collection."""
    large = pb.ModelInferRequest(model_name="bca", raw_input_contents=[bytes(2_000_000)])
    large.inputs.add(name="x", datatype="FP32", shape=[1, 1, 1])
    with grpc.insecure_channel(attacked.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        sent, before = large.SerializeToString(), attacked.rss_mb()
        assert {status(call, sent) for _ in range(150)} == {"INVALID_ARGUMENT"}
    assert attacked.rss_mb() < before + 100


def in_flight(server: Server, inputs: dict[str, np.ndarray], pool: ThreadPoolExecutor) -> "tuple[Future[Any], Future[Any]]":
    """The server's first REST and gRPC requests; the model works on them, or they wait for it."""
    body, headers = request(inputs)
    remote = RemoteSession(f"grpc://{server.grpc}", deadline_s=PATIENCE_S)
    assert remote.inputs  # the connection is there
    calls = pool.submit(server.post, INFER, content=body, headers=headers), pool.submit(remote.run, inputs)
    until(lambda: arrived(server) == 2)
    return calls


def arrived(server: Server) -> float:
    found = metrics(server)
    return found["bca_batch_size_sum"] + found["bca_queue_depth"]


def test_a_request_is_checked_once(exported: Bundle, tmp_path: Path) -> None:
    seen = tmp_path / "checks"
    counting = f"""
from bca_deploy.session.contract import Contract
check = Contract.check
def counted(*args, **options):
    with open({str(seen)!r}, "a") as file:
        file.write("checked\\n")
    return check(*args, **options)
Contract.check = counted
"""
    body, headers = request(make(1, 4, 3))
    with bca_serve(exported.directory, tmp_path / "log", program=(*BCA[:2], counting + BCA[2])) as server:
        before = len(seen.read_text().splitlines()) if seen.exists() else 0  # of the warm-up
        server.post(INFER, content=body, headers=headers).raise_for_status()
        assert len(seen.read_text().splitlines()) == before + 1


def test_a_model_that_fails_is_500_with_the_reason_in_the_log_alone(exported: Bundle, tmp_path: Path) -> None:
    broken = "from bca_deploy.session.session import Session; Session.run_prepared = lambda *_: 1 / 0; "
    program = (*BCA[:2], broken + BCA[2])
    body, headers = request(make(1, 4, 3))
    with bca_serve(exported.directory, tmp_path / "log", program=program) as server:
        answer = server.post(INFER, content=body, headers=headers)
        assert (answer.status_code, answer.json()) == (500, {"error": "the server failed; its log says why"})
        with (
            RemoteSession(f"grpc://{server.grpc}") as remote,
            pytest.raises(ServerError, match="INTERNAL: the server failed; its log says why"),
        ):
            remote.run(make(1, 4, 3))
        log = server.log.read_text(encoding="utf-8")
        assert log.count("ZeroDivisionError: division by zero") == 2, "once for each"
        assert f"POST {INFER} 500 " in log
        assert metrics(server)['bca_answers_total{kind="POST",status="500"}'] == 1
        assert server.get("/v2/health/ready").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_is_in_flight_and_ends_well(exported: Bundle, tmp_path: Path, number: int) -> None:
    log = tmp_path / "log"
    with bca_serve(exported.directory, log, program=held(log)) as server, ThreadPoolExecutor(2) as pool:
        with holding(server):
            rest, remote = in_flight(server, make(1, 4, 3), pool)
            server.process.send_signal(number)
            until(lambda: "stopping: no new requests are taken" in log.read_text(encoding="utf-8"))
        assert server.process.wait(PATIENCE_S) == 0
        assert rest.result().status_code == 200
        assert len(remote.result()) == 2
        assert "Traceback" not in log.read_text(encoding="utf-8")
        with pytest.raises(httpx.ConnectError):
            server.get("/v2/health/live")


@pytest.mark.slow
def test_a_kill_under_load_is_a_clear_error_at_the_client_and_a_restart_serves_again(exported: Bundle, tmp_path: Path) -> None:
    inputs, errors, done = make(1, 64, 64), list[Exception](), threading.Event()
    answered = 0

    def load(remote: RemoteSession) -> None:
        nonlocal answered
        while not done.is_set():
            try:
                remote.run(inputs)
                answered += 1
            except BcaError as error:
                errors.append(error)

    with (
        free_ports(2) as (http, rpc),
        RemoteSession(f"grpc://127.0.0.1:{rpc}", deadline_s=PATIENCE_S, attempts=2) as remote,
        ThreadPoolExecutor(4) as pool,
        contextlib.ExitStack() as stop,
    ):
        stop.callback(done.set)
        options = ("--http-port", str(http), "--grpc-port", str(rpc))
        with bca_serve(exported.directory, tmp_path / "log", *options) as server:
            assert remote.inputs
            for _ in range(4):
                pool.submit(load, remote)
            until(lambda: answered > 50)
            server.process.kill()
            server.process.wait()
            until(lambda: len(errors) > 4)
        for error in errors:
            assert isinstance(error, ServerError)
            assert "the server is not there or went away" in str(error)
        with bca_serve(exported.directory, tmp_path / "log", *options):
            before = answered
            until(lambda: answered > before + 50)


@pytest.mark.slow
def test_thousands_of_good_requests_need_no_more_memory_than_hundreds(attacked: Server) -> None:
    with RemoteSession(f"grpc://{attacked.grpc}") as remote, ThreadPoolExecutor(4) as pool:
        requests = [make(1, n, 65 - n, n) for n in range(1, 65)] * 8
        list(pool.map(remote.run, requests))
        assert growth_mb(attacked, lambda: list(pool.map(remote.run, requests)), rounds=5) < 0.3


def growth_mb(server: Server, work: Callable[[], object], rounds: int) -> float:
    """The least that the server grows by in a round of work.

    The allocator and the kernel, with huge pages, take more now and then; requests that leave something do in every round.
    """
    sizes = [server.rss_mb()]
    for _ in range(rounds):
        work()
        sizes.append(server.rss_mb())
    return min(after - before for before, after in itertools.pairwise(sizes))


GOOD = make(1, 4, 3)

names = st.sampled_from(["x", "context", "mask", "context_mask", "out", "", "x\0", "X", "ü"])
sizes = st.lists(st.sampled_from([0, 1, 3, 4, 16, 24, 9, 2049, -1, -(2**63), 2**31, 2**62, 2**63 - 1]), max_size=5)
datatypes = st.sampled_from(["FP32", "BOOL", "FP64", "FP16", "BF16", "INT64", "BYTES", "", "fp32", "FP32\n"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
parameters = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "binary_data_output", "cast", "shared_memory_region", "?"]),
    json_values | st.integers(-5, 400),
    max_size=3,
)
rest_tensors = st.fixed_dictionaries(
    {}, optional={"name": names, "shape": sizes, "datatype": datatypes, "data": json_values, "parameters": parameters}
)
rest_bodies = st.fixed_dictionaries(
    {"inputs": st.lists(rest_tensors, max_size=5) | json_values},
    optional={"id": json_values, "outputs": st.lists(rest_tensors, max_size=3) | json_values, "parameters": parameters},
)


def good_body() -> bytes:
    body, headers = request(GOOD)
    assert int(headers["Inference-Header-Content-Length"]) < len(body)
    return body


@st.composite
def broken(draw: Any) -> tuple[bytes, str | None]:
    """Bytes that were a good request until something cut, doubled or changed them."""
    body = bytearray(good_body())
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(body) - 1, 0)))
        match draw(st.sampled_from(["cut", "change", "insert", "drop"])):
            case "cut":
                del body[place:]
            case "change" if body:
                body[place] = draw(st.integers(0, 255))
            case "insert":
                body[place:place] = draw(st.binary(max_size=20))
            case "drop":
                del body[place : place + draw(st.integers(1, 50))]
    length = draw(st.sampled_from([None, "0", "-1", "5", "400", str(len(body)), str(10**12), "abc", "nan"]))
    return bytes(body), length


rest_requests = (
    broken()
    | st.tuples(st.binary(max_size=200), st.none() | st.text("0123456789", max_size=4))
    | st.tuples(rest_bodies.map(lambda b: json.dumps(b).encode()), st.none())
    | st.integers(500, 20_000).map(lambda depth: (b'{"inputs":' + b"[" * depth + b"]" * depth + b"}", None))
)


@st.composite
def grpc_requests_of(draw: Any) -> bytes:
    """A message whose fields do not fit each other, or bytes that are hardly a message at all."""
    made = pb.ModelInferRequest(model_name="bca")
    for name in draw(st.lists(names, max_size=5)):
        shape = [size for size in draw(sizes) if size < 2**63]
        tensor = made.inputs.add(name=name, datatype=draw(datatypes), shape=shape)
        match draw(st.sampled_from(["raw", "good", "values", "nothing"])):
            case "raw":
                made.raw_input_contents.append(draw(st.binary(max_size=64)))
            case "good":
                made.raw_input_contents.append(GOOD["x"].tobytes())
            case "values":
                tensor.contents.fp32_contents.extend(draw(st.lists(st.floats(width=32), max_size=4)))
    for name in draw(st.lists(names, max_size=2)):
        made.outputs.add(name=name)
    return bytes(made.SerializeToString() + draw(st.just(b"") | st.binary(max_size=60)))


grpc_requests = grpc_requests_of() | st.binary(max_size=200).map(lambda noise: b"\n\x03bca" + noise)


@pytest.fixture(scope="module")
def attacked(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with bca_serve(exported.directory, tmp_path_factory.mktemp("attacked") / "log") as server:
        yield server


ATTACK = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
def test_five_hundred_malformed_rest_requests_are_refused_and_leave_nothing_behind(attacked: Server) -> None:
    with httpx.Client(base_url=f"http://{attacked.http}", timeout=PATIENCE_S) as client:

        def send(sent: tuple[bytes, str | None]) -> None:
            headers = {} if sent[1] is None else {"Inference-Header-Content-Length": sent[1]}
            answer = client.post(INFER, content=sent[0], headers=headers)
            assert answer.status_code in (200, 400), answer.text
            assert answer.status_code == 200 or answer.json()["error"]

        unharmed(attacked, rest_requests, send)


@pytest.mark.slow
def test_five_hundred_malformed_grpc_requests_are_refused_and_leave_nothing_behind(attacked: Server) -> None:
    with grpc.insecure_channel(attacked.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        def send(sent: bytes) -> None:
            assert status(call, sent) in ("OK", "INVALID_ARGUMENT")

        unharmed(attacked, grpc_requests, send)


def status(call: Any, sent: bytes) -> str:
    try:
        call(sent, timeout=PATIENCE_S)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def unharmed(server: Server, requests: "st.SearchStrategy[Any]", send: Callable[[Any], None]) -> None:
    """Send them all, then all of them again: the process lives, does not grow by them, and works."""
    sent: list[Any] = []

    @ATTACK
    @given(requests)
    def attack(one: Any) -> None:
        sent.append(one)
        send(one)

    attack()
    assert len(sent) >= 500
    files = open_files(server)
    assert growth_mb(server, lambda: [send(one) for one in sent], rounds=3) < 2
    assert server.process.poll() is None
    assert open_files(server) <= files + 2
    assert metrics(server)["bca_queue_depth"] == 0
    log = server.log.read_text(encoding="utf-8")
    assert re.search(r" 5\d\d \d+\.\d ms|INTERNAL|Traceback", log) is None
    body, headers = request(GOOD)
    assert server.post(INFER, content=body, headers=headers).status_code == 200


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
