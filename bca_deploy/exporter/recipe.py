"""What to export, as data: a TOML recipe, overridden by flags. The defaults here are the documented default export."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bca_deploy.bundle.engine_options import EngineTable, _Table
from bca_deploy.errors import InputError, nearest
from bca_deploy.signature import DimRange, Dims
from bca_deploy.spec import (
    DTYPE_OF,
    EXTERNAL_DATA_BYTES,
    LAYER_DIMS,
    Bias,
    Interface,
    LayerSpec,
    Lowering,
    Norm,
    Precision,
)


class LayerTable(_Table):
    """``[layer]``: the layer that seeded weights are made for, or that a checkpoint must agree with."""

    dim: int = 512
    context_dim: int | None = 386
    heads: int = 8
    dim_head: int = 64
    prenorm: bool = True
    norm: Norm = "layer"
    talking_heads: bool = False
    depth: int | None = None
    ff_expansion: float = Field(default=4.0, allow_inf_nan=False)
    final_norms: bool = False

    def spec(self) -> LayerSpec:
        """Return the specification; the hidden width is ``int(dim * ff_expansion)``, as in the published package."""
        context_dim = self.dim if self.context_dim is None else self.context_dim
        values = self.model_dump(exclude={"ff_expansion", "context_dim"})
        if self.depth is not None:
            values |= {
                "ff_hidden": int(self.dim * self.ff_expansion),
                "context_ff_hidden": int(context_dim * self.ff_expansion),
            }
        return LayerSpec(context_dim=context_dim, **values)


class InputsTable(_Table):
    """``[inputs]``: which optional inputs exist."""

    mask: bool = True
    context_mask: bool = True
    rel_pos_bias: Bias = "none"


class OutputsTable(_Table):
    """``[outputs]``: which optional outputs exist."""

    attention_maps: bool = False


def _as_range(value: Any) -> Any:
    """Take ``(1, 4, 8)`` for ``{"min": 1, "opt": 4, "max": 8}``."""
    return (
        dict(zip(("min", "opt", "max"), value, strict=True)) if isinstance(value, list | tuple) and len(value) == 3 else value
    )


Range = Annotated[DimRange, BeforeValidator(_as_range)]


class DimsTable(_Table):
    """``[dims]``: the sizes that each dimension may take; a whole model has its own."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Range]

    batch: Range = LAYER_DIMS["batch"]
    x_len: Range = LAYER_DIMS["x_len"]
    context_len: Range = LAYER_DIMS["context_len"]


class ModelTable(_Table):
    """``[model]``: a whole model, whose layers are found in it."""

    factory: str | None = None
    checkpoint: Path | None = None
    prefix: str = ""
    #: ``.npz`` files, arrays by the names of forward's arguments.
    samples: tuple[Path, ...] = ()
    #: Of an input, for each axis a name, a size, or 0 for the samples' own.
    axes: dict[str, tuple[str | int | None, ...]] = Field(default_factory=dict)
    #: Integer inputs that are masks, each with the dimension that it masks.
    masks: dict[str, str] = Field(default_factory=dict)
    #: Of integer inputs, the least and the largest value.
    ranges: dict[str, tuple[int, int]] = Field(default_factory=dict)
    keep_literal: tuple[str, ...] = ()
    allow_none: bool = False

    @property
    def given_axes(self) -> dict[str, tuple[str | int | None, ...]]:
        """The axes, None where the samples say."""
        return {name: tuple(axis or None for axis in axes) for name, axes in self.axes.items()}


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Recipe(_Table):
    """A whole recipe; every key has a default."""

    description: str = ""
    layer: LayerTable = LayerTable()
    model: ModelTable | None = None
    inputs: InputsTable = InputsTable()
    outputs: OutputsTable = OutputsTable()
    dims: DimsTable = DimsTable()
    opset: int = 17
    lowering: Literal["auto"] | Lowering = "auto"
    precision: Annotated[tuple[Precision, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = ("fp32",)
    keep_io_types: bool = True
    parity: Literal["quick", "full"] = "quick"
    #: Measure here which form the graph for the CPU takes.
    tune: bool = False
    external_data_bytes: int = Field(default=EXTERNAL_DATA_BYTES, ge=0)
    seed: int = 0
    engine: EngineTable | None = None
    #: ``[[profile]]``: the ranges of one optimization profile; a dimension left out has the range of ``[dims]``.
    profile: tuple[dict[str, Range], ...] = ()

    @property
    def ranges(self) -> Dims:
        """The named dimensions of the layer."""
        return Dims({name: getattr(self.dims, name) for name in DimsTable.model_fields})

    @property
    def given_ranges(self) -> dict[str, DimRange]:
        """The ranges that were given, of any dimensions."""
        return {name: getattr(self.dims, name) for name in self.dims.model_fields_set}

    @property
    def interface(self) -> Interface:
        """The optional inputs and outputs."""
        return Interface(**self.inputs.model_dump(), **self.outputs.model_dump())


def read_recipe(path: Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and lay flags over it.

    Args:
        path: a TOML file; the defaults alone where None.
        overrides: nested like the file; a None means not given.

    Returns:
        The recipe.

    Raises:
        InputError: not a file, not TOML, an unknown key (the nearest is named) or a value out of range.
    """
    content = _read_toml(path) if path else {}
    try:
        recipe = Recipe.model_validate(_merge(content, overrides or {}))
    except ValidationError as error:
        raise InputError(f"{path or 'options'}: {'; '.join(_explain(e) for e in error.errors())}") from error
    if problems := list(_problems(recipe)):
        raise InputError(f"{path or 'options'}: {'; '.join(problems)}")
    return recipe


def _problems(recipe: Recipe) -> Iterator[str]:
    """Yield what belongs to the bare layer and not to a whole model, and the other way round."""
    if recipe.model is None:
        known = list(DimsTable.model_fields)
        yield from (f"unknown key dims.{name}{nearest(name, known)}" for name in recipe.dims.model_extra or {})
        return
    for name in ("layer", "inputs", "outputs", "lowering"):
        if name in recipe.model_fields_set:
            yield f"{name} is about the bare layer, and this is a whole model; leave it out (keep_literal keeps a layer's form)"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror or error}; check its permissions") from error
    if content is None:
        here = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise InputError(f"recipe {path} does not exist{nearest(path.name, here)}; recipes are TOML files, see export/recipes/")
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not TOML: {error}") from error


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping):
            inner = _as_range(merged.get(key, {}))
            if isinstance(inner, Mapping) and (both := _merge(inner, value)):  # anything else is pydantic's to refuse
                merged[key] = both
        elif value is not None:
            merged[key] = value
    return merged


# What precisions are called elsewhere.
_PRECISIONS = {dtype: precision for precision, dtype in DTYPE_OF.items()} | {"half": "fp16", "float": "fp32"}


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {where}{nearest(str(error['loc'][-1]), _known(error['loc'][:-1]))}"
    if where == "engine.library":
        return "engine.library: give --engine rtx or --engine tensorrt, or library under [engine] of the recipe"
    if error["type"] == "missing":
        return f"{where} is missing, and {'.'.join(map(str, error['loc'][:-1]))} cannot be without it"
    if error["type"] == "dataclass_type":  # a range is the only one
        return f"{where}: give three sizes, min, opt and max, such as (1, 4, 8) (got {error['input']!r})"
    meant = _meant(error) if error["type"] == "literal_error" else ""
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{meant} (got {error['input']!r})"


def _meant(error: Any) -> str:
    said = str(error["input"])
    allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
    return nearest(_PRECISIONS[said] if said in _PRECISIONS and "fp32" in allowed else said, allowed)


def _known(place: tuple[Any, ...]) -> list[str]:
    """Return the keys that the table at ``place`` has."""
    if (place[:1] == ("dims",) and len(place) == 2) or (place[:1] == ("profile",) and len(place) == 3):
        return [f.name for f in fields(DimRange)]
    tables: dict[Any, type[BaseModel]] = {
        "layer": LayerTable,
        "inputs": InputsTable,
        "outputs": OutputsTable,
        "dims": DimsTable,
        "engine": EngineTable,
        "model": ModelTable,
    }
    return list(tables.get(place[0] if place else None, Recipe).model_fields)
