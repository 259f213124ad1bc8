"""onnxruntime as a backend: what its GPU providers are told, and arrays that stay where they are. Their work is a GPU's."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.gpu_double import DeviceTensor, HostGpu
from support.layers import make_checkpoint
from support.requests import make
from support.rounding import is_same

import bca_deploy
from bca_deploy import optional
from bca_deploy.bundle.manifest import GpuEntry
from bca_deploy.bundle.read import Bundle
from bca_deploy.engines.gpus import Gpus
from bca_deploy.errors import EngineError, InputError
from bca_deploy.session.backends import choice
from bca_deploy.session.backends import ort as ort_backend


class Binding:
    """An IOBinding whose CUDA is the host: it hands both kinds of memory to the CPU provider."""

    def __init__(self, real: Any) -> None:
        self.real, self.bound, self.waited = real, list[tuple[str, str]](), False

    def bind_input(self, name: str, device: str, number: int, *rest: Any) -> None:
        self.bound.append((name, device))
        self.real.bind_input(name, "cpu", number, *rest)

    def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
        self.bound.append((name, "cpu"))
        self.real.bind_cpu_input(name, array)

    def bind_output(self, name: str, device: str, number: int, *rest: Any) -> None:
        self.bound.append((name, device))
        self.real.bind_output(name, "cpu", number, *rest)

    def synchronize_outputs(self) -> None:
        self.waited = True


class Ort:
    """onnxruntime as a build with GPU providers shows itself, computing on the CPU."""

    def __init__(self, real: Any) -> None:
        self.real, self.providers, self.bindings = real, list[Any](), list[Binding]()
        self.starts, self.__version__, self.SessionOptions = True, real.__version__, real.SessionOptions

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, path: str, options: Any, providers: list[Any]) -> Any:  # noqa: N802  (onnxruntime's name)
        self.providers.append(providers)
        real, ort = self.real.InferenceSession(path, options, providers=["CPUExecutionProvider"]), self

        class Session:
            run = real.run

            def get_providers(self) -> list[str]:
                return [name for name, _ in providers if ort.starts] + ["CPUExecutionProvider"]

            def io_binding(self) -> Binding:
                ort.bindings.append(Binding(real.io_binding()))
                return ort.bindings[-1]

            def run_with_iobinding(self, binding: Binding) -> None:
                real.run_with_iobinding(binding.real)

        return Session()


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> Ort:
    found, gpu = Ort(optional.onnxruntime()), HostGpu("sm90")
    for module in (optional, ort_backend):
        monkeypatch.setattr(module, "onnxruntime", lambda: found)
    monkeypatch.setattr(ort_backend, "open_gpu", lambda: gpu)
    gpus = Gpus((GpuEntry(name="Double", compute_capability="sm90", driver="1"),), "13.0")
    monkeypatch.setattr(choice, "query", lambda: gpus)
    return found


def test_auto_takes_cuda_before_tensorrt_as_that_compiles_for_minutes(exported: Bundle, ort: Ort) -> None:
    with bca_deploy.open(exported.directory) as session:
        assert session.explain().chosen.startswith("onnxruntime-cuda: models/fp16.onnx on onnxruntime")


def test_the_tensorrt_provider_is_told_the_ranges_of_every_input(exported: Bundle, ort: Ort, tmp_path: Path) -> None:
    bca_deploy.open(exported.directory, backend="onnxruntime-tensorrt", cache=tmp_path).close()
    ((provider, settings),) = ort.providers[0]
    assert provider == "TensorrtExecutionProvider"
    assert settings == {
        "trt_profile_min_shapes": "x:1x1x24,context:1x1x16,mask:1x1,context_mask:1x1",
        "trt_profile_opt_shapes": "x:4x512x24,context:4x512x16,mask:4x512,context_mask:4x512",
        "trt_profile_max_shapes": "x:8x2048x24,context:8x2048x16,mask:8x2048,context_mask:8x2048",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(tmp_path),
    }


def test_half_precision_on_the_tensorrt_provider_is_refused_with_the_way_out(exported: Bundle, ort: Ort) -> None:
    with pytest.raises(InputError, match=r"^precision fp16 with onnxruntime-tensorrt: .* bca build .* --engine tensorrt$"):
        bca_deploy.open(exported.directory, backend="onnxruntime-tensorrt", precision="fp16")


def test_bfloat16_edges_are_refused_with_the_way_out_and_passed_over_in_auto(tmp_path: Path, ort: Ort) -> None:
    module = make_checkpoint().module(torch.float32)
    bundle = bca_deploy.export(module, tmp_path / "bf16", precision=("bf16", "fp32"), keep_io_types=False)
    with pytest.raises(InputError, match=r"^models/bf16.onnx takes bfloat16, .*; export it with --keep-io-types, or choose"):
        bca_deploy.open(bundle.directory, backend="onnxruntime-cuda", precision="bf16")
    with bca_deploy.open(bundle.directory) as session:
        assert session.explain().chosen.startswith("onnxruntime-cuda: models/fp32.onnx")


def test_side_by_side_on_a_gpu_opens_no_second_session(exported: Bundle, ort: Ort) -> None:
    with bca_deploy.open(exported.directory, precision="fp32", backend="onnxruntime-cuda") as session:
        session.run_many([tuple(make(1, 3, 4).values())] * 4, policy="alone")
    assert len(ort.providers) == 1


def test_a_provider_that_does_not_start_is_an_error_and_no_fallback(exported: Bundle, ort: Ort) -> None:
    ort.starts = False
    with pytest.raises(EngineError, match=r"^CUDAExecutionProvider does not start here; run with ORT_LOGGING_LEVEL=1"):
        bca_deploy.open(exported.directory, backend="onnxruntime-cuda")


def test_arrays_on_the_gpu_are_bound_where_they_are(exported: Bundle, ort: Ort) -> None:
    inputs = make(2, 5, 3)
    with bca_deploy.open(exported.directory, backend="onnxruntime-cuda", precision="fp32") as session:
        wanted = session(**inputs)
        given = inputs | {name: DeviceTensor(inputs[name].copy()) for name in ("x", "context")}
        found = session(**given)
    for ours, theirs in zip(found, wanted, strict=True):
        assert isinstance(ours, DeviceTensor)
        assert is_same(ours.array, theirs)
    (binding,) = ort.bindings
    assert binding.waited
    assert dict(binding.bound) == {
        "x": "cuda",
        "context": "cuda",
        "mask": "cpu",
        "context_mask": "cpu",
        "out": "cuda",
        "context_out": "cuda",
    }


def test_onnxruntime_reports_nothing_and_the_environment_stays_as_it_was(tmp_path: Path, repository: Path) -> None:
    model = repository / "tests" / "fixtures" / "format1" / "models" / "fp32.onnx"
    code = (
        "import os; before = dict(os.environ); from bca_deploy.session.backends.ort import onnxruntime; ort = onnxruntime();"
        f"ort.InferenceSession({str(model)!r}, providers=['CPUExecutionProvider']); assert dict(os.environ) == before"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    subprocess.run([sys.executable, "-c", code], env=environment | {"HOME": str(tmp_path)}, check=True)
    assert list(tmp_path.iterdir()) == []
