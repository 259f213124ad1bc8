"""A model of other names, ranks and element types than the layer's runs in Python, in C++, in bca serve and in Triton."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import clips, native
from support.clips import SIGNATURE, answered, requested
from support.servers import Server, bca_serve, cpp_serve, put_stand_in, tritonserver

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import InputError
from bca_deploy.session.session import Session

LENGTHS = [(1, 3, 4), (2, 7, 2), (1, 4, 5), (3, 8, 3), (1, 5, 5), (2, 6, 4)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return clips.make_bundle(tmp_path_factory.mktemp("clips") / "model")


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> Iterator[Session]:
    with bca_deploy.open(bundle.directory) as opened:
        yield opened


def assert_right(outputs: Any, given: dict[str, Any]) -> None:
    for name, array in answered(given).items():
        if name not in outputs and name == "score":
            continue  # of the bundle that has none
        assert outputs[name].dtype == array.dtype
        assert np.array_equal(outputs[name], array), name


# ---- in Python


@pytest.mark.parametrize("shape", LENGTHS, ids=str)
def test_the_session_runs_it(session: Session, shape: tuple[int, int, int]) -> None:
    given = requested(*shape, seed=1)
    assert_right(session.run(given), given)
    outputs = {t.name: np.empty(t.shape(SIGNATURE.sizes(given)), t.dtype) for t in session.outputs}
    session.run_into(given, outputs)
    assert_right(outputs, given)
    unmasked = {name: given[name] for name in ("frames", "words", "style")}
    assert_right(dict(zip(outputs, session(*unmasked.values()), strict=True)), unmasked)


@pytest.mark.parametrize("policy", ["auto", "alone", "pad"])
def test_many_requests_of_different_lengths_run_together(session: Session, policy: Any) -> None:
    given = [requested(*shape, seed) for seed, shape in enumerate(LENGTHS * 3)]
    before = session.metrics()
    for one, outputs in zip(given, session.run_many([tuple(g.values()) for g in given], policy=policy), strict=True):
        assert_right(dict(zip(answered(one), outputs, strict=True)), one)
    calls = session.metrics().calls - before.calls
    assert calls < len(given) if policy == "pad" else calls == len(given)
    assert (session.metrics().padded_rows > before.padded_rows) == (policy == "pad")


def test_the_session_tells_its_names_and_sizes(bundle: Bundle) -> None:
    told: list[Any] = []
    with bca_deploy.open(bundle.directory, on_call=told.append) as session:
        assert session.signature == SIGNATURE
        session.selftest()
        session.warmup()
        session.warmup([(1, 2, 3)])
    assert [call.sizes for call in told[1:]] == [{"clips": 2, "time": 6, "tokens": 4}, {"clips": 1, "time": 2, "tokens": 3}]
    assert (session.metrics().pairs, session.metrics().rows) == (5, 2 * 7 + 2 * 10 + 1 * 5)


def test_a_request_that_does_not_fit_is_refused_by_those_names(session: Session) -> None:
    given = requested(2, 3, 4, 0)
    for change, message in (
        ({"style": np.zeros((3, 5), np.float32)}, r"^input style: axis 0 \(clips\) is 3, but frames has 2; they must agree$"),
        (
            {"words": np.zeros((2, 17), np.int64), "real": None},
            r"^input words: axis 1 \(tokens\) is 17, allowed 1 to 16; a",
        ),
        ({"words": np.zeros((2, 4), np.int32)}, "^input words has dtype int32, and needs int64; cast=True converts it$"),
    ):
        with pytest.raises(InputError, match=message):
            session.run(given | change)
    with pytest.raises(InputError, match=r"^shape 1x2: give 3 sizes, of clips, time, tokens$"):
        session.warmup([(1, 2)])


# ---- in C++


@pytest.fixture(scope="module")
def bca_run() -> Path:
    if lacking := native.missing("library"):
        pytest.skip(f"runtime/ is not built without {', '.join(lacking)}; make setup as root installs it, or says the command")
    return native.build("release") / "bca-run"


@pytest.mark.slow
def test_the_cpp_runtime_runs_it(bca_run: Path, bundle: Bundle, tmp_path: Path) -> None:
    described = json.loads(native.passed([bca_run, bundle.directory, "--describe"]))
    assert list(described["dims"]) == ["clips", "time", "tokens"]
    assert [tensor["dtype"] for tensor in described["inputs"]] == [tensor.dtype for tensor in SIGNATURE.inputs]
    native.passed([bca_run, bundle.directory, "--selftest"])
    native.passed([bca_run, bundle.directory, "--bench", "--shape", "2x6x4"])
    for shape, masked, narrow in ((LENGTHS[0], True, False), (LENGTHS[1], False, False), (LENGTHS[3], True, True)):
        given = requested(*shape, seed=2)
        if not masked:
            del given["shown"], given["real"]
        np.savez(tmp_path / "in.npz", **given | ({"words": given["words"].astype(np.int32)} if narrow else {}))  # type: ignore[arg-type]
        flags = [part for name in answered(given) for part in ("--output", f"{name}={tmp_path / name}.npy")]
        native.passed([bca_run, bundle.directory, "--input", tmp_path / "in.npz", *flags, *(["--cast"] if narrow else [])])
        assert_right({name: np.load(tmp_path / f"{name}.npy") for name in answered(given)}, given)


@pytest.mark.slow
def test_the_cpp_runtime_refuses_in_the_same_words(bca_run: Path, bundle: Bundle, session: Session, tmp_path: Path) -> None:
    given = requested(2, 3, 4, 0) | {"style": np.zeros((2, 4), np.float32)}
    np.savez(tmp_path / "in.npz", **given)  # type: ignore[arg-type]
    done = native.run([bca_run, bundle.directory, "--input", tmp_path / "in.npz"])
    with pytest.raises(InputError) as refused:
        session.run(given)
    assert done.returncode == 2
    assert str(refused.value) in done.stderr


# ---- behind servers


def remote_answers(server: Server, shapes: list[tuple[int, int, int]]) -> None:
    """Ask for all of them at once; hold a server's metadata, its answers and a refusal to what they should be."""
    with bca_deploy.RemoteSession(f"grpc://{server.grpc}") as remote:
        assert [(t.name, t.dtype, len(t.axes)) for t in remote.inputs] == [
            (t.name, t.dtype, len(t.axes)) for t in SIGNATURE.inputs
        ]
        given = [requested(*shape, seed) for seed, shape in enumerate(shapes)]
        for one, outputs in zip(given, remote.run_many([tuple(g.values()) for g in given]), strict=True):
            assert_right(dict(zip((t.name for t in remote.outputs), outputs, strict=True)), one)
        unmasked = {name: given[0][name] for name in ("frames", "words", "style")}
        assert_right(remote.run(unmasked), unmasked)
        with pytest.raises(
            InputError, match=r"input words: axis 1 \(tokens\) is 17, allowed 1 to 16; a sequence cannot be cut"
        ):
            remote.run(given[0] | {"words": np.zeros((1, 17), np.int64)})


def test_bca_serve_serves_it(bundle: Bundle, tmp_path: Path) -> None:
    with bca_serve(bundle.directory, tmp_path / "log") as server:
        remote_answers(server, LENGTHS * 4)
        given = requested(1, 3, 4, 5)
        entries = [
            {"name": t.name, "shape": list(given[t.name].shape), "datatype": kind, "data": given[t.name].ravel().tolist()}
            for t, kind in zip(SIGNATURE.inputs, ("FP32", "INT64", "FP32", "BOOL", "BOOL"), strict=True)
        ]
        outputs = [{"name": name, "parameters": {"binary_data": False}} for name in answered(given)]
        answer = server.post("/v2/models/bca/infer", json={"inputs": entries, "outputs": outputs}).json()
        found = {e["name"]: np.array(e["data"], np.float32).reshape(e["shape"]) for e in answer["outputs"]}
        assert_right(found, given)


@pytest.mark.slow
def test_the_cpp_server_serves_it(bundle: Bundle, tmp_path: Path) -> None:
    with cpp_serve(bundle.directory, tmp_path / "log") as server:
        remote_answers(server, LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("score", [True, False], ids=["alone", "batched"])
def test_tritons_front_serves_it(tmp_path: Path, score: bool) -> None:
    """Triton batches no tensor that has a batch and nothing else, as the score: with it each request runs alone."""
    from bca_deploy.packaging import triton_repository as packaging

    signature = SIGNATURE if score else replace(SIGNATURE, outputs=SIGNATURE.outputs[:2])
    bundle = clips.make_bundle(tmp_path / "bundle", signature)
    front, engine = packaging.write(bundle, tmp_path / "models", packaging.Options())
    assert ("dynamic_batching" in (front / "config.pbtxt").read_text()) != score
    put_stand_in(engine)
    with tritonserver(tmp_path / "models", tmp_path / "log") as server:
        remote_answers(server, LENGTHS * 4)
