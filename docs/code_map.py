"""Write the code map in docs/architecture.md from the first sentence of every module: python docs/code_map.py."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
#: The wings in stage order; the first is the ground line.
WINGS = ("", "bundle", "timing", "layers", "layers/stored", "engines", "parity", "tracing", "programs", "whole", "whole_parity")
WINGS += ("exporter", "exporter/wholes", "session", "session/backends", "benchmarking", "serving", "packaging", "cli")


def main() -> None:
    """Replace what stands between the two marks."""
    before, rest = PAGE.read_text(encoding="utf-8").split("<!-- code map -->")
    after = rest.split("<!-- end -->")[1]
    PAGE.write_text(f"{before}<!-- code map -->\n{code_map()}<!-- end -->{after}", encoding="utf-8")


def code_map() -> str:
    """Return one table for each wing."""
    return "".join(f"{line}\n" for wing in WINGS for line in _wing(ROOT / "bca_deploy" / wing))


def _wing(folder: Path) -> Iterator[str]:
    yield f"\n### `{folder.relative_to(ROOT)}/`\n"
    yield f"{_said(folder / '__init__.py')}\n"
    yield "| room | what is there |\n| --- | --- |"
    for room in sorted(folder.glob("*.py")):
        if room.name != "__init__.py":
            yield f"| `{room.stem}` | {_said(room)} |"
    yield ""


def _said(module: Path) -> str:
    """Return the first paragraph of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


if __name__ == "__main__":
    main()
