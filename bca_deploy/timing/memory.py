"""The resident memory of this process, as Linux counts it, in 10**6 bytes."""

import contextlib
from pathlib import Path


def peak_rss_mb() -> float:
    """Return the largest so far; getrusage's would count the parent's before exec."""
    return _status("VmHWM")


def rss_mb() -> float:
    """Return the present one."""
    return _status("VmRSS")


def forget_peak() -> None:
    """Let the largest so far begin again at the present one, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def available_mb() -> float:
    """Return what the machine has left for new processes."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _status(name: str) -> float:
    return _field(Path("/proc/self/status"), name)


def _field(path: Path, name: str) -> float:
    return int(path.read_text(encoding="ascii").partition(f"{name}:")[2].split()[0]) * 1024 / 1e6
