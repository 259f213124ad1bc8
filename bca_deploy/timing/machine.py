"""What a figure was measured on: processor, cores, instruction sets, versions."""

import datetime
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: Of what the kernel lists, what decides how fast matrix products are.
_SETS: tuple[str, ...] = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
)
_SETS += ("amx_bf16", "amx_int8", "amx_fp16", "asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2")
_PACKAGES = ("bca-deploy", "numpy", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino")


@dataclass(frozen=True)
class Machine:
    """A machine, and how busy it was.

    Attributes:
        date: of the measurement, UTC.
        architecture: such as ``x86_64``.
        cpu: the processor's own name; empty where the kernel does not tell.
        cores: that this process may use.
        memory_gb: all of it, in 10**9 bytes.
        instruction_sets: the kernel's names of those that matter to matrix products.
        load: processes that wanted to run in the minute before, this one's own included.
        python: version.
        versions: of the packages that are installed, by name.
    """

    date: str
    architecture: str
    cpu: str
    cores: int
    memory_gb: float
    instruction_sets: tuple[str, ...]
    load: float
    python: str
    versions: dict[str, str]


def machine() -> Machine:
    """Return what this machine is."""
    told = _cpuinfo()
    flags = set((told.get("flags") or told.get("Features") or "").split())
    return Machine(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        architecture=platform.machine(),
        cpu=told.get("model name", ""),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        instruction_sets=tuple(name for name in _SETS if name in flags),
        load=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        versions=_versions(_PACKAGES),
    )


def _cpuinfo() -> dict[str, str]:
    """Return what the kernel says of the first processor."""
    path = Path("/proc/cpuinfo")
    first = path.read_text(encoding="utf-8").partition("\n\n")[0] if path.is_file() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
