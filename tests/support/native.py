"""Building runtime/ for the tests and the benchmark: a directory for each preset, built again only where something changed.

python tests/support/native.py PRESET...

Builds them and says what it does, as `make test` has it before the tests that need them.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SDK = Path(sys.prefix) / "sdk"
BUILD = ROOT / "build" / "runtime"

#: What a part of the tests needs: programs by name, files by path.
NEEDS: dict[str, tuple[str, ...]] = {
    "library": (
        "g++",
        "/usr/include/nlohmann/json.hpp",
        "/usr/include/zlib.h",
        "/usr/include/gtest/gtest.h",
        "/usr/include/grpcpp/grpcpp.h",
        "/usr/include/google/protobuf/message.h",
        "grpc_cpp_plugin",
        "pkg-config",
        f"{SDK}/onnxruntime/include/onnxruntime_c_api.h",
        f"{SDK}/tensorrt/include/NvInferRuntime.h",
        f"{SDK}/cuda/include/cuda_runtime_api.h",
    ),
    "clang": ("clang++",),
}
#: How LeakSanitizer ends where it cannot stop the program's threads to look: under ptrace or where that is forbidden, and
#: now and then on a machine that is busy.
LEAKS_UNKNOWN = "LeakSanitizer has encountered a fatal error"


def missing(*parts: str) -> list[str]:
    """Return what this machine lacks for these parts."""
    wanted = [need for part in parts for need in NEEDS[part]]
    return [need for need in wanted if not (Path(need).exists() if need.startswith("/") else shutil.which(need))]


def ort_library() -> Path:
    """Return the library of the installed onnxruntime."""
    spec = find_spec("onnxruntime")
    assert spec
    assert spec.origin
    return next((Path(spec.origin).parent / "capi").glob("libonnxruntime.so*"))


def environment(**more: str) -> dict[str, str]:
    """Return the environment in which the presets find everything, and the programs their onnxruntime."""
    roots = {
        f"{name}_ROOT": str(SDK / place) for name, place in (("ORT", "onnxruntime"), ("TENSORRT", "tensorrt"), ("CUDA", "cuda"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | roots | {"PATH": path, "BCA_ORT_LIBRARY": str(ort_library())} | more


def run(command: list[str | Path], cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """Run in that environment; the exit code is the caller's to judge."""
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, check=False)


def passed(command: list[str | Path], cwd: Path = ROOT, **more: str) -> str:
    """Run what must succeed, and return what it printed."""
    done = run(command, cwd, **more)
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@cache
def _steady() -> tuple[str, ...]:
    """Return what keeps addresses where older sanitizers expect them; empty where this machine does not allow it."""
    keep = ("setarch", "--addr-no-randomize")
    if not shutil.which(keep[0]) or subprocess.run([*keep, "true"], capture_output=True, check=False).returncode:
        return ()
    return keep


def sanitized(command: list[str | Path], cwd: Path = ROOT, **more: str) -> tuple[subprocess.CompletedProcess[str], bool]:
    """Run what was built with a sanitizer; return how it ended, and whether leaks were looked for.

    Where LeakSanitizer fails by itself the program is run again, and the last time without it: what the program does wrong
    is found all the same, and only leaks are not. The caller says so.
    """
    for look in (1, 1, 1, 0):
        done = run([*_steady(), *command], cwd, ASAN_OPTIONS=f"detect_leaks={look}", **more)
        if LEAKS_UNKNOWN not in done.stderr:
            return done, bool(look)
    return done, False


def build(preset: str) -> Path:
    """Build a preset and return its directory; one process at a time, for tests run in several."""
    with _locked(preset):
        passed(["cmake", "--preset", preset], ROOT / "runtime")
        passed(["cmake", "--build", "--preset", preset], ROOT / "runtime")
    return BUILD / preset


@contextmanager
def _locked(name: str) -> Iterator[None]:
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Build the presets that are named, telling what is done; where something is missing the tests skip, and say it again."""
    for preset in sys.argv[1:]:
        if lacking := missing("library", *(["clang"] if preset == "address" else [])):
            print(f"runtime/ ({preset}) is not built without {', '.join(lacking)}", flush=True)  # noqa: T201
        else:
            print(f"building runtime/ ({preset}): minutes when it is new", flush=True)  # noqa: T201
            build(preset)


if __name__ == "__main__":
    main()
