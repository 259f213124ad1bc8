"""Export every recipe and print what each measured, as the table in export/README.md.

python benchmarks/recipes.py [--update]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bca_deploy.bundle.read import Bundle
from bca_deploy.exporter.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "export" / "README.md"
START, END = "<!-- measured -->", "<!-- end -->"
HEAD = "| recipe | model | opset | lowering | nodes | ONNX kB | parity cases | worst RMS ratio |"


def measure(path: Path) -> list[str]:
    out = ROOT / "build" / "recipes" / path.stem
    command = [sys.executable, "-c", "from bca_deploy.cli import main_export; main_export()", "--recipe", str(path)]
    subprocess.run([*command, "--out", str(out), "--force"], check=True, stdout=subprocess.DEVNULL)
    with Bundle.open(out) as bundle:
        return [
            f"| {path.stem} | {Path(m.file).stem} | {m.opset} | {m.lowering} | {m.nodes} "
            f"| {bundle.manifest.files[m.file].bytes // 1000} | {m.parity.cases} "
            f"| {m.parity.worst_ratio:.3f} |"
            for m in bundle.manifest.models
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table into export/README.md")
    update = parser.parse_args().update
    recipes = sorted((ROOT / "export" / "recipes").glob("*.toml"))
    rows = [row for path in recipes for row in measure(path)]
    table = "\n".join([HEAD, "|" + " --- |" * HEAD.count(" | ") + " --- |", *rows])
    print(table)
    for path in recipes:
        print(f"{path.stem}: {json.dumps(read_recipe(path).description)}")
    if update:
        text = README.read_text(encoding="utf-8")
        before, after = text.split(START)[0], text.split(END)[1]
        README.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
