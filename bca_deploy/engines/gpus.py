"""The NVIDIA GPUs of this machine, asked of the driver. No CUDA context is made, and no GPU is needed to import this."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bca_deploy.bundle.manifest import GpuEntry


@dataclass(frozen=True)
class Gpus:
    """What the driver says.

    Attributes:
        found: the GPUs in the driver's order.
        cuda: the newest CUDA version the driver supports, such as 13.0; empty without a driver.
        why_none: why ``found`` is empty; empty otherwise.
    """

    found: tuple[GpuEntry, ...] = ()
    cuda: str = ""
    why_none: str = ""


def query() -> Gpus:
    """Ask the driver through nvidia-ml-py."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return Gpus(why_none="nvidia-ml-py is not installed; run: pip install nvidia-ml-py")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Gpus(why_none=f"no NVIDIA driver answers ({error})")
    try:
        return _read(nvml)
    except nvml.NVMLError as error:  # a GPU that fell off the bus, or that this user may not see
        return Gpus(why_none=f"the NVIDIA driver does not say what is there ({error})")
    finally:
        nvml.nvmlShutdown()


def _read(nvml: Any) -> Gpus:
    driver, version = _text(nvml.nvmlSystemGetDriverVersion()), nvml.nvmlSystemGetCudaDriverVersion()
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    found = []
    for handle in handles:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        name = _text(nvml.nvmlDeviceGetName(handle))
        found.append(GpuEntry(name=name, compute_capability=f"sm{major}{minor}", driver=driver))
    cuda = f"{version // 1000}.{version % 1000 // 10}"
    return Gpus(tuple(found), cuda, "" if found else "the driver lists no GPU")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
