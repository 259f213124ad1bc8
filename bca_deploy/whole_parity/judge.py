"""Is the exported graph the same function as the model? The rule of parity/rule.py, for a whole model and for each layer in it.

A model that pools with its mask hides what its layers do at dead rows, so every swapped layer is judged on its own outputs,
too: a second graph, which is not kept, gives them. Each output is a pool of its own, over all cases.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.layers.isolation import one_thread
from bca_deploy.parity.cases import Scope
from bca_deploy.parity.rule import on_cpu, outcome, run_all, verdict_of
from bca_deploy.parity.runners import Runner, at_edges
from bca_deploy.parity.verdict import CaseResult, Verdict
from bca_deploy.spec import Precision
from bca_deploy.whole_parity.cases import Case
from bca_deploy.whole_parity.yardstick import Hearing, Yardstick

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Subject:
    """Graphs on trial.

    Attributes:
        path: of the model, which is kept.
        tapped: of the same with every layer's outputs, which is not; None where only the model's own are judged.
        precision: what they compute in.
        keep_io_types: whether their edges are float32 whatever the precision.
    """

    path: Path
    tapped: Path | None
    precision: Precision
    keep_io_types: bool


def judge(
    subject: Subject, yardstick: Yardstick, arrays: Mapping[Case, Arrays], scope: Scope,
    on_case: Callable[[int, int], None],
) -> Verdict:  # fmt: skip
    """Run the cases over a graph.

    Args:
        subject: the graphs.
        yardstick: of the same precision.
        arrays: the inputs of each case.
        scope: what they are called in the report.
        on_case: called after each with the number done and the total.

    Raises:
        InputError: PyTorch itself refuses a case.
    """
    runners, undefined, judged = _runners(subject), set[str](), set[str]()

    def run(case: Case, orders: int) -> list[CaseResult]:
        inputs = arrays[case]
        hearings, edges = yardstick.hearings(inputs, orders), at_edges(inputs, subject.precision, subject.keep_io_types)
        undefined.update(name for name, hearing in hearings.items() if not hearing.defined.all())
        judged.update(name for name, hearing in hearings.items() if hearing.defined.any())
        return [
            result
            for runtime, runner in runners.items()
            for result in _results(case.name, runtime, outcome(runner, edges), hearings)
        ]

    with one_thread():
        results = run_all(run, list(arrays), on_case)
    verdict = verdict_of(subject.path.stem, subject.precision, scope, results, yardstick.weight_rounding())
    notes = [f"{name}: PyTorch itself gives NaN in some cases, and nothing is judged there" for name in sorted(undefined)]
    silent = [f"{name}: PyTorch itself gives NaN everywhere, so that nothing is judged" for name in sorted(undefined - judged)]
    return replace(verdict, notes=(*verdict.notes, *notes), failures=(*verdict.failures, *silent))


def _runners(subject: Subject) -> dict[str, Runner]:
    """Return for each runtime what gives the model's outputs, and those of its layers from the tapped graph."""
    runtimes = on_cpu(subject.precision)
    own = runtimes(subject.path)
    if subject.tapped is None:
        return own
    tapped = runtimes(subject.tapped)

    def both(name: str) -> Runner:
        return lambda inputs: {**tapped[name](inputs), **own[name](inputs)}

    return {name: both(name) for name in own}


def _results(case: str, runtime: str, outputs: Arrays | str, hearings: Mapping[str, Hearing]) -> Iterator[CaseResult]:
    for name, hearing in hearings.items():
        if isinstance(outputs, str):
            yield hearing.trial.judge(case, "every output", "plain", runtime, outputs)
            return
        if name not in outputs:  # of a layer, and no graph was made to tell
            continue
        family = name.rsplit("/", 2)[0] if "/" in name else name  # of a layer both outputs, and all of its calls
        shown = hearing.shown(np.asarray(outputs[name]))
        told = f"{name}: {shown}" if isinstance(shown, str) else {name: shown}
        yield hearing.trial.judge(case, family, "plain", runtime, told)
