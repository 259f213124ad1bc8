"""Scripts in a process of their own, and what it may not import."""

import subprocess
import sys

# Makes the named packages as good as not installed, in a process of its own.
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


HEAVY = ("torch", "onnx", "onnxruntime", "einops", "onnxscript", "onnx_ir", "safetensors", "ml_dtypes", "google")


def run_without(blocked: tuple[str, ...], script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK.format(blocked=blocked) + script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
