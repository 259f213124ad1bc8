"""The example server of runtime/ with a model whose calls end when the test says so, on fast machines and on slow ones."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from support import native
from support.servers import until

from bca_deploy.bundle.manifest import MANIFEST_FILE, SELFTEST_FILE
from bca_deploy.bundle.read import sha256

FIXTURE = native.ROOT / "tests" / "fixtures" / "format1"


class Held:
    """A server on the double of onnxruntime, whose calls do not end while they are held."""

    def __init__(self, start: Any, release: Path, place: Path) -> None:
        self.hold, self.log, self.begun = place / "hold", place / "log", 0
        self.start, self.bundle = start, believed(place / "bundle")
        self.environment = {"BCA_ORT_LIBRARY": str(release / "tests" / "libfake_ort.so")}
        self.environment |= {"FAKE_ORT_LOG": str(self.log), "FAKE_ORT_HOLD": str(self.hold)}

    def serve(self, *flags: str) -> tuple[Any, subprocess.Popen[str]]:
        started = self.start(*flags, "--threads", "1", bundle=self.bundle, **self.environment)
        self.begun = self.calls()  # the self-test's and the warm-up's
        return started

    def calls(self) -> int:
        return self.log.read_text().splitlines().count("call")

    def at_work(self, count: int) -> None:
        """Wait until so many calls are there."""
        until(lambda: self.calls() == self.begun + count)

    def __enter__(self) -> None:
        self.hold.touch()

    def __exit__(self, *error: object) -> None:
        self.hold.unlink()


def believed(bundle: Path) -> Path:
    """A bundle whose self-test the double passes, which computes something else."""
    shutil.copytree(FIXTURE, bundle)
    with np.load(FIXTURE / SELFTEST_FILE) as arrays:
        wide = {name: array + 1e9 if "/bound/" in name else array for name, array in arrays.items()}
    np.savez_compressed(bundle / SELFTEST_FILE, **wide)
    manifest = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    path = bundle / SELFTEST_FILE
    manifest["files"][SELFTEST_FILE] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (bundle / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
    return bundle
