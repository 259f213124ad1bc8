"""What the commands print: the plan, progress, the parity table, a bundle's contents."""

import contextlib
import dataclasses
import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from bca_deploy import ending
from bca_deploy.bundle.manifest import Manifest, signature_of
from bca_deploy.bundle.trust import Trust, said
from bca_deploy.signature import Axis, Dims
from bca_deploy.spec import LayerSpec

if TYPE_CHECKING:
    from bca_deploy.benchmarking.result import Result
    from bca_deploy.bundle.manifest import EngineEntry, LayerEntry
    from bca_deploy.cli.doctor import Finding
    from bca_deploy.exporter.plan import Plan
    from bca_deploy.exporter.source import Source
    from bca_deploy.parity.verdict import Verdict
    from bca_deploy.session.session import Session


class _Console(Console):
    """Says that nobody reads any more; rich would say that parity failed."""

    def on_broken_pipe(self) -> None:
        """Go on as every other print does."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads standard output any more")


# Markup off: shapes such as [batch, x_len] are not styles. Wide where there is no terminal to fit: tables go to logs whole.
_out = _Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
_err = Console(stderr=True, highlight=False, markup=False)


class _Bar:
    """Draws the stages on standard error: a live bar on a terminal, a line per stage elsewhere."""

    def __init__(self, bar: Progress, interrupts: list[int]) -> None:
        self.bar = bar
        self.interrupts = interrupts
        self.task: TaskID | None = None

    def stage(self, name: str) -> None:
        if self.interrupts:
            raise ending.Ended(self.interrupts[-1])
        if not _err.is_terminal:
            _err.print(f"{name} ...")
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(name, total=None)

    def steps(self, done: int, total: int) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=done, total=total)


@contextlib.contextmanager
def progress() -> Iterator[_Bar]:
    """Show progress while the block runs."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bar, ending.cleanly() as seen:
        yield _Bar(bar, seen)


def show_plan(plan: "Plan", checkpoint: Path | None, as_json: bool) -> None:
    """Print what an export would do."""
    recipe = plan.recipe
    content: dict[str, Any] = {
        "weights": str(checkpoint) if checkpoint else _own_weights(plan),
        **_what(plan.source),
        "lowering": plan.source.lowering,
        "opset": recipe.opset,
        "precision": list(recipe.precision),
        "keep_io_types": recipe.keep_io_types,
        "inputs": {tensor.name: tensor.axes for tensor in plan.source.signature.inputs},
        "outputs": {tensor.name: tensor.axes for tensor in plan.source.signature.outputs},
        "dims": {name: dataclasses.asdict(found) for name, found in plan.source.signature.dims.items()},
        "parity": recipe.parity,
        "trust": plan.source.trust,
        "out": str(plan.out),
    }
    if plan.engine is not None:
        engine = plan.engine
        content["engine"] = f"{engine.library.name} {engine.precision} for {', '.join(engine.targets) or 'the GPU at hand'}"
    if as_json:
        _print_json(content)
        return
    table = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    if plan.source.interface is not None:
        content["layer"] = describe(plan.source.layers[0].spec)
    else:
        content["layers"] = [_inside(layer) for layer in plan.source.layers] or ["none"]
    content["dims"] = _dims(plan.source.signature.dims)
    for name in ("inputs", "outputs"):
        content[name] = "; ".join(f"{key} {_shape(axes)}" for key, axes in content[name].items())
    for name, value in content.items():
        table.add_row(name, str(value) if not isinstance(value, list) else ", ".join(value))
    _out.print(table)
    show_guesses(plan)
    _out.print("dry run: nothing was written")


def _own_weights(plan: "Plan") -> str:
    return "the model's own" if plan.source.interface is None else f"seeded ({plan.recipe.seed})"


def show_guesses(plan: "Plan") -> None:
    """Say which ranges nobody gave, on standard error."""
    for name in plan.source.guessed:
        found = plan.source.signature.dims[name]
        _err.print(f"{name} {found.min} to {found.max}: from the samples; --dim {name}=MIN:OPT:MAX says another range")


def _what(source: "Source") -> dict[str, Any]:
    """Return the bare layer, or the layers inside a whole model with their proof."""
    if source.interface is not None:
        return {"layer": dataclasses.asdict(source.layers[0].spec)}
    return {"model": source.name, "layers": [layer.model_dump(mode="json") for layer in source.layers]}


def _inside(layer: "LayerEntry") -> str:
    proof = layer.proof and f"; proven in {layer.proof.cases} cases, worst {layer.proof.worst:.0e}"
    times = f", called {layer.calls} times" if layer.calls > 1 else ""
    return f"{layer.path or 'the model itself'}: {describe(layer.spec)}, {layer.lowering}{times}{proof or ''}"


def show_verdicts(verdicts: tuple["Verdict", ...], as_json: bool, where: Path, trust: Trust) -> None:
    """Print the parity table of each model and where the bundle is; as JSON also what shows that it is the user's."""
    if as_json:
        from bca_deploy.parity.verdict import report

        models = [{k: v for k, v in report(verdict).items() if k != "results"} for verdict in verdicts]
        _print_json(
            {"bundle": str(where), "passed": all(verdicts), "trust": trust, "trust_said": said(trust), "models": models}
        )
        return
    for verdict in verdicts:
        _out.print(_parity_table(verdict))
        for note in verdict.notes:
            _out.print(f"note: {note}")
        for failure in verdict.failures[:20]:
            _out.print(f"failed: {failure}")
        _out.print(
            f"{verdict.model}: parity {'passed' if verdict else 'FAILED'}, {verdict.cases} cases ({verdict.scope}), "
            f"worst RMS ratio to PyTorch {_worst(verdict)}; "
            f"rounding the weights moves the outputs by {verdict.weight_rounding:.2g} RMS",
        )
    _out.print(f"bundle: {where}")


def show_trust(trust: Trust) -> None:
    """Print what shows that the bundle is the function that its user runs, and how to prove it where nothing does."""
    _out.print(said(trust))


def _worst(verdict: "Verdict") -> str:
    return f"{verdict.worst.ratio:.3f} (limit {verdict.worst.limit:.3g})" if verdict.worst else "unknown"


def _parity_table(verdict: "Verdict") -> Table:
    table = Table(title=f"parity, {verdict.model}: error against float64, beside PyTorch", title_justify="left", box=SIMPLE)
    for name in ("family", "logits", "runtime"):
        table.add_column(name)
    for name in ("cases", "live ratio", "dead ratio", "RMS", "p99", "max", "cosine"):
        table.add_column(name, justify="right")
    for group in verdict.groups:
        ratios = [f"{r:.3f}" if r is not None else "-" for r in (group.live_ratio, group.dead_ratio)]
        figures = [f"{v:.1e}" for v in (group.rms, group.p99, group.max)]
        table.add_row(group.family, group.sharpness, group.runtime, str(group.cases), *ratios, *figures, f"{group.cosine:.7f}")
    return table


def show_manifest(manifest: Manifest, where: Path) -> None:
    """Print what a bundle holds."""
    show_trust(manifest.trust)
    _out.print(f"{where}: bundle format {manifest.format}, every hash right")
    if manifest.layer is not None:
        _out.print(f"layer: {describe(manifest.layer)}")
    else:
        _out.print(f"model: {manifest.source}")
        for layer in manifest.layers:
            _out.print(f"layer {_inside(layer)}")
    _out.print(f"dims:  {_dims(manifest.signature.dims)}")
    models = Table("model", "opset", "precision", "lowering", "nodes", "parity", "worst ratio", box=SIMPLE)
    for model in manifest.models:
        verdict = f"{'passed' if model.parity.passed else 'FAILED'}, {model.parity.cases} cases ({model.parity.scope})"
        figures = (
            str(model.opset),
            model.precision,
            model.lowering,
            str(model.nodes),
            verdict,
            f"{model.parity.worst_ratio:.3f}",
        )
        models.add_row(model.file, *figures)
    _out.print(models)
    signature = signature_of(manifest, manifest.models[0])
    tensors = Table("tensor", "dtype", "axes", box=SIMPLE)
    for entry in (*signature.inputs, *signature.outputs):
        tensors.add_row(entry.name, entry.dtype, _shape(entry.axes))
    _out.print(tensors)
    if manifest.engines:
        show_engines(manifest.engines, manifest, where)
    files = Table("file", "bytes", "sha256", box=SIMPLE)
    for name, file in manifest.files.items():
        files.add_row(name, str(file.bytes), file.sha256[:16])
    _out.print(files)


def show_tuned(tuned: dict[str, Any] | None) -> None:
    """Print what was measured to choose the form of the graph for the CPU."""
    if tuned is None:
        _out.print("tuned: nothing to choose; only a float32 model with a fused layer has two forms on the CPU")
        return
    sizes = ", ".join(f"{name} {size}" for name, size in tuned["sizes"].items())
    low, high = tuned["quartiles"]
    _out.print(
        f"tuned on {tuned['threads']} threads at {sizes}: fused {tuned['fused_ms']:.3g} ms, "
        f"literal {tuned['reference_ms']:.3g} ms, ratio {tuned['ratio']:.2f} (quartiles {low:.2f} to {high:.2f}); "
        f"the graph for the CPU is {tuned['lowering']}"
    )


def show_engines(entries: tuple["EngineEntry", ...], manifest: Manifest, where: Path) -> None:
    """Print the engines, and of each stale one the reason and the command that rebuilds it."""
    from bca_deploy.engines.usable import installed, rebuild_command, why_stale

    table = Table("engine", "library", "runs on", "profiles", "scratch MB", "weights MB", "attentions", box=SIMPLE)
    notes = []
    for entry in entries:
        runs_on = ", ".join(entry.targets) or (entry.gpu.name if entry.gpu else "-")
        fused = {True: "fused", False: "NOT fused", None: "unknown"}[entry.attentions_fused]
        sizes = [f"{size / 1e6:.1f}" if size is not None else "-" for size in (entry.scratch_bytes, entry.weight_bytes)]
        profiles = "static" if entry.static else str(len(entry.profiles))
        table.add_row(entry.file, f"{entry.library} {entry.version}", runs_on, profiles, *sizes, fused)
        if reason := why_stale(entry, manifest, installed(entry.library)):
            notes.append(f"stale: {entry.file}: {reason}; rebuild it: {rebuild_command(entry, where)}")
    _out.print(table)
    for note in notes:
        _out.print(note)


def show_run(session: "Session", outputs: dict[str, Any], where: Path | None, as_json: bool) -> None:
    """Print what ran and what came out; without outputs it was the self-test."""
    shapes = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in outputs.items()}
    if as_json:
        _print_json({"backend": session.explain().chosen, "outputs": shapes, "file": str(where) if where else None})
        return
    _out.print(f"backend: {session.explain()}")
    for name, shape in shapes.items():
        _out.print(f"{name}: {shape['shape']} {shape['dtype']}")
    _out.print(f"outputs: {where}" if where else "self-test passed")


def show_bench(result: "Result", as_json: bool) -> None:
    """Print a grid of measurements, each beside the session in the same cell, and how they grow."""
    if as_json:
        print(result.model_dump_json(indent=2))  # noqa: T201
        return
    machine = result.machine
    _out.print(
        f"{machine.cpu or machine.architecture}, {machine.cores} cores, load {machine.load:g}; session on {result.backend}"
    )
    table = Table("shape", "contender", "in", "threads", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("p50 ms", "p99 ms", "pairs/s", "peak MB", "calls MB", "quartiles", "x session"):
        table.add_column(name, justify="right", no_wrap=True)
    for m in result.measurements:
        figures = [f"{value:.3g}" for value in (m.p50_ms, m.p99_ms, m.pairs_per_s)]
        figures += [
            f"{m.peak_rss_mb:.0f}",
            f"{m.call_mb:.0f}",
            f"{m.ratio.low:.2f} to {m.ratio.high:.2f}",
            f"{m.ratio.median:.2f}",
        ]
        table.add_row("x".join(map(str, m.shape)), m.contender, m.precision, str(m.threads), *figures)
    _out.print(table)
    if result.growth:
        _out.print(_growth_table(result))
    if not all(m.interleaved for m in result.measurements):
        _out.print("not all contenders fitted into memory at once: where they did not, each ran alone, not in turn")
    for name, why in result.left_out.items():
        _out.print(f"left out: {name}: {why}")


def _growth_table(result: "Result") -> Table:
    title = "growth: exponents over the length"
    table = Table("contender", "precision", "threads", "batch", title=title, title_justify="left", box=SIMPLE)
    for name in ("lengths", "time", "memory of calls"):
        table.add_column(name, justify="right")
    for g in result.growth:
        memory = "-" if g.memory_exponent is None else f"{g.memory_exponent:.2f}"
        lengths = ", ".join(f"{length:g}" for length in g.lengths)
        table.add_row(g.contender, g.precision, str(g.threads), str(g.batch), lengths, f"{g.time_exponent:.2f}", memory)
    return table


def show_findings(findings: tuple["Finding", ...], as_json: bool) -> None:
    """Print what the doctor found."""
    if as_json:
        _print_json([dataclasses.asdict(finding) for finding in findings])
        return
    table = Table("", "found", "needed for", "to add it", box=SIMPLE)
    for finding in findings:
        table.add_row(f"{'ok' if finding.ok else '--'} {finding.name}", finding.found, finding.enables, finding.fix)
    _out.print(table)


def describe(spec: LayerSpec) -> str:
    """Return a layer in one line."""
    norm = f", {'LayerNorm' if spec.norm == 'layer' else 'RMSNorm'} first" if spec.prenorm else ""
    extra = (", talking heads" if spec.talking_heads else "") + (f", transformer of depth {spec.depth}" if spec.depth else "")
    return f"dim {spec.dim}, context_dim {spec.context_dim}, {spec.heads} heads of {spec.dim_head}{norm}{extra}"


def _dims(ranges: Dims) -> str:
    return ", ".join(f"{name} {r.min}..{r.max} (opt {r.opt})" for name, r in ranges.items())


def _shape(axes: tuple[Axis, ...]) -> str:
    return f"[{', '.join(map(str, axes))}]"


def _print_json(content: Any) -> None:
    print(json.dumps(json.loads(json.dumps(content), parse_constant=str), indent=2))  # noqa: T201
