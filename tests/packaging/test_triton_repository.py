"""The Triton model repository: what is written, and what the real Triton makes of it."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from google.protobuf import text_format
from support.layers import make_checkpoint
from support.requests import bca, make
from support.servers import PATIENCE_S, Server, put_stand_in, triton_environment, tritonserver
from tritonclient.grpc.model_config_pb2 import ModelConfig

import bca_deploy
from bca_deploy.bundle.engine_options import BuildOptions
from bca_deploy.bundle.manifest import EngineEntry, GpuEntry, Manifest
from bca_deploy.bundle.read import Bundle, sha256
from bca_deploy.bundle.write import seal
from bca_deploy.errors import EngineError, InputError
from bca_deploy.packaging import triton_repository as packaging
from bca_deploy.packaging.triton_repository import Options
from bca_deploy.serving.client import RemoteSession
from bca_deploy.session.session import Session
from bca_deploy.signature import DimRange, Dims
from bca_deploy.spec import LAYER_DIMS


@pytest.fixture(scope="module")
def session(exported: Bundle) -> Iterator[Session]:
    with bca_deploy.open(exported.directory) as opened:
        yield opened


def config_of(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())


# ---- what is written


def test_the_front_takes_ragged_requests_with_optional_masks_and_the_engine_takes_whole_batches(
    exported: Bundle, tmp_path: Path
) -> None:
    front, engine = map(config_of, packaging.write(exported, tmp_path / "models", Options(max_delay_ms=5, max_queue=9)))
    assert (front.name, front.backend, front.max_batch_size) == ("bca", "python", 64)
    shapes = {tensor.name: list(tensor.dims) for tensor in front.input}
    assert shapes == {"x": [-1, 24], "context": [-1, 16], "mask": [-1], "context_mask": [-1]}
    assert all(tensor.allow_ragged_batch for tensor in front.input)
    assert [tensor.name for tensor in front.input if tensor.optional] == ["mask", "context_mask"]
    assert front.dynamic_batching.max_queue_delay_microseconds == 5000
    assert front.dynamic_batching.default_queue_policy.max_queue_size == 9
    assert (engine.name, engine.platform, engine.max_batch_size) == ("bca_engine", "onnxruntime_onnx", 0)
    assert {tensor.name: list(tensor.dims) for tensor in engine.output} == {"out": [-1, -1, 24], "context_out": [-1, -1, 16]}


def test_the_engine_is_warmed_up_at_the_optimal_sizes(exported: Bundle, tmp_path: Path) -> None:
    (warmup,) = config_of(packaging.write(exported, tmp_path, Options())[1]).model_warmup
    assert list(warmup.inputs["x"].dims) == [4, 512, 24]
    assert list(warmup.inputs["context_mask"].dims) == [4, 512]


def test_the_engine_model_is_the_bundles_file_with_its_weights_beside_it(exported: Bundle, tmp_path: Path) -> None:
    _, engine = packaging.write(exported, tmp_path / "one", Options())
    assert sha256(engine / "1" / "model.onnx") == exported.manifest.files["models/fp32.onnx"].sha256
    outside = bca_deploy.export(
        make_checkpoint(prenorm=True).module(torch.float32), tmp_path / "outside", external_data_bytes=0
    )
    _, engine = packaging.write(outside, tmp_path / "two", Options())
    assert {path.name for path in (engine / "1").iterdir()} == {"model.onnx", "fp32.onnx.data"}


def test_the_front_carries_the_packages_own_rules_unchanged(exported: Bundle, tmp_path: Path) -> None:
    front, _ = packaging.write(exported, tmp_path, Options())
    source = Path(bca_deploy.__file__).parent
    package = front / "1" / "bca_deploy"
    carried = {str(path.relative_to(package)) for path in package.rglob("*.py")} - {"__init__.py"}
    session = {f"session/{room}.py" for room in ("__init__", "contract", "padding")}
    assert carried == {"arithmetic.py", "errors.py", "signature.py"} | session
    for name in carried:
        assert (front / "1" / "bca_deploy" / name).read_bytes() == (source / name).read_bytes()


def test_a_repository_is_added_to_and_never_overwritten(exported: Bundle, tmp_path: Path) -> None:
    packaging.write(exported, tmp_path, Options())
    packaging.write(exported, tmp_path, Options(name="second"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bca", "bca_engine", "second", "second_engine"]
    with pytest.raises(InputError, match="bca exists; remove it, or choose another directory or --name"):
        packaging.write(exported, tmp_path, Options())
    assert len(list(tmp_path.iterdir())) == 4


SHORT = Dims(batch=DimRange(1, 1, 1), x_len=DimRange(1, 64, 128), context_len=DimRange(1, 64, 128))


def tensorrt_bundle(exported: Bundle, place: Path, *capabilities: str, **changes: Any) -> Bundle:
    """The bundle as it would be with engines that TensorRT built on such GPUs; the files hold no engine."""
    directory = Path(shutil.copytree(exported.directory, place))
    model = next(m for m in exported.manifest.models if m.precision == "fp16")
    (directory / "engines").mkdir()
    entries = []
    for capability in capabilities:
        file = f"engines/tensorrt-fp16-{capability}.engine"
        (directory / file).write_bytes(f"an engine for {capability}".encode())
        entry = EngineEntry(
            file=file, library="tensorrt", version="10.13.3.9", model=model.file, model_sha256=sha256(directory / model.file),
            precision="fp16", targets=(), gpu=GpuEntry(name="a GPU", compute_capability=capability, driver="580"),
            profiles=(SHORT, LAYER_DIMS), static=False, matmuls={}, weights={}, scratch_bytes=None, weight_bytes=None,
            attentions_fused=None, fusion_evidence="unknown", options=BuildOptions(),
        )  # fmt: skip
        entries.append(entry.model_copy(update=changes))
    seal(directory, Manifest.model_validate(exported.manifest.model_dump() | {"engines": [e.model_dump() for e in entries]}))
    return Bundle.open(directory)


def test_tensorrt_engines_become_plans_one_for_each_gpu_with_every_profile(exported: Bundle, tmp_path: Path) -> None:
    bundle = tensorrt_bundle(exported, tmp_path / "bundle", "sm90", "sm100")
    front, engine = packaging.write(bundle, tmp_path / "models", Options(tensorrt_version="10.13.3.9"))
    facts = json.loads((front / "1" / "front.json").read_text(encoding="utf-8"))
    assert facts["tensorrt_version"] == "10.13.3.9"
    assert facts["signature"]["dims"]["x_len"] == {"min": 1, "opt": 64, "max": 2048}, "what any of the profiles takes"
    config = config_of(engine)
    assert config.platform == "tensorrt_plan"
    assert dict(config.cc_model_filenames) == {"9.0": "tensorrt-fp16-sm90.plan", "10.0": "tensorrt-fp16-sm100.plan"}
    assert (engine / "1" / "tensorrt-fp16-sm100.plan").read_bytes() == b"an engine for sm100"
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert config.parameters["tensorrt_version"].string_value == "10.13.3.9"
    assert [list(warmup.inputs["x"].dims) for warmup in config.model_warmup] == [[1, 64, 24], [4, 512, 24]]
    _, portable = packaging.write(bundle, tmp_path / "portable", Options(runtime="onnxruntime"))
    assert config_of(portable).platform == "onnxruntime_onnx"


def test_the_front_takes_as_many_rows_as_the_model(exported: Bundle, tmp_path: Path) -> None:
    wide = (LAYER_DIMS, Dims(LAYER_DIMS, batch=DimRange(1, 64, 128)))
    bundle = tensorrt_bundle(exported, tmp_path / "bundle", "sm90", profiles=wide)
    for name, asked, taken in (("one", 64, 128), ("two", 200, 200)):
        front, _ = packaging.write(bundle, tmp_path / "models", Options(name, max_batch=asked))
        assert config_of(front).max_batch_size == taken


def test_engines_that_later_versions_load_are_not_mixed_with_others(exported: Bundle, tmp_path: Path) -> None:
    compatible = BuildOptions(version_compatible=True)
    bundle = tensorrt_bundle(exported, tmp_path / "bundle", "sm90", "sm100")
    entries = [e.model_dump() for e in bundle.manifest.engines]
    entries[0]["options"] = compatible.model_dump()
    seal(bundle.directory, Manifest.model_validate(bundle.manifest.model_dump() | {"engines": entries}))
    with Bundle.open(bundle.directory) as mixed:
        front, engine = packaging.write(mixed, tmp_path / "models", Options())
    assert set(config_of(engine).cc_model_filenames) == {"9.0"}
    assert json.loads((front / "1" / "front.json").read_text(encoding="utf-8"))["version_compatible"] is True


@pytest.mark.parametrize(("changes", "options", "message"), [
    ({"model_sha256": "0" * 64}, Options(), r"sm90.engine cannot be served: models/fp16.onnx has changed since it was built"),
    ({}, Options(tensorrt_version="11.4.0"), r"built by tensorrt 10.13.3.9, and 11.4.0 is installed"),
])  # fmt: skip
def test_an_engine_that_the_server_would_not_load_is_refused(
    exported: Bundle, tmp_path: Path, changes: dict[str, Any], options: Options, message: str
) -> None:
    bundle = tensorrt_bundle(exported, tmp_path / "bundle", "sm90", **changes)
    with pytest.raises(EngineError, match=message):
        packaging.write(bundle, tmp_path / "models", options)
    assert not (tmp_path / "models").exists()


def test_tensorrt_is_never_replaced_by_something_else_when_it_was_asked_for(exported: Bundle, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="has no tensorrt engine; build one: bca build"):
        packaging.write(exported, tmp_path, Options(runtime="tensorrt"))


def test_bca_package_writes_what_it_is_asked_for(exported: Bundle, tmp_path: Path) -> None:
    done = bca("package", exported.directory, "--triton", tmp_path / "models", "--name", "fusion")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "models" / "fusion_engine" / "config.pbtxt").is_file()
    done = bca("package", exported.directory)
    assert done.exit_code == 2
    assert "give --triton DIRECTORY, --kserve FILE or --docker FILE" in done.output


# ---- the real Triton


def answers(session: Session, got: Any, inputs: dict[str, np.ndarray]) -> None:
    """The golden check: that server answers 200 with wrong numbers when its numpy is too new."""
    masks = [inputs.get(name) for name in ("mask", "context_mask")]
    for name, mask, wanted in zip(("out", "context_out"), masks, session(**inputs), strict=True):
        live = np.ones(wanted.shape[:2], bool) if mask is None else mask
        assert got.as_numpy(name).shape == wanted.shape
        np.testing.assert_allclose(got.as_numpy(name)[live], wanted[live], atol=1e-6)


def filled(library: Any, inputs: dict[str, np.ndarray]) -> list[Any]:
    kinds = {"float32": "FP32", "bool": "BOOL"}
    return [library.InferInput(n, a.shape, kinds[a.dtype.name]).set_data_from_numpy(a) for n, a in inputs.items()]


@pytest.mark.parametrize("library", [http_client, grpc_client], ids=["http", "grpc"])
@pytest.mark.parametrize("masked", [True, False], ids=["masks", "no masks"])
def test_tritonclient_gets_what_the_session_gives(triton: Server, session: Session, library: Any, masked: bool) -> None:
    client = library.InferenceServerClient(triton.http if library is http_client else triton.grpc)
    for sizes in ((1, 1, 1), (2, 7, 5), (8, 33, 40)):
        inputs = make(*sizes, masked=masked)
        answers(session, client.infer("bca", filled(library, inputs)), inputs)
    client.close()


def engine_runs(server: Server) -> int:
    with grpc_client.InferenceServerClient(server.grpc) as client:
        return int(client.get_inference_statistics("bca_engine").model_stats[0].execution_count)


@pytest.fixture(scope="module")
def patient(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Triton with a front that waits until its batch of 64 is full: what comes together meets, however slowly it comes."""
    root = tmp_path_factory.mktemp("patient")
    _, engine = packaging.write(exported, root / "models", Options(max_batch=64, max_delay_ms=PATIENCE_S * 1e3))
    put_stand_in(engine)
    with tritonserver(root / "models", root / "log") as server:
        yield server


def test_64_ragged_requests_at_the_same_time_take_at_most_20_engine_runs(patient: Server, session: Session) -> None:
    rng = np.random.default_rng(0)
    requests = [make(1, int(n), int(m), seed) for seed, (n, m) in enumerate(rng.integers(16, 513, (64, 2)))]
    for inputs in requests:
        inputs["mask"][:, 0] = inputs["context_mask"][:, 0] = True
    with RemoteSession(f"grpc://{patient.grpc}", deadline_s=PATIENCE_S) as remote, ThreadPoolExecutor(64) as pool:
        assert remote.inputs
        before = engine_runs(patient)
        results = list(pool.map(remote.run, requests))
    for got, inputs in zip(results, requests, strict=True):
        for name, mask in (("out", "mask"), ("context_out", "context_mask")):
            np.testing.assert_allclose(got[name][inputs[mask]], session.run(inputs)[name][inputs[mask]], atol=1e-6)
    assert engine_runs(patient) - before <= 20


def test_a_bad_request_fails_alone_among_good_ones(triton: Server, session: Session) -> None:
    good, bad = make(1, 9, 9), make(1, 9, 9) | {"x": np.zeros((1, 2049, 24), np.float32), "mask": np.ones((1, 2049), bool)}
    with RemoteSession(f"grpc://{triton.grpc}") as remote, ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(remote.run, bad if index % 4 == 0 else good) for index in range(32)]
        for index, call in enumerate(calls):
            if index % 4 == 0:
                with pytest.raises(InputError, match=r"input x: axis 1 \(x_len\) is 2049, allowed 1 to 2048"):
                    call.result()
            else:
                np.testing.assert_allclose(
                    call.result()["out"][good["mask"]], session.run(good)["out"][good["mask"]], atol=1e-6
                )


def test_a_model_with_a_bias_is_served_request_by_request(tmp_path: Path) -> None:
    module = make_checkpoint(prenorm=True).module(torch.float32)
    bundle = bca_deploy.export(module, tmp_path / "bias", inputs={"rel_pos_bias": "shared"}, outputs={"attention_maps": True})
    front, engine = packaging.write(bundle, tmp_path / "models", Options())
    assert config_of(front).max_batch_size == 0
    put_stand_in(engine)
    inputs = make(2, 7, 5) | {"rel_pos_bias": np.random.default_rng(1).standard_normal((3, 7, 5)).astype(np.float32)}
    with (
        tritonserver(tmp_path / "models", tmp_path / "log") as server,
        RemoteSession(f"grpc://{server.grpc}") as remote,
        bca_deploy.open(bundle.directory) as local,
    ):
        assert [(t.name, t.dtype, len(t.axes)) for t in remote.inputs] == [(t.name, t.dtype, len(t.axes)) for t in local.inputs]
        for name, wanted in local.run(inputs).items():
            np.testing.assert_allclose(remote.run(inputs)[name], wanted, atol=1e-6)


def gave_up(repository: Path, log: Path, **env: str) -> str:
    with tritonserver(repository, log, env, ready=False) as server:
        assert server.process.returncode not in (None, 0)
    return re.sub(r"\s*\|\s*\n\|\s*\|\s*\|\s*", " ", log.read_text(encoding="utf-8"))


def test_the_engine_models_are_right_up_to_the_backend_that_this_triton_has_not(exported: Bundle, tmp_path: Path) -> None:
    triton_environment()
    packaging.write(exported, tmp_path / "models", Options(name="one"))
    packaging.write(tensorrt_bundle(exported, tmp_path / "bundle", "sm90"), tmp_path / "models", Options(name="two"))
    text = gave_up(tmp_path / "models", tmp_path / "log")
    for backend in ("onnxruntime", "tensorrt"):
        assert f"unable to find backend library for backend '{backend}'" in text
    failures = set(re.findall(r"failed to load '(\w+)' version 1: ([^\n]{0,60})", text))
    assert {name for name, _ in failures} == {"one_engine", "two_engine"}, failures


def with_numpy_2(front: Path, checked: bool) -> None:
    """Give the front the numpy of these tests, which is 2, in place of the server's; and take its guard away unless checked."""
    assert int(np.__version__.split(".")[0]) >= 2
    path = front / "1" / "model.py"
    text = path.read_text(encoding="utf-8")
    text = text if checked else text.replace("        _check_numpy()\n", "")
    site = str(Path(np.__file__).parents[1])
    path.write_text(f"import sys\nsys.path.insert(0, {site!r})\n{text}", encoding="utf-8")


def test_the_front_refuses_numpy_2(exported: Bundle, tmp_path: Path) -> None:
    triton_environment()
    front, engine = packaging.write(exported, tmp_path / "models", Options())
    put_stand_in(engine)
    with_numpy_2(front, checked=True)
    text = gave_up(tmp_path / "models", tmp_path / "log")
    assert f"numpy {np.__version__} is installed, and Triton's python backend is made for numpy 1" in text


def test_the_golden_check_finds_the_wrong_numbers_that_numpy_2_makes(
    exported: Bundle, session: Session, tmp_path: Path
) -> None:
    _, engine = packaging.write(exported, tmp_path / "models", Options())
    put_stand_in(engine)
    with_numpy_2(engine, checked=False)
    inputs = make(2, 7, 5)
    with tritonserver(tmp_path / "models", tmp_path / "log") as server:
        client = http_client.InferenceServerClient(server.http)
        result = client.infer("bca", filled(http_client, inputs))
        client.close()
    with pytest.raises(AssertionError):
        answers(session, result, inputs)


@pytest.mark.parametrize("found", ["10.8.0.43+cuda12.8", "11.4.0"])
def test_the_front_refuses_another_tensorrt_than_the_engines(exported: Bundle, tmp_path: Path, found: str) -> None:
    bundle = tensorrt_bundle(exported, tmp_path / "bundle", "sm90")
    packaging.write(bundle, tmp_path / "models", Options())
    triton_environment()
    text = gave_up(tmp_path / "models", tmp_path / "log", TRT_VERSION=found)
    assert f"the engine is for TensorRT 10.13.3.9, and this server has {found.split('+', 1)[0]}" in text


@pytest.mark.parametrize(("found", "loads"), [("11.4.0", True), ("10.13.3.9+cuda13", True), ("10.9.0", False)])
def test_the_front_takes_a_later_tensorrt_for_a_version_compatible_engine(
    exported: Bundle, tmp_path: Path, found: str, loads: bool
) -> None:
    options = BuildOptions(version_compatible=True)
    bundle = tensorrt_bundle(exported, tmp_path / "bundle", "sm90", options=options)
    packaging.write(bundle, tmp_path / "models", Options(tensorrt_version="11.4.0"))
    triton_environment()
    text = gave_up(tmp_path / "models", tmp_path / "log", TRT_VERSION=found)
    assert ("failed to load 'bca' version 1" not in text) == loads
    assert ("the engine is for TensorRT 10.13.3.9 or later, and this server has 10.9.0" in text) != loads
