"""`bca serve`: the session's results and the session's refusals, over gRPC and REST; token, TLS, metrics, log, options."""

import contextlib
import datetime
import ipaddress
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from support.requests import INFER, _filled, bca, by_grpc, by_rest, make, metrics, request
from support.servers import BCA, PATIENCE_S, Server, bca_serve, held, holding, until
from tritonclient.utils import InferenceServerException

import bca_deploy
from bca_deploy.bundle.manifest import MANIFEST_FILE, SELFTEST_FILE
from bca_deploy.bundle.read import Bundle, sha256
from bca_deploy.errors import InputError, ServerError
from bca_deploy.serving import protocol
from bca_deploy.serving.client import RemoteSession
from bca_deploy.session.session import Session


@pytest.fixture(scope="module")
def session(exported: Bundle) -> Iterator[Session]:
    with bca_deploy.open(exported.directory) as opened:
        yield opened


@pytest.mark.parametrize("ask", [by_grpc, by_rest])
@pytest.mark.parametrize("masked", [True, False], ids=["masks", "no masks"])
def test_the_server_gives_what_the_session_gives(served: Server, session: Session, ask: Any, masked: bool) -> None:
    for sizes in ((1, 1, 1), (2, 7, 5), (8, 40, 33)):
        inputs = make(*sizes, masked=masked)
        for got, wanted in zip(ask(served, inputs), session(**inputs), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_json_in_and_out_gives_the_same(served: Server, session: Session) -> None:
    inputs = make(2, 7, 5)
    entries = [
        {"name": n, "datatype": protocol.DATATYPE[a.dtype.name], "shape": a.shape, "data": a.tolist()}
        for n, a in inputs.items()
    ]
    answer = served.post(INFER, json={"inputs": entries, "id": "42"}).raise_for_status().json()
    assert (answer["id"], answer["model_name"]) == ("42", "bca")
    for entry, wanted in zip(answer["outputs"], session(**inputs), strict=True):
        np.testing.assert_allclose(np.reshape(entry["data"], entry["shape"]), wanted, atol=1e-6)


def test_only_the_outputs_that_were_asked_for_come_back(served: Server) -> None:
    body, headers = request(make(1, 4, 3), outputs=[{"name": "context_out"}])
    answer = served.post(INFER, content=body, headers=headers).raise_for_status()
    head = json.loads(answer.content[: int(answer.headers["Inference-Header-Content-Length"])])
    assert [entry["name"] for entry in head["outputs"]] == ["context_out"]


def test_dtypes_are_cast_where_the_request_says_so(served: Server, session: Session) -> None:
    inputs = make(2, 4, 3) | {"x": make(2, 4, 3)["x"].astype(np.float64)}
    body, headers = request(inputs, parameters={"binary_data_output": True, "cast": True})
    assert served.post(INFER, content=body, headers=headers).status_code == 200
    body, headers = request(inputs)
    assert served.post(INFER, content=body, headers=headers).json() == {
        "error": "input x has dtype float64, and needs float32; cast=True converts it"
    }


def test_ragged_requests_at_the_same_time_give_what_one_by_one_gives(
    exported: Bundle, session: Session, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    pairs = [make(int(b), int(n), int(m), seed) for seed, (b, n, m) in enumerate(rng.integers(1, (5, 65, 65), (64, 3)))]
    log = tmp_path / "log"
    with (
        bca_serve(exported.directory, log, "--max-batch", "16", "--max-delay-ms", "20", program=held(log)) as server,
        RemoteSession(f"grpc://{server.grpc}", deadline_s=PATIENCE_S) as remote,
    ):
        with ThreadPoolExecutor(32) as pool:
            with holding(server):  # until as many are there as there are clients
                calls = [pool.submit(remote.run, pair) for pair in pairs]
                until(lambda: metrics(server)["bca_batch_size_sum"] + metrics(server)["bca_queue_depth"] == 32)
            results = [call.result() for call in calls]
        together = metrics(server)
    for got, pair in zip(results, pairs, strict=True):
        for name, wanted in session.run(pair).items():
            np.testing.assert_allclose(got[name], wanted, atol=1e-6)
    assert together["bca_batch_size_sum"] == 64
    assert together["bca_batch_size_count"] < 64, "no two requests ran together"


def test_health_metadata_and_metrics_are_there(served: Server) -> None:
    assert served.get("/v2/health/live").json() == {"live": True}
    assert served.get("/v2/health/ready").json() == {"ready": True}
    assert served.get("/v2/models/bca/ready").json() == {"name": "bca", "ready": True}
    described = served.get("/v2/models/bca").json()
    assert described["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, -1, 24]}
    assert [output["name"] for output in described["outputs"]] == ["out", "context_out"]
    with grpc_client.InferenceServerClient(served.grpc) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("bca")
    before = metrics(served)
    by_grpc(served, make(1, 4, 3))
    after = metrics(served)
    assert after['bca_session_calls_total{model="bca"}'] > before['bca_session_calls_total{model="bca"}']
    label = 'bca_answers_total{kind="grpc",status="OK"}'
    assert after[label] > before[label]
    assert after["bca_queue_depth"] == 0


X, CONTEXT = make(1, 4, 3)["x"], make(1, 4, 3)["context"]
REFUSALS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "dtype": ({"x": X.astype(np.int32), "context": CONTEXT}, "input x has dtype int32, and needs float32"),
    "rank": ({"x": X[0], "context": CONTEXT}, "input x has 2 axes [4, 24], and needs 3: [batch, x_len, 24]"),
    "features": ({"x": X[..., :23], "context": CONTEXT}, "input x: axis 2 is 23, and must be 24: [batch, x_len, 24]"),
    "missing": ({"x": X}, "input context is missing; the model takes x, context, mask, context_mask"),
    "unknown": ({"x": X, "context": CONTEXT, "masks": X}, "the model has no input 'masks' (did you mean 'mask'?)"),
    "mask of another length": (
        {"x": X, "context": CONTEXT, "mask": np.ones((1, 5), bool)},
        "input mask: axis 1 (x_len) is 5, but x has 4; they must agree",
    ),
    "mask of other bytes": (
        {"x": X, "context": CONTEXT, "mask": np.full((1, 4), 255, np.uint8).view(bool)},
        "input mask: a bool is one byte of 0 or 1, and here is one of 255; write 1 where it is true",
    ),
    "zero length": (
        {"x": X[:, :0], "context": CONTEXT},
        "input x: axis 1 (x_len) is 0, allowed 1 to 2048; nothing attends to an empty",
    ),
    "too long": (
        {"x": np.zeros((1, 2049, 24), np.float32), "context": CONTEXT},
        "is 2049, allowed 1 to 2048; a sequence cannot be cut, as each row",
    ),
    "batch": (
        {"x": np.zeros((9, 4, 24), np.float32), "context": np.zeros((9, 3, 16), np.float32)},
        "input x: axis 0 (batch) is 9, allowed 1 to 8; split the batch, or export again with wider dims",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_request_is_refused_in_the_sessions_words_and_the_next_one_works(served: Server, case: str) -> None:
    inputs, message = REFUSALS[case]
    body, headers = request({name: np.ascontiguousarray(array) for name, array in inputs.items()})
    answer = served.post(INFER, content=body, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    with pytest.raises(InferenceServerException) as refused:
        by_grpc(served, inputs)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert refused.value.message() == answer.json()["error"]
    assert len(by_grpc(served, make(1, 4, 3))) == 2
    assert len(by_rest(served, make(1, 4, 3))) == 2


@pytest.mark.parametrize(("shape", "raw", "message"), [
    ((-1, 4, 24), X.tobytes(), "input x: axis 0 is -1; no size is below 0"),
    ((2**62, 4, 24), X.tobytes(), "input x: axis 0 is 4611686018427387904; no size"),
    ((1, 4, 24), X.tobytes()[:-1], "input x has 383 bytes, and 384 are needed for [1, 4, 24] float32"),
])  # fmt: skip
def test_sizes_and_bytes_that_do_not_add_up_are_refused_over_grpc(
    served: Server, shape: tuple[int, ...], raw: bytes, message: str
) -> None:
    made = grpc_client.InferInput("x", shape, "FP32")
    made._raw_content = raw
    with grpc_client.InferenceServerClient(served.grpc) as client, pytest.raises(InferenceServerException) as refused:
        client.infer("bca", [made, _filled(grpc_client, "context", CONTEXT)])
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert message in refused.value.message()


def test_a_refusal_stays_short_whatever_the_client_calls_its_inputs(served: Server) -> None:
    with pytest.raises(InferenceServerException) as refused:
        by_grpc(served, {"n" * 100_000: X, "context": CONTEXT})
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert refused.value.message().startswith("the model has no input 'nnn")
    body, headers = request({"n" * 100_000: X, "context": CONTEXT})
    assert served.post(INFER, content=body, headers=headers).json()["error"] == refused.value.message()


def test_sizes_that_fit_no_profile_of_an_engine_are_refused_before_they_wait(exported: Bundle) -> None:
    # In a process of its own, since KServe's protobuf messages and tritonclient's have the same names.
    script = f"""
import asyncio
import numpy as np
import bca_deploy
from bca_deploy.serving.endpoints import BundleModel
from bca_deploy.session.contract import Contract
from bca_deploy.signature import DimRange, Dims
from bca_deploy.serving.protocol import Request
few, lengths = DimRange(1, 1, 8), (DimRange(1, 64, 128), DimRange(129, 512, 2048))
short, long = (Dims(batch=few, x_len=length, context_len=length) for length in lengths)
session = bca_deploy.open({str(exported.directory)!r})
session._contract = Contract(session.signature, (short, long))
inputs = dict(x=np.zeros((1, 4, 24), np.float32), context=np.zeros((1, 200, 16), np.float32))
asyncio.run(BundleModel("bca", session, None).predict(Request(inputs)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "InputError: no optimization profile of the engine holds batch 1, x_len 4, context_len 200" in done.stderr


def test_an_input_given_twice_is_refused(served: Server) -> None:
    twice = [_filled(grpc_client, "x", X)] * 2
    with (
        grpc_client.InferenceServerClient(served.grpc) as client,
        pytest.raises(InferenceServerException, match="input x is given twice"),
    ):
        client.infer("bca", twice)


def test_what_is_not_there_is_not_found(served: Server) -> None:
    assert served.post("/v2/models/other/infer", json={"inputs": []}).status_code == 404
    assert served.get("/v2/models/other").json() == {"error": "Model with name other does not exist."}
    assert served.get("/nothing").status_code == 404
    assert served.get(INFER).status_code == 405
    assert served.post("/v2/repository/models/bca/unload").status_code == 404, "a client could stop the server"
    with grpc_client.InferenceServerClient(served.grpc) as client:
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            client.get_model_metadata("other")
        with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            client.unload_model("bca")


@pytest.fixture(scope="module")
def small(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a body limit of 1 MiB and a token."""
    log = tmp_path_factory.mktemp("small") / "log"
    with bca_serve(exported.directory, log, "--max-body-mib", "1", env={"BCA_TOKEN": "open-sesame"}) as server:
        yield server


def test_a_body_over_the_limit_is_refused_without_being_read(small: Server) -> None:
    inputs = make(8, 1500, 3)
    body, headers = request(inputs)
    headers["Authorization"] = "Bearer open-sesame"
    assert len(body) > 2**20
    refused = small.post(INFER, content=body, headers=headers)
    assert (refused.status_code, refused.json()) == (
        413,
        {"error": "the body has more than 1048576 bytes, which is the limit here"},
    )
    chunked = small.post(INFER, content=iter([body[: 2**19]] * 3), headers=headers)
    assert chunked.status_code == 413
    with RemoteSession(f"grpc://{small.grpc}", token="open-sesame") as remote:  # noqa: S106
        with pytest.raises(ServerError, match="busy, or the request too large"):
            remote.run(inputs)
        assert len(remote.run(make(1, 4, 3))) == 2


def test_a_length_over_the_limit_is_refused_before_the_body_comes(small: Server) -> None:
    host, port = small.http.rsplit(":", 1)
    lines = f"POST {INFER} HTTP/1.1", "Host: x", "Authorization: Bearer open-sesame", f"Content-Length: {10**12}", "", "abc"
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as client:
        client.sendall("\r\n".join(lines).encode())
        assert b" 413 " in client.recv(200).split(b"\r\n")[0]


def test_headers_without_end_are_cut_off(small: Server) -> None:
    host, port = small.http.rsplit(":", 1)
    before, sent = small.rss_mb(), 0
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as client, contextlib.suppress(OSError):
        client.sendall(b"GET /v2/health/live HTTP/1.1\r\n")
        while sent < 64:  # MiB
            client.sendall(b"a: " + b"b" * 2**20 + b"\r\n")
            sent += 1
    assert sent < 32
    assert small.rss_mb() < before + 32


def test_another_version_of_the_model_is_not_found(served: Server) -> None:
    inputs = [_filled(grpc_client, n, a) for n, a in make(1, 4, 3).items()]
    with grpc_client.InferenceServerClient(served.grpc) as client:
        assert client.infer("bca", inputs, model_version="1").get_response().model_name == "bca"
        with pytest.raises(InferenceServerException, match="bca, version 9") as refused:
            client.infer("bca", inputs, model_version="9")
    assert refused.value.status() == "StatusCode.NOT_FOUND"


def test_without_an_access_log_there_is_none(exported: Bundle, tmp_path: Path) -> None:
    with bca_serve(exported.directory, tmp_path / "log", "--no-access-log") as server:
        assert server.get("/v2/health/live").status_code == 200
        assert "/v2/health/live" not in server.log.read_text(encoding="utf-8")


def test_a_body_limit_beyond_what_protobuf_holds_is_fine(exported: Bundle, tmp_path: Path) -> None:
    with bca_serve(exported.directory, tmp_path / "log", "--max-body-mib", "4096") as server:
        assert len(by_grpc(server, make(1, 4, 3))) == 2


@pytest.mark.parametrize("token", [None, "x", "open", "open-sesame-2", "öpen"])
def test_without_the_right_token_only_the_probes_answer(small: Server, token: str | None) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
    for path in ("/v2", "/v2/models/bca", "/metrics", "/nothing"):
        assert small.get(path, headers=headers).status_code == 401
    assert small.get("/v2/health/ready").status_code == 200
    with grpc_client.InferenceServerClient(small.grpc) as client:
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException) as refused:
            client.get_model_metadata("bca", headers={"authorization": "Bearer wrong"})
    assert refused.value.status() == "StatusCode.UNAUTHENTICATED"


def test_with_the_right_token_all_is_well(small: Server) -> None:
    with RemoteSession(f"grpc://{small.grpc}", token="open-sesame") as remote:  # noqa: S106
        assert len(remote(X, CONTEXT)) == 2
    with RemoteSession(f"grpc://{small.grpc}") as nameless, pytest.raises(ServerError, match="a valid bearer token is needed"):
        nameless(X, CONTEXT)


def test_the_token_is_in_no_line_of_the_log(small: Server) -> None:
    small.get("/v2/models/bca", headers={"Authorization": "Bearer open-sesame"})
    assert "open-sesame" not in small.log.read_text(encoding="utf-8")


def test_the_access_log_has_one_readable_line_for_every_request(served: Server) -> None:
    by_rest(served, make(1, 4, 3))
    by_grpc(served, make(1, 4, 3))
    served.get("/v2/models/a%0Ab%20c")  # a newline in a path is no newline in the log
    when, took = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", r"\d+\.\d ms"
    for what in (
        r"127\.0\.0\.1 POST /v2/models/bca/infer 200",
        r"ipv4:127\.0\.0\.1:\d+ grpc ModelInfer OK",
        r"127\.0\.0\.1 GET /v2/models/a%0Ab%20c 404",
    ):
        until(lambda what=what: re.search(rf"(?m)^{when} {what} {took}$", served.log.read_text(encoding="utf-8")))


def test_an_answer_does_not_wait_for_nagles_delay(exported: Bundle, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    code = f"""
import socket
from uvicorn.protocols.http.h11_impl import H11Protocol
made = H11Protocol.connection_made
def noting(self, transport):
    made(self, transport)
    option = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    open({str(seen)!r}, "a").write(f"{{option != 0}} ")
H11Protocol.connection_made = noting
"""
    with bca_serve(exported.directory, tmp_path / "log", program=(*BCA[:2], code + BCA[2])) as server:
        assert server.get("/v2/health/ready").status_code == 200
    assert set(seen.read_text().split()) == {"True"}


def test_it_listens_on_loopback_alone_unless_told_otherwise(served: Server) -> None:
    for address in (served.http, served.grpc):
        port = int(address.rsplit(":", 1)[1])
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", port))  # what listens on every address answers here as well


def test_it_listens_on_ipv6_where_it_is_told_so(exported: Bundle, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with bca_serve(exported.directory, tmp_path / "log", "--host", "::1") as server:
        assert server.http.startswith("[::1]:")
        assert server.get("/v2/health/ready").status_code == 200
        assert len(by_grpc(server, make(1, 4, 3))) == 2
        assert "open to the network" not in server.log.read_text(encoding="utf-8")


def test_tls_on_both_protocols(exported: Bundle, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    options = ("--tls-cert", str(certificate), "--tls-key", str(key))
    with bca_serve(exported.directory, tmp_path / "log", *options) as server:
        assert server.scheme == "https"
        assert server.get("/v2/health/ready", verify=ssl.create_default_context(cafile=certificate)).status_code == 200
        address = server.grpc.replace("127.0.0.1", "localhost")
        with RemoteSession(f"grpcs://{address}", root_certificates=certificate) as remote:
            assert len(remote(X, CONTEXT)) == 2
        with RemoteSession(f"grpc://{server.grpc}", attempts=1) as plain, pytest.raises(ServerError, match="is not there"):
            plain(X, CONTEXT)


def write_certificate(place: Path, password: bytes | None = None) -> tuple[Path, Path]:
    """A certificate of our own for this machine, valid for an hour."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    local = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(hours=1))
    signed = builder.add_extension(x509.SubjectAlternativeName(local), critical=False).sign(key, hashes.SHA256())
    (place / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain: Any = serialization.NoEncryption()
    encryption = serialization.BestAvailableEncryption(password) if password else plain
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    (place / "key.pem").write_bytes(pem)
    return place / "cert.pem", place / "key.pem"


def test_options_that_do_not_fit_are_refused_before_anything_is_served(
    exported: Bundle, served: Server, tmp_path: Path
) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "cert.pem").write_text("no certificate")
    taken = served.http.rsplit(":", 1)[1]
    certificate = str(tmp_path / "cert.pem")
    (tmp_path / "locked").mkdir()
    locked = [str(file) for file in write_certificate(tmp_path / "locked", b"secret")]
    for options, message in (
        (["--http-port", taken], f"127.0.0.1 port {taken} cannot be listened on: Address already in use"),
        (
            ["--http-port", "0", "--grpc-port", served.grpc.rsplit(":", 1)[1]],
            "cannot be listened on; choose another --grpc-port",
        ),
        (["--token-file", str(tmp_path / "empty")], "must be one word of ASCII characters"),
        (["--token-file", str(tmp_path / "none")], "No such file or directory"),
        (["--tls-cert", certificate], "--tls-cert and --tls-key go together"),
        (["--tls-cert", certificate, "--tls-key", certificate], "are no certificate and its key"),
        (["--tls-cert", locked[0], "--tls-key", locked[1]], "give both as PEM, without a password"),
        (["--http-port", "0", "--grpc-port", "0", "--backend", "rtx"], "has no rtx engine; build one: bca build"),
    ):
        done = subprocess.run([*BCA, "serve", str(exported.directory), *options], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_without_kserve_the_error_holds_the_command(monkeypatch: pytest.MonkeyPatch, exported: Bundle) -> None:
    monkeypatch.setitem(sys.modules, "kserve", None)
    done = bca("serve", exported.directory)
    assert done.exit_code == 2
    assert "kserve is not installed; run: pip install 'bca-deploy[serve]'" in done.output


def test_a_bundle_whose_self_test_fails_is_not_served(exported: Bundle, tmp_path: Path) -> None:
    bundle = tmp_path / "off"
    shutil.copytree(exported.directory, bundle)
    with np.load(bundle / SELFTEST_FILE) as file:
        arrays = {name: array * 1.5 if "/output/" in name else array for name, array in file.items()}
    np.savez(bundle / SELFTEST_FILE, **arrays)
    manifest = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    path = bundle / SELFTEST_FILE
    manifest["files"][SELFTEST_FILE] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (bundle / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
    command = [*BCA, "serve", str(bundle), "--http-port", "0", "--grpc-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "self-test" in done.stderr
    assert "serving" not in done.stdout


def test_an_idle_server_with_the_model_in_it_stays_under_300_mb(served: Server) -> None:
    for _ in range(20):
        by_grpc(served, make(8, 64, 64))
    assert served.rss_mb() < 300


def test_inputs_are_refused_by_the_client_with_the_same_words(served: Server, session: Session) -> None:
    with RemoteSession(f"grpc://{served.grpc}") as remote:
        for inputs, _ in REFUSALS.values():
            with pytest.raises(InputError) as here:
                session.run(inputs)
            with pytest.raises(InputError) as there:
                remote.run(inputs)
            axes = re.compile(r"(?<=: )\[[^]]*\]$")  # named by the session, which the protocol does not do
            assert axes.sub("", str(there.value)) == axes.sub("", str(here.value))
