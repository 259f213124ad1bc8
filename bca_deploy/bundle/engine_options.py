"""What an engine is built with, as data: the recipe's tables, which the manifest keeps."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bca_deploy.spec import DimRange, EngineLibrary, Precision

LayerNames = Literal["detailed", "names", "none"]
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineTable(_Table):
    """``[engine]``: what to compile, and for what."""

    library: EngineLibrary
    targets: tuple[str, ...] = ()
    precision: Precision | None = None
    workspace_mib: int | None = Field(default=None, ge=1)
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    # One stream: a second one lets both directions overlap, and keeps the temporaries of both alive.
    aux_streams: int = Field(default=0, ge=0, le=7)
    tf32: bool = False
    layer_names: LayerNames = "detailed"
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    strip_weights: bool = False
    refittable: bool = False
    timing_cache: Path | None = None
    time_limit_s: float = Field(default=1800.0, gt=0)


class ProfileTable(_Table):
    """``[[profile]]``: the ranges of one optimization profile; a dimension left out has the range of ``[dims]``."""

    batch: DimRange | None = None
    x_len: DimRange | None = None
    context_len: DimRange | None = None
