"""Every command and every snippet in the README runs, and its file tables are true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SERVING = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def run_here(command: str | list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=cwd,
        shell=isinstance(command, str),
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like the repository's root, to leave the real one alone."""
    here, root = tmp_path_factory.mktemp("readme"), Path(__file__).parents[1]
    for name in ("examples", "export", "benchmarks"):
        (here / name).symlink_to(root / name)
    return here


@pytest.mark.slow
def test_every_command_and_snippet_runs_in_the_order_of_the_readme(workplace: Path) -> None:
    """Those of the serving guide after them."""
    pieces = re.findall(r"```(sh|python)\n(.*?)```", TEXT + SERVING, flags=re.DOTALL)
    assert len(pieces) >= 5
    for language, text in pieces:
        for command in text.strip().splitlines() if language == "sh" else [[sys.executable, "-c", text]]:
            run_here(command, workplace)


@pytest.mark.slow
def test_make_demo_prints_what_the_readme_shows(repository: Path) -> None:
    """With the tools of the running environment, so that the set-up is not repeated."""
    done = run_here(["make", "demo", "READY=", f"BIN={Path(sys.executable).parent}"], repository)
    shown = blocks("text")[0].splitlines()
    kept = [line for line in shown if re.match(r"\s*(family|no mask|fp32: parity|bundle:|layer:|dims:)", line)]
    assert len(kept) >= 5
    assert {without_figures(line) for line in kept} <= {without_figures(line) for line in done.stdout.splitlines()}


def without_figures(line: str) -> str:
    """Figures move in their last digits between processors."""
    return " ".join(re.sub(r"[\d.e+-]+", "#", line).split())


def test_the_code_map_lists_every_module(repository: Path) -> None:
    modules = {path.name for path in (repository / "bca_deploy").glob("*.py")} - {"__init__.py"}
    assert modules == {name for name in modules if f"`bca_deploy/{name}`" in TEXT or f", `{name}`" in TEXT}
    named = set(re.findall(r"`bca_deploy/(\w+\.py)`", TEXT))
    assert named <= modules


def test_the_manifest_table_names_every_field() -> None:
    from bca_deploy.bundle.manifest import Manifest, ModelEntry, ParityEntry, TensorEntry

    section = TEXT.split("The manifest, field by field:")[1].split("\n## ")[0]
    for model in (Manifest, ModelEntry, ParityEntry, TensorEntry):
        assert [name for name in model.model_fields if f"`{name}" not in section] == []
