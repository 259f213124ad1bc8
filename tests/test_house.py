"""The plan of the house, .importlinter: an arrow that goes up, or through the wall, is refused with the way it takes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bca_deploy

PLAN = Path(__file__).parents[1] / ".importlinter"


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
