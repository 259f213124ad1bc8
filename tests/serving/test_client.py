"""RemoteSession: in-process becomes remote by one line, whatever server of the protocol is behind it."""

import asyncio
import contextlib
import importlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from support.requests import by_grpc, make
from support.servers import PATIENCE_S, Server, cpp_serve, free_ports
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import BcaError, InputError, MissingDependencyError, ServerError
from bca_deploy.serving.client import RemoteSession
from bca_deploy.session.session import Session

#: Fixtures of running servers; each speaks the Open Inference Protocol over gRPC and has the model `bca`.
SERVERS = ("served", "triton", pytest.param("cpp_server", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def cpp_server(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with cpp_serve(exported.directory, tmp_path_factory.mktemp("cpp") / "log") as server:
        yield server


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def remote(server: Server) -> Iterator[RemoteSession]:
    with RemoteSession(f"grpc://{server.grpc}") as session:
        yield session


@pytest.fixture(scope="module")
def local(exported: Bundle) -> Iterator[Session]:
    with bca_deploy.open(exported.directory) as session:
        yield session


def same(got: "tuple[np.ndarray, ...]", wanted: "tuple[np.ndarray, ...]") -> None:
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 7, 5), (8, 33, 40)])
@pytest.mark.parametrize("masked", [True, False], ids=["masks", "no masks"])
def test_it_gives_what_the_session_gives(
    remote: RemoteSession, local: Session, sizes: tuple[int, int, int], masked: bool
) -> None:
    inputs = make(*sizes, masked=masked)
    same(remote(**inputs), local(**inputs))


def test_by_position_by_name_and_by_mapping_are_the_same(remote: RemoteSession, local: Session) -> None:
    inputs = make(2, 5, 3)
    same(remote(*inputs.values()), local(**inputs))
    by_name = remote.run(inputs)
    assert list(by_name) == ["out", "context_out"]
    same(tuple(by_name.values()), local(**inputs))


def test_one_mask_alone_is_enough(remote: RemoteSession, local: Session) -> None:
    inputs = make(2, 5, 3)
    del inputs["mask"]
    same(remote(**inputs), local(**inputs))


def test_ragged_pairs_come_back_in_order(remote: RemoteSession, local: Session) -> None:
    pairs = [tuple(make(1, n, 40 - n, n).values()) for n in range(1, 33)]
    for _, _, mask, context_mask in pairs:  # with one side wholly masked no row of the other is live
        mask[:, 0] = context_mask[:, 0] = True
    live = [(pair[2], pair[3]) for pair in pairs]
    for got, wanted, masks in zip(remote.run_many(pairs), local.run_many(pairs), live, strict=True):
        same(tuple(g[m] for g, m in zip(got, masks, strict=True)), tuple(w[m] for w, m in zip(wanted, masks, strict=True)))


def test_many_threads_share_one_remote_session(remote: RemoteSession, local: Session) -> None:
    requests = [make(1, n, 9, n, masked=False) for n in range(1, 17)]
    with ThreadPoolExecutor(8) as pool:
        for got, inputs in zip(pool.map(remote.run, requests), requests, strict=True):
            same(tuple(got.values()), local(**inputs))


def test_torch_in_torch_out_and_the_results_belong_to_the_caller(remote: RemoteSession, local: Session) -> None:
    inputs = make(2, 5, 3)
    out, context_out = remote(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    same((out.numpy(), context_out.numpy()), local(**inputs))
    out += 1  # not a view of a message


def test_the_event_loop_is_not_blocked(remote: RemoteSession, local: Session) -> None:
    inputs = make(2, 5, 3)

    async def main() -> list[tuple[np.ndarray, ...]]:
        return await asyncio.gather(*(remote.run_async(**inputs) for _ in range(4)))

    for got in asyncio.run(main()):
        same(got, local(**inputs))


def test_dtypes_are_cast_on_request(remote: RemoteSession, local: Session) -> None:
    inputs = make(2, 5, 3)
    wide = {name: array.astype(np.int64 if array.dtype == bool else np.float64) for name, array in inputs.items()}
    same(remote(**wide, cast=True), local(**inputs))
    with pytest.raises(InputError, match="input x has dtype float64, and needs float32; cast=True converts it"):
        remote(**wide)


def test_inputs_and_outputs_are_the_servers(remote: RemoteSession, local: Session) -> None:
    for found, wanted in ((remote.inputs, local.inputs), (remote.outputs, local.outputs)):
        axes = [tuple(axis if isinstance(axis, int) else "?" for axis in tensor.axes) for tensor in wanted]
        assert [(t.name, t.dtype, t.axes) for t in found] == [(t.name, t.dtype, a) for t, a in zip(wanted, axes, strict=True)]


@pytest.mark.parametrize(("change", "message"), [
    ({"x": np.zeros((1, 2049, 24), np.float32)}, r"input x: axis 1 \(x_len\) is 2049, allowed 1 to 2048"),
    ({"x": np.zeros((1, 4, 23), np.float32)}, "input x: axis 2 is 23, and must be 24"),
    ({"mask": np.ones((1, 5), bool)}, r"input mask: axis 1 \(x_len\) is 5, but x has 4; they must agree"),
    ({"masks": np.ones((1, 4), bool)}, r"the model has no input 'masks' \(did you mean 'mask'\?\)"),
    ({"x": None}, "input x is missing|expected .*'x'|missing .*x"),  # or in Triton's own words
])  # fmt: skip
def test_refusals_have_the_sessions_words_and_the_next_call_works(
    remote: RemoteSession, change: dict[str, np.ndarray], message: str
) -> None:
    inputs = make(1, 4, 3, masked=False)
    with pytest.raises(InputError, match=message):
        remote(**inputs | change)
    assert len(remote(**inputs)) == 2


@pytest.mark.parametrize(("change", "message"), [
    ({"mask": np.full((1, 4), 255, np.uint8).view(bool)}, "input mask: a bool is one byte of 0 or 1, and here is one of 255"),
    ({"context_mask": np.full((1, 3), 2, np.uint8).view(bool)}, "input context_mask: a bool is one byte of 0 or 1, and here"),
    ({"x": np.zeros((1, 2049, 24), np.float32)}, "allowed 1 to 2048; a sequence cannot be cut, as each row attends to all of"),
    ({"x": np.zeros((1, 0, 24), np.float32)}, "allowed 1 to 2048; nothing attends to an empty sequence; leave its entry out"),
])  # fmt: skip
def test_every_server_says_by_itself_what_would_give_other_numbers(
    server: Server, change: dict[str, np.ndarray], message: str
) -> None:
    """Asked by a client that looks at nothing."""
    with pytest.raises(InferenceServerException) as refused:
        by_grpc(server, make(1, 4, 3, masked=False) | change)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert message in refused.value.message()
    assert len(by_grpc(server, make(1, 4, 3))) == 2


def test_a_mask_of_other_bytes_is_refused_before_it_is_sent(remote: RemoteSession) -> None:
    mask = np.full((1, 4), 255, np.uint8).view(bool)
    with pytest.raises(InputError, match=r"^input mask: a bool is one byte of 0 or 1, and here is one of 255; write 1 where"):
        remote(**make(1, 4, 3, masked=False) | {"mask": mask})


def test_a_model_that_is_not_there_is_named(server: Server) -> None:
    with RemoteSession(f"grpc://{server.grpc}", "other") as remote, pytest.raises(ServerError, match="model other: "):
        remote(**make(1, 4, 3))


def test_a_server_that_is_not_there_is_named_within_the_deadline() -> None:
    with free_ports(1) as (port,):
        message = rf"127\.0\.0\.1:{port}, model bca: the server is not there or went away"
        remote = RemoteSession(f"grpc://127.0.0.1:{port}", deadline_s=PATIENCE_S, attempts=2)
        with remote, pytest.raises(ServerError, match=message):
            remote(**make(1, 4, 3))


class Flaky(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A server that is unavailable for the first so many calls; its model gives x back as out."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802  (the protocol's name)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        inputs = [tensor(name="x", datatype="FP32", shape=[-1, -1, 24])]
        return pb.ModelMetadataResponse(inputs=inputs, outputs=[tensor(name="out", datatype="FP32", shape=[-1, -1, 24])])

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.calls += 1
        if self.calls <= self.failures:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        out = pb.ModelInferResponse.InferOutputTensor(name="out", datatype="FP32", shape=request.inputs[0].shape)
        return pb.ModelInferResponse(outputs=[out], raw_output_contents=request.raw_input_contents)


@contextlib.contextmanager
def flaky(failures: int) -> Iterator[tuple[Flaky, str]]:
    servicer = Flaky(failures)
    with listening(servicer) as url:
        yield servicer, url


class Mute(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A server that is there and does not answer."""

    def __init__(self) -> None:
        self.asked, self.over = threading.Event(), threading.Event()

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.asked.set()
        assert self.over.wait(PATIENCE_S)


@contextlib.contextmanager
def listening(servicer: service_pb2_grpc.GRPCInferenceServiceServicer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("length", [4, 20_000], ids=["small", "above what gRPC keeps of its own accord"])
def test_an_unavailable_server_is_asked_again_as_often_as_allowed(length: int) -> None:
    x = make(1, length, 3)["x"]
    with flaky(failures=2) as (server, url), RemoteSession(url, attempts=3) as remote:
        (out,) = remote(x)
        assert np.array_equal(out, x)
        assert server.calls == 3
    with flaky(failures=2) as (server, url), RemoteSession(url, attempts=2) as remote:
        with pytest.raises(ServerError, match=r"the server is not there or went away \(not yet\)"):
            remote(x)
        assert server.calls == 2


def test_a_server_that_never_answers_delays_no_other_session(served: Server) -> None:
    mute = Mute()
    with listening(mute) as url, ThreadPoolExecutor(1) as pool:
        remote = RemoteSession(url, deadline_s=PATIENCE_S)
        waiting = pool.submit(remote.run, make(1, 4, 3))
        try:
            assert mute.asked.wait(PATIENCE_S)
            with RemoteSession(f"grpc://{served.grpc}") as live:
                assert len(live(**make(1, 4, 3))) == 2
            assert not waiting.done()
            remote.close()
            with pytest.raises(BcaError):
                waiting.result(PATIENCE_S)
        finally:
            mute.over.set()


def test_a_closed_session_says_so_whatever_is_asked_of_it(served: Server) -> None:
    inputs = make(1, 4, 3)
    for used in (True, False):
        remote = RemoteSession(f"grpc://{served.grpc}")
        if used:
            remote(**inputs)
        remote.close()
        remote.close()
        asked = (lambda: remote(**inputs), lambda: remote.run(inputs), lambda: remote.run_many([tuple(inputs.values())]))  # noqa: B023
        for ask in asked if used else (*asked, lambda: remote.inputs):  # noqa: B023
            with pytest.raises(BcaError, match="the session is closed; make another RemoteSession"):
                ask()


def test_the_wrong_pair_of_many_is_named(served: Server) -> None:
    right, wrong = tuple(make(1, 4, 3).values()), tuple((make(1, 4, 3) | {"x": np.zeros((1, 4, 23), np.float32)}).values())
    with RemoteSession(f"grpc://{served.grpc}") as remote:
        with pytest.raises(InputError, match=r"^pair 3: input x: axis 2 is 23, and must be 24"):
            remote.run_many([right, right, right, wrong, right])
        too_long = (np.zeros((1, 2049, 24), np.float32), right[1])
        with pytest.raises(InputError, match=r"^pair 1: input x: axis 1 \(x_len\) is 2049"):
            remote.run_many([right, too_long])


@pytest.mark.parametrize("attempts", [0, 6])
def test_attempts_that_grpc_would_not_make_are_refused(attempts: int) -> None:
    with pytest.raises(InputError, match=rf"attempts is {attempts}; allowed 1 to 5"):
        RemoteSession("grpc://127.0.0.1:1", attempts=attempts)


@pytest.mark.parametrize("url", [
    "localhost:8081", "http://localhost:8080", "grpc://", "", "grpc://host", "grpc://host:", "grpc://:8081", "grpc://host:0",
    "grpc://host:65536", "grpc://host:8081/", "grpc://host:8081/v2", "grpc://host:8081\n", "grpc://me@host:8081",
    "grpc://::1:8081", "grpc://[::1]", "grpc://dns:///host:8081", "grpc://host:8081,host:8082", "GRPC://host:8081",
])  # fmt: skip
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="give grpc://host:port, or grpcs://host:port for TLS"):
        RemoteSession(url)


@pytest.mark.parametrize("url", ["grpc://localhost:1", "grpcs://a-b.example.org:65535", "grpc://[::1]:8081"])
def test_a_host_or_an_address_with_a_port_is_a_url(url: str) -> None:
    RemoteSession(url).close()


@pytest.mark.parametrize("token", ["secret\n", "two secrets", "secr\u00e9t", "se\x7fcret", ""])
def test_a_token_that_is_no_word_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(InputError, match=rf"the token of {len(token)} characters is no single word") as caught:
        RemoteSession("grpc://127.0.0.1:1", token=token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize("scheme", ["grpc", "grpcs"])
def test_root_certificates_that_cannot_be_read_are_named(tmp_path: Path, scheme: str) -> None:
    for file, reason in ((tmp_path / "none.pem", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(
            InputError, match=rf"root_certificates {re.escape(str(file))} cannot be read: {reason}.*; give a PEM"
        ):
            RemoteSession(f"{scheme}://127.0.0.1:1", root_certificates=file)


def test_beside_kserve_the_error_says_to_call_from_another_process() -> None:
    script = """
import kserve
from bca_deploy.serving.client import RemoteSession
from bca_deploy.errors import BcaError
for _ in range(2):
    try:
        RemoteSession("grpc://127.0.0.1:1")
    except BcaError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("such as kserve; call the server from another process") == 2


def test_without_tritonclient_the_error_holds_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'bca-deploy\[client\]'"):
        RemoteSession("grpc://127.0.0.1:1")


def test_opening_a_bundle_and_the_command_line_import_none_of_the_serving_packages(exported: Bundle) -> None:
    script = f"""
import sys, bca_deploy, bca_deploy.cli
bca_deploy.open({str(exported.directory)!r}).close()
heavy = ("kserve", "grpc", "fastapi", "uvicorn", "tritonclient", "google.protobuf", "prometheus_client", "yaml", "pandas")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout == "[]\n"


def test_a_load_test_fails_when_one_of_its_clients_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    load = importlib.import_module("serving").load
    assert load(lambda: lambda: time.sleep(0.001), 2, 1.0)["calls"] > 0
    for good_calls in (0, 3):  # before the clients begin together, and after
        calls = iter(range(good_calls))
        with pytest.raises(RuntimeError, match=r"of 2 clients did not get through, the first because of StopIteration"):
            load(lambda: lambda: next(calls), 2, PATIENCE_S)  # noqa: B023
