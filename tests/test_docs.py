"""The README and the pages in docs/: every command and snippet runs, tables, pictures and links are true."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: In the order in which a reader comes to them: a command may need what one before it made.
_READ = ("quickstart", "export", "whole-models", "engines", "session", "serving")
PAGES = ["README.md", *(f"docs/{name}.md" for name in _READ)]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


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
    here = tmp_path_factory.mktemp("readme")
    for name in ("examples", "export", "benchmarks"):
        (here / name).symlink_to(ROOT / name)
    return here


@pytest.mark.slow
def test_every_command_and_snippet_runs_in_the_readers_order(workplace: Path) -> None:
    pieces = re.findall(r"```(sh|python)\n(.*?)```", "".join(map(page, PAGES)), flags=re.DOTALL)
    assert len(pieces) >= 12
    for language, text in pieces:
        for command in text.strip().splitlines() if language == "sh" else [[sys.executable, "-c", text]]:
            run_here(command, workplace)


def test_no_other_page_holds_a_command() -> None:
    """Those of runtime/ are run by its own tests."""
    others = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - set(PAGES)
    assert {name for name in others if re.search(r"```(sh|python)\n", page(name))} == set()


@pytest.mark.slow
def test_make_demo_prints_what_the_readme_shows() -> None:
    """With the tools of the running environment, so that the set-up is not repeated."""
    done = run_here(["make", "demo", "READY=", f"BIN={Path(sys.executable).parent}"], ROOT)
    (shown,) = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)
    assert {without_figures(line) for line in shown.splitlines()} <= {
        without_figures(line) for line in done.stdout.splitlines()
    }


def without_figures(line: str) -> str:
    """Figures move in their last digits between processors."""
    return " ".join(re.sub(r"[\d.e+-]+", "#", line).split())


def test_the_readme_is_short_and_begins_with_what_and_how() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    first_screen = "\n".join(lines[:16])
    for wanted in ("](docs/stages.svg)", "pip install", "make demo", "make test"):
        assert wanted in first_screen


@pytest.mark.parametrize(
    "name", [*PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.stem not in str(PAGES))]
)
def test_links_and_pictures_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page(name)):
        if not target.startswith("http"):
            assert ((ROOT / name).parent / target).exists(), target


def test_the_code_map_says_what_the_modules_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import code_map

    shown = page("docs/architecture.md").split("<!-- code map -->\n")[1].split("<!-- end -->")[0]
    assert shown == code_map.code_map(), "run python docs/code_map.py"
    rooms = {path for path in (ROOT / "bca_deploy").rglob("*.py") if path.name != "__init__.py"}
    assert shown.count("\n| `") == len(rooms)


def test_the_chart_shows_the_figures_of_the_table() -> None:
    row = next(line for line in page("docs/benchmarks.md").splitlines() if line.startswith("| 1 x 512 x 512 |"))
    figures = {cell.strip() for cell in row.strip("|").split("|")[1:]}
    shown = set(re.findall(r"<text[^>]*>([^<]*)<", (ROOT / "docs/latency.svg").read_text(encoding="utf-8")))
    assert figures <= shown, "draw the picture from the run that the table is of: benchmarks/chart.py"
    assert "session" in shown


def test_the_manifest_table_names_every_field() -> None:
    from bca_deploy.bundle.engine_options import BuildOptions
    from bca_deploy.bundle.manifest import EngineEntry, GpuEntry, Manifest, ModelEntry, ParityEntry
    from bca_deploy.signature import DimRange, Signature, Tensor

    section = page("docs/bundle-format.md").split("The manifest, field by field:")[1]
    for model in (Manifest, ModelEntry, ParityEntry, EngineEntry, GpuEntry, BuildOptions):
        assert [name for name in model.model_fields if f"`{name}" not in section] == []
    for data in (Signature, Tensor, DimRange):
        assert [field.name for field in fields(data) if f"`{field.name}" not in section] == []
