"""How far the verdict can be trusted: does it refuse right models, does it let wrong ones pass?

python benchmarks/verdict.py alarms --layers 50   # right layers of random shapes under every setting: there should be no alarm
python benchmarks/verdict.py defects --layers 4   # defects planted in random layers: all should be caught
python benchmarks/verdict.py tables --update      # both tables from all that was found so far, into docs/parity.md

Each layer is exported once and judged under every setting. Findings go line by line to build/verdict/, so that what was
interrupted goes on where it stopped. A finding holds for the code that made it: remove the folder when the rule changes.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from defects import DEFECTS, Defect
from layers import Graph, Structure, graphs, structure

from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.lowered_model import has_cpu_form
from bca_deploy.parity.rule import Subject, judge
from bca_deploy.parity.verdict import Verdict
from bca_deploy.parity.yardstick import Yardstick
from bca_deploy.spec import Precision, Runtime
from bca_deploy.tracing.graph import attach, write

ROOT = Path(__file__).resolve().parents[1]
FOUND = ROOT / "build" / "verdict"
PAGE = ROOT / "docs" / "parity.md"
#: Weights drawn for every structure: a trace takes longer than a verdict.
DRAWS = 15
#: The first seed of what is reported; the rule was tried out on lower ones, and changed for two alarms.
FIRST_SEED = 2_000_000


@dataclass(frozen=True)
class Setting:
    """What may differ between two machines: the precision asked for, the instructions, the processors."""

    name: str
    precision: Precision = "fp32"
    processors: int | None = None
    variables: dict[str, str] = field(default_factory=dict)
    most_layers: int = 300


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("fp32", most_layers=10**9),
        *(Setting(f"fp32, ATen {c}", variables={"ATEN_CPU_CAPABILITY": c}) for c in ("default", "avx2", "avx512")),
        Setting("fp32, 1 thread", processors=1, variables={"OMP_NUM_THREADS": "1"}),
        Setting("fp32, 2 threads", processors=2, variables={"OMP_NUM_THREADS": "2"}),
        Setting("fp16", "fp16"),
        Setting("bf16", "bf16"),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["alarms", "defects", "tables"])
    parser.add_argument("--layers", type=int, default=50, help="alarms: in each setting; defects: for each defect")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--only", action="append", choices=[*SETTINGS, *(d.name for d in DEFECTS)], help="again for more")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the layers of a setting")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # which part of the layers a worker does
    parser.add_argument("--update", action="store_true", help="tables: write them into docs/parity.md")
    options = parser.parse_args()
    {"alarms": alarms, "defects": defects, "tables": tables}[options.what](options)


def alarms(options: argparse.Namespace) -> None:
    if options.share is not None:
        judge_right_layers(SETTINGS[options.only[0]], options)
        return
    for setting in (SETTINGS[name] for name in options.only or SETTINGS):
        if not runs_here(setting):
            print(f"{setting.name}: left out, this processor has no such instructions")
            continue
        command = [sys.executable, __file__, "alarms", "--only", setting.name, "--layers", str(options.layers)]
        command += ["--first-seed", str(options.first_seed), "--workers", str(options.workers), "--share"]
        environment = os.environ | setting.variables
        shares = [subprocess.Popen([*command, str(i)], env=environment) for i in range(options.workers)]
        if max(share.wait() for share in shares):
            sys.exit(f"{setting.name}: a worker failed")
    tables(options)


def runs_here(setting: Setting) -> bool:
    """Whether the processor has the instructions: PyTorch takes the variable's word for it, and would die."""
    needed = {"avx2": "avx2", "avx512": "avx512vl"}.get(setting.variables.get("ATEN_CPU_CAPABILITY", ""))
    return needed is None or needed in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()


def judge_right_layers(setting: Setting, options: argparse.Namespace) -> None:
    """Judge this worker's share of a setting's layers, but for those that were judged before."""
    if setting.processors is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.processors])
    layers = min(options.layers, setting.most_layers)
    seeds = range(options.first_seed, options.first_seed + math.ceil(layers / DRAWS))
    path = FOUND / "alarms" / f"{setting.name}.jsonl"
    done = {finding["layer"] for finding in read(path)}
    for seed in seeds[options.share :: options.workers]:
        wanted = min(DRAWS, layers - (seed - options.first_seed) * DRAWS)
        draws = [draw for draw in range(wanted) if f"{seed}.{draw}" not in done]
        if draws:
            traced = exported(structure(seed), setting.precision)
            for draw in draws:
                append(path, {"layer": f"{seed}.{draw}", **try_draw(traced, draw)})


def exported(made: Structure, precision: Precision) -> list[Graph]:
    """Return a structure's graphs from their files; write those that are not there."""
    folder = FOUND / "graphs" / precision
    folder.mkdir(parents=True, exist_ok=True)
    runtimes: list[Runtime] = ["portable"]
    if has_cpu_form(made.lowering, precision, made.interface):
        runtimes.append("onnxruntime-cpu")
    paths = [folder / f"{made.seed}.{runtime}.onnx" for runtime in runtimes]
    if not all(path.exists() for path in paths):
        for graph, path in zip(graphs(made, precision), paths, strict=True):
            with tempfile.TemporaryDirectory(dir=folder) as partial:
                write(graph.model, Path(partial) / path.name)
                (Path(partial) / path.name).rename(path)
    return [Graph(made, precision, r, ir.load(path)) for r, path in zip(runtimes, paths, strict=True)]


def try_draw(traced: list[Graph], draw: int) -> dict[str, Any]:
    """Judge every form of one layer."""
    began = time.monotonic()
    made, checkpoint = traced[0].structure, traced[0].structure.weights(draw)
    yardstick = Yardstick(checkpoint, made.interface, traced[0].precision)
    verdicts = [verdict_on(graph, checkpoint, yardstick) for graph in traced]
    worst = max((v.worst for v in verdicts if v.worst), key=lambda pool: pool.ratio / pool.limit)
    failures = [failure for verdict in verdicts for failure in verdict.failures]
    return {
        "passed": not failures,
        "ratio": worst.ratio,
        "limit": worst.limit,
        "orders": max(group.orders for verdict in verdicts for group in verdict.groups),
        "seconds": time.monotonic() - began,
        "failures": failures[:3],
    }


def verdict_on(graph: Graph, checkpoint: Checkpoint, yardstick: Yardstick) -> Verdict:
    attach(graph.model, graph.state(checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{graph.precision}.onnx"
        ir.save(graph.model, path)
        made = graph.structure
        subject = Subject(path, checkpoint, made.interface, made.dims, graph.precision, keep_io_types=True)
        return judge(subject, "quick", yardstick=yardstick)


def defects(options: argparse.Namespace) -> None:
    chosen = [defect for defect in DEFECTS if not options.only or defect.name in options.only]
    for defect, precision in ((d, p) for d in chosen for p in d.precisions):
        plant(defect, precision, options)
    tables(options)


def plant(defect: Defect, precision: Precision, options: argparse.Namespace) -> None:
    """Judge a defect in as many layers as were asked for, four draws of weights a structure."""
    path = FOUND / "defects" / f"{defect.name}, {precision}.jsonl"
    left = options.layers - len(list(read(path)))
    seeds = itertools.count(options.first_seed + len(list(read(path))))
    while left > 0:
        made = structure(next(seeds), defect.applies)
        with defect.planted():
            traced = graphs(made, precision)[defect.form :][:1]
        for draw in range(min(4, left)):
            append(path, {"layer": f"{made.seed}.{draw}", **try_draw(traced, draw)})
        left -= 4


def tables(options: argparse.Namespace) -> None:
    text = "\n".join([*alarm_table(), "", *defect_table()])
    print(text)
    if options.update:
        before, rest = PAGE.read_text(encoding="utf-8").split("<!-- measured -->")
        after = rest.split("<!-- end -->")[1]
        PAGE.write_text(f"{before}<!-- measured -->\n{text}\n<!-- end -->{after}", encoding="utf-8")


def alarm_table() -> Iterator[str]:
    yield "| setting | layers | false alarms | at most (95 %) | worst share of its limit | in order, in 8 orders | hours |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name in SETTINGS:
        found = list(read(FOUND / "alarms" / f"{name}.jsonl"))
        if found:
            count, wrong = len(found), sum(not finding["passed"] for finding in found)
            share = max(finding["ratio"] / finding["limit"] for finding in found)
            once, often = (sum(finding["orders"] >= least for finding in found) for least in (1, 2))
            hours = sum(finding["seconds"] for finding in found) / 3600
            counts = f"{count} | {wrong} | {upper_bound(wrong, count):.2%}"
            yield f"| {name} | {counts} | {share:.2f} | {once}, {often} | {hours:.2f} |"


def defect_table() -> Iterator[str]:
    yield "| defect | precision | worst pool over its measure, smallest and median layer | caught |"
    yield "| --- | --- | --- | --- |"
    for defect, precision in ((d, p) for d in DEFECTS for p in d.precisions):
        found = list(read(FOUND / "defects" / f"{defect.name}, {precision}.jsonl"))
        if found:
            sizes = sorted(finding["ratio"] for finding in found)
            caught = sum(not finding["passed"] for finding in found)
            yield f"| {defect.name} | {precision} | {sizes[0]:.3g}, {sizes[len(sizes) // 2]:.3g} | {caught} of {len(found)} |"
    yield from (f"\n{defect.name}: {defect.note}" for defect in DEFECTS if defect.note)


def upper_bound(wrong: int, count: int) -> float:
    """Return the 95 % upper bound of a rate (Clopper and Pearson, 1934): so many or fewer are seen in 5 of 100 tries there."""
    low, high = wrong / count, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        seen = sum(math.comb(count, k) * middle**k * (1 - middle) ** (count - k) for k in range(wrong + 1))
        low, high = (middle, high) if seen > 0.05 else (low, middle)
    return high


def read(path: Path) -> Iterable[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return (json.loads(line) for line in lines)


def append(path: Path, finding: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finding) + "\n")
    if not finding["passed"] and path.parent.name == "alarms":
        print(f"false alarm: {path.stem}: {finding}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
