"""What the driver says of the GPUs, and `bca doctor`: what is there, what it is for, and the command for what is missing."""

import json
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.processes import HEAVY, run_without
from typer.testing import CliRunner

from bca_deploy.bundle.manifest import GpuEntry
from bca_deploy.cli import app, doctor
from bca_deploy.cli.doctor import Finding, examine
from bca_deploy.engines import gpus
from bca_deploy.engines.gpus import Gpus

NAMES = ["Python", "torch", "onnx", "onnxruntime", "TensorRT-RTX", "TensorRT", "cuda-core", "CUDA driver"]
PACKAGES = ("torch", "onnx", "onnxruntime", "tensorrt_rtx", "tensorrt", "cuda.core", "pynvml")
ADA = GpuEntry(name="NVIDIA L4", compute_capability="sm89", driver="580.95.05")
BLACKWELL = GpuEntry(name="NVIDIA RTX PRO 6000", compute_capability="sm120", driver="580.95.05")


class NVMLError(Exception):
    """As pynvml's: the base of all that its functions raise."""


class Nvml:
    """pynvml with two GPUs; ``failing`` names a function that raises, ``encode`` makes texts into what old versions return."""

    NVMLError = NVMLError

    def __init__(self, encode: Callable[[str], Any] = str, failing: str = "", count: int = 2) -> None:
        self.encode, self.failing, self.count = encode, failing, count
        self.open = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name == super().__getattribute__("failing"):
            raise NVMLError("Driver Not Loaded")
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> Any:  # noqa: N802
        return self.encode("580.95.05")

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return 13010

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: N802
        return ((8, 9), (12, 0))[handle]

    def nvmlDeviceGetName(self, handle: int) -> Any:  # noqa: N802
        return self.encode((ADA.name, BLACKWELL.name)[handle])


def finding(name: str, findings: tuple[Finding, ...] | None = None) -> Finding:
    (found,) = [f for f in (examine() if findings is None else findings) if f.name == name]
    return found


def with_gpus(monkeypatch: pytest.MonkeyPatch, *found: GpuEntry) -> None:
    said = Gpus(found, "13.1") if found else Gpus(why_none="the driver lists no GPU")
    monkeypatch.setattr(doctor, "query", lambda: said)


def with_onnxruntime(monkeypatch: pytest.MonkeyPatch, *providers: str) -> None:
    module = SimpleNamespace(__version__="1.30.0", get_available_providers=lambda: [f"{p}ExecutionProvider" for p in providers])
    monkeypatch.setitem(sys.modules, "onnxruntime", module)


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


# ---- the driver


@pytest.mark.parametrize("encode", [str, str.encode], ids=["str", "bytes"])
def test_the_gpus_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch, encode: Callable[[str], Any]) -> None:
    nvml = Nvml(encode)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpus.query() == Gpus((ADA, BLACKWELL), "13.1", "")
    assert nvml.open == 0


def test_a_driver_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(count=0))
    assert gpus.query() == Gpus((), "13.1", "the driver lists no GPU")


def test_a_driver_that_does_not_answer_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml(failing="nvmlInit")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpus.query() == Gpus(why_none="no NVIDIA driver answers (Driver Not Loaded)")
    assert nvml.open == 0


@pytest.mark.parametrize("failing", ["nvmlSystemGetDriverVersion", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetName"])
def test_a_driver_that_fails_halfway_is_no_gpu(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    nvml = Nvml(failing=failing)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpus.query() == Gpus(why_none="the NVIDIA driver does not say what is there (Driver Not Loaded)")
    assert nvml.open == 0


def test_without_the_drivers_package_the_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pynvml")
    assert gpus.query() == Gpus(why_none="nvidia-ml-py is not installed; run: pip install nvidia-ml-py")


# ---- the doctor


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *PACKAGES)
    assert [(f.name, f.ok, f.found, f.fix) for f in examine()[1:]] == [
        ("torch", False, "", "pip install 'bca-deploy[export]'"),
        ("onnx", False, "", "pip install 'bca-deploy[export]'"),
        ("onnxruntime", False, "", "pip install 'bca-deploy[cpu]'"),
        ("TensorRT-RTX", False, "", "pip install 'bca-deploy[rtx]'"),
        ("TensorRT", False, "", "pip install 'bca-deploy[tensorrt]'"),
        ("cuda-core", False, "", "pip install 'bca-deploy[rtx]'"),
        ("CUDA driver", False, "", "nvidia-ml-py is not installed; run: pip install nvidia-ml-py"),
    ]
    assert finding("Python").ok


def test_what_is_there_comes_with_its_version() -> None:
    findings = examine()
    for name in ("Python", "torch", "onnx", "onnxruntime", "TensorRT-RTX"):
        assert finding(name, findings).ok
        assert finding(name, findings).found[0].isdecimal()
    assert finding("TensorRT-RTX", findings).found.endswith(", targets sm75, sm80, sm86, sm89, sm120, sm121")
    assert all(f.enables for f in findings)


def test_a_library_that_does_not_load_is_to_be_reinstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise OSError(f"{name}: libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr("bca_deploy.engines.libraries.import_module", broken)
    assert finding("TensorRT-RTX").fix == "pip install --force-reinstall tensorrt-rtx-cu13"
    assert finding("TensorRT").fix == "pip install --force-reinstall tensorrt"


def test_every_gpu_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, ADA, BLACKWELL)
    findings = examine()
    assert [f.name for f in findings] == [*NAMES, "GPU 0", "GPU 1"]
    assert finding("CUDA driver", findings).found == "580.95.05, up to CUDA 13.1"
    assert finding("GPU 1", findings).found == "NVIDIA RTX PRO 6000, sm120"


def test_onnxruntime_for_the_cpu_on_a_machine_with_a_gpu_is_to_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, ADA)
    with_onnxruntime(monkeypatch, "CPU")
    # The two overwrite each other's files, so one goes before the other comes.
    assert finding("onnxruntime").fix == "pip uninstall -y onnxruntime && pip install 'bca-deploy[gpu]'"
    assert finding("onnxruntime").found == "1.30.0, providers CPU"


def test_onnxruntime_that_fits_the_machine_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with_onnxruntime(monkeypatch, "CPU")
    with_gpus(monkeypatch)
    assert finding("onnxruntime").fix == ""
    with_gpus(monkeypatch, ADA)
    with_onnxruntime(monkeypatch, "CUDA", "CPU")
    assert (finding("onnxruntime").ok, finding("onnxruntime").fix) == (True, "")


def test_a_machine_with_a_gpu_is_offered_onnxruntime_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, ADA)
    without(monkeypatch, "onnxruntime")
    assert finding("onnxruntime").fix == "pip install 'bca-deploy[gpu]'"


# ---- the command


def test_the_command_prints_every_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, ADA)
    without(monkeypatch, "tensorrt")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "-- TensorRT " in result.output
    for name in [*NAMES[:5], "CUDA driver", "GPU 0"]:
        assert f"ok {name} " in result.output


def test_the_command_prints_json_with_names_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    findings = json.loads(result.stdout)
    assert [f["name"] for f in findings] == NAMES
    assert {tuple(f) for f in findings} == {("name", "ok", "found", "enables", "fix")}


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"]], ids=" ".join)
def test_the_command_needs_nothing_but_the_base_package(arguments: list[str]) -> None:
    script = f"""
from bca_deploy.cli import app
app({arguments!r}, standalone_mode=False)
"""
    done = run_without((*HEAVY, *PACKAGES), script)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pip install 'bca-deploy[export]'" in " ".join(done.stdout.split())
