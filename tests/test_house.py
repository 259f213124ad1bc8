"""The plan of the house, .importlinter: an arrow that goes up, or through the wall, is refused with the way it takes."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bca_deploy

ROOT = Path(__file__).parents[1]
PLAN = ROOT / ".importlinter"


def lint(copy: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo", PLAN]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(Path(bca_deploy.__file__).parent, tmp_path / "bca_deploy", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize(
    ("module", "planted", "contract", "way"),
    [
        (
            "session/many.py",
            "from bca_deploy.layers import reference",
            "What opens, runs and serves a bundle knows neither torch nor onnx",
            "bca_deploy.session.many -> bca_deploy.layers.reference",
        ),
        (
            "bundle/read.py",
            "import torch",
            "What opens, runs and serves a bundle knows neither torch nor onnx",
            "bca_deploy.bundle.read -> torch",
        ),
        (
            "parity/cases.py",
            "from bca_deploy.exporter import plan",
            "Wings import downwards only",
            "bca_deploy.parity.cases -> bca_deploy.exporter.plan",
        ),
        (
            "session/contract.py",
            "import pydantic",
            "What Triton's front carries needs numpy alone",
            "bca_deploy.session.contract -> pydantic",
        ),
        (
            "session/backends/ort.py",
            "from bca_deploy.session.backends import choice",
            "A backend does not know who chooses it",
            "bca_deploy.session.backends.ort -> bca_deploy.session.backends.choice",
        ),
    ],
)
def test_a_forbidden_import_is_refused_with_its_way(copy: Path, module: str, planted: str, contract: str, way: str) -> None:
    path = copy / "bca_deploy" / module
    docstring, quotes, rest = path.read_text(encoding="utf-8").partition('"""\n')
    path.write_text(f"{docstring}{quotes}{planted}\n{rest}", encoding="utf-8")
    done = lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout
    assert way in done.stdout


def test_a_room_without_a_wing_is_refused(copy: Path) -> None:
    (copy / "bca_deploy" / "somewhere.py").touch()
    done = lint(copy)
    assert done.returncode == 1
    assert "bca_deploy.somewhere" in done.stdout


def test_no_wing_has_more_than_ten_rooms() -> None:
    package = Path(bca_deploy.__file__).parent
    rooms = {
        wing: [room for room in wing.glob("*.py") if not room.name.startswith("__")] for wing in [package, *package.rglob("*/")]
    }
    assert {wing.name: len(found) for wing, found in rooms.items() if len(found) > 10} == {}


# ---- one signature: what opens, runs and serves a bundle knows the layer's tensors and dimensions from the manifest alone

NAMES = {"x", "x_len", "context_len", "context_mask", "mask", "context"}
#: Where one of these words is another thing.
OTHERS = {
    "bca_deploy/serving/endpoints.py": {"context"},  # gRPC's, of a call
    "bca_deploy/serving/grpc_server.py": {"context"},
    "bca_deploy/session/backends/engine_lane.py": {"context"},  # TensorRT's, of an execution
    "bca_deploy/session/backends/loaded_engine.py": {"context"},
    "bca_deploy/session/session.py": {"context"},  # the variables of a task
    "bca_deploy/session/backends/ort.py": {"x"},  # between the sizes of a shape
    "runtime/src/signature.cpp": {"x"},
    "runtime/tools/bca_run.cpp": {"x"},
    "runtime/src/engine_runner.cpp": {"context"},  # TensorRT's
    "runtime/src/tensorrt_engine.cpp": {"context"},
    "runtime/examples/grpc_server.cpp": {"context"},  # gRPC's
}
WINGS = ("bundle", "engines", "session", "serving", "packaging")
#: In C++: what is said to a reader, a string that is one word, and an identifier.
CPP = re.compile(r"""//[^\n]*|/\*.*?\*/|"((?:[^"\\]|\\.)*)"|(\w+)""", re.DOTALL)


def names_in_python(text: str) -> set[str]:
    tree = ast.parse(text)
    found = (getattr(node, field, None) for node in ast.walk(tree) for field in ("id", "attr", "arg", "name", "value"))
    return {name for name in found if isinstance(name, str)}


def names_in_cpp(text: str) -> set[str]:
    return {found[1] or found[2] for found in CPP.finditer(text) if found[1] or found[2]}


def rooms() -> list[str]:
    python = [path for wing in WINGS for path in (ROOT / "bca_deploy" / wing).rglob("*.py")]
    runtime = [path for path in (ROOT / "runtime").rglob("*.[ch]*") if path.suffix in (".cpp", ".hpp", ".h")]
    kept = [*python, *(path for path in runtime if "tests" not in path.parts)]
    return sorted(path.relative_to(ROOT).as_posix() for path in kept)


@pytest.mark.parametrize("room", rooms())
def test_no_room_behind_the_manifest_names_a_tensor_or_dimension_of_the_layer(room: str) -> None:
    text = (ROOT / room).read_text(encoding="utf-8")
    found = (names_in_python if room.endswith(".py") else names_in_cpp)(text) & NAMES
    assert found == OTHERS.get(room, set())


@pytest.mark.parametrize(
    ("names", "planted"),
    [
        (names_in_python, 'sizes["x_len"]'),
        (names_in_python, "dims.x_len"),
        (names_in_python, "def f(x_len): ..."),
        (names_in_python, "f(x_len=1)"),
        (names_in_cpp, 'sizes.at("x_len")'),
        (names_in_cpp, "dims.x_len.max"),
    ],
)
def test_a_planted_name_is_seen(names: Callable[[str], set[str]], planted: str) -> None:
    assert "x_len" in names(planted)
    assert "x_len" not in names('"""Of x_len."""' if names is names_in_python else "// of x_len\n")
