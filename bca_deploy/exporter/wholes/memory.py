"""Which form of absorbed projections an engine takes: the one whose layer, built alone, needs the least scratch memory."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from bca_deploy.bundle.engine_options import EngineTable
from bca_deploy.engines import libraries
from bca_deploy.engines.builder_process import Request
from bca_deploy.engines.compile import compile_engine
from bca_deploy.engines.profiles import shapes
from bca_deploy.exporter.recipe import Recipe
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.lowered_model import lower
from bca_deploy.signature import DimRange, Dims
from bca_deploy.spec import AbsorbedForm, Interface, Lowering, Precision, layer_signature
from bca_deploy.tracing.graph import trace, write
from bca_deploy.whole.find import Found
from bca_deploy.whole.uses import Use


@dataclass(frozen=True)
class Place:
    """Where a layer stands: two with the same layer and place need the same memory.

    Attributes:
        batch: the largest.
        x_len: the most rows of ``x``.
        context_len: the most rows of ``context``.
        masked: whether it is given masks.
    """

    batch: int
    x_len: int
    context_len: int
    masked: bool


def least_memory(
    founds: Sequence[Found], uses: Mapping[str, Use], batch: int, recipe: Recipe
) -> dict[str, tuple[Lowering, str]]:
    """Return for each layer of absorbed projections the form that the planned engine needs least scratch memory for, and why.

    Nothing is said where no TensorRT-RTX engine is planned: its builder alone needs no GPU.

    Raises:
        EngineError: the builder failed.
    """
    table = recipe.engine
    if table is None or table.library != "rtx":
        return {}
    halves = [precision for precision in recipe.precision if precision != "fp32"]
    precision: Precision = table.precision or (halves[0] if halves else "fp16")
    known: dict[tuple[object, Place], tuple[Lowering, str]] = {}
    chosen: dict[str, tuple[Lowering, str]] = {}
    for found in founds:
        if found.checkpoint.spec.kin.absorbed:
            place = Place(batch, *uses[found.path].lengths, uses[found.path].masked)
            key = found.checkpoint.spec, place
            known[key] = known.get(key) or _chosen(found.checkpoint, place, precision, table, recipe.opset)
            chosen[found.path] = known[key]
    return chosen


def _chosen(checkpoint: Checkpoint, place: Place, precision: Precision, table: EngineTable, opset: int) -> tuple[Lowering, str]:
    needs = {form: _scratch(checkpoint, form, place, precision, table, opset) for form in get_args(AbsorbedForm)}
    listed = ", ".join(f"{form} {size / 1e6:.1f}" for form, size in needs.items())
    at = f"{place.batch}x{place.x_len}x{place.context_len}"
    return min(needs, key=lambda form: needs[form]), f"scratch memory of the {precision} engine at {at}, MB: {listed}"


def _scratch(
    checkpoint: Checkpoint, form: AbsorbedForm, place: Place, precision: Precision, table: EngineTable, opset: int
) -> int:
    dims = Dims(batch=_up_to(place.batch), x_len=_up_to(place.x_len), context_len=_up_to(place.context_len))
    signature = layer_signature(checkpoint.spec, Interface(place.masked, place.masked), dims)
    model = trace(lower(checkpoint, form, precision, masked=place.masked), signature, opset)
    library = libraries.LIBRARIES[table.library]
    with tempfile.TemporaryDirectory(prefix="bca-memory-") as folder:
        path = Path(folder) / f"{form}.onnx"
        write(model, path)
        request = Request(
            module=library.module,
            onnx=str(path),
            out=str(path.with_suffix(".engine")),
            profiles=[{name: [list(s) for s in each] for name, each in shapes(dims, signature.inputs).items()}],
            targets=list(libraries.check_targets(library, table.targets, precision)),
            options=table.model_dump(mode="json"),
        )
        return compile_engine(request, table.time_limit_s, lambda share: None).log.scratch_bytes or 0


def _up_to(largest: int) -> DimRange:
    return DimRange(1, max(1, largest // 2), largest)
