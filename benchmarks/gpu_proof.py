"""Run on this machine's GPU what can only be proven there, and write it down: the GPU tests, then the engines' benchmark.

python benchmarks/gpu_proof.py [--out build/gpu-proof.md]

Exit codes: 0 all of it ran and passed, 1 something failed (the report says what), 2 no GPU (nothing is written).
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCTOR = ("-c", "from bca_deploy.cli import main; main()", "doctor", "--json")
TESTS = ("-m", "pytest", "-m", "gpu", "-q", "-rA", "-p", "no:cacheprovider")
BENCHMARK = ("benchmarks/engines.py",)


@dataclass(frozen=True)
class Part:
    """One command, what it printed and whether that proves anything."""

    command: Sequence[str]
    output: str
    passed: bool


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-proof.md", help="where the report goes")
    out = parser.parse_args(arguments).out
    findings = json.loads(python(DOCTOR, check=True).stdout)
    if not gpus(findings):
        fix = next(finding["fix"] for finding in findings if finding["name"] == "CUDA driver")
        print(f"no GPU here, so nothing to prove and nothing written: {fix}; run it on a machine with one", file=sys.stderr)
        return 2
    parts = (tests(), benchmark())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(datetime.now(UTC), findings, parts), encoding="utf-8")
    print(out)
    return 0 if all(part.passed for part in parts) else 1


def python(arguments: Sequence[str], check: bool = False) -> subprocess.CompletedProcess[str]:
    errors = None if check else subprocess.STDOUT
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, check=check, stdout=subprocess.PIPE, stderr=errors, text=True)


def gpus(findings: list[dict[str, Any]]) -> list[str]:
    return [finding["found"] for finding in findings if finding["name"].startswith("GPU ")]


def tests() -> Part:
    done = python(TESTS)
    # pytest is content when every test was skipped, for want of a library say: that proves nothing.
    return Part(TESTS, done.stdout, done.returncode == 0 and re.search(r"\d+ passed", done.stdout) is not None)


def benchmark() -> Part:
    done = python(BENCHMARK)
    return Part(BENCHMARK, done.stdout, done.returncode == 0)


def report(when: datetime, findings: list[dict[str, Any]], parts: Sequence[Part]) -> str:
    lines = ["# GPU proof", "", f"{when:%Y-%m-%d %H:%M} UTC, {'; '.join(gpus(findings))}", ""]
    lines += [f"- {finding['name']}: {finding['found'] or 'absent'}" for finding in findings]
    for part in parts:
        said = "passed" if part.passed else "FAILED, or nothing ran"
        lines += ["", f"## python {' '.join(part.command)}: {said}", "", "```text", part.output.rstrip(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
