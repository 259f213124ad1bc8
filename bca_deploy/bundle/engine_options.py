"""What an engine is built with, as data: the recipe's ``[engine]`` table, and the part of it that the manifest keeps."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bca_deploy.spec import EngineLibrary, Precision

LayerNames = Literal["detailed", "names", "none"]
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BuildOptions(_Table):
    """How an engine is built, whatever it is built for."""

    workspace_mib: int | None = Field(default=None, ge=1, description="memory that a kernel may use while it runs")
    optimization_level: int | None = Field(default=None, ge=0, le=5, description="how long the builder searches")
    # One stream: a second one lets both directions overlap, and keeps the temporaries of both alive.
    aux_streams: int = Field(default=0, ge=0, le=7, description="streams beside the caller's")
    tf32: bool = Field(default=False, description="whether float32 products may be rounded to TF32")
    layer_names: LayerNames = Field(default="detailed", description="what the engine tells of its layers")
    version_compatible: bool = Field(default=False, description="whether later versions of the library load it")
    hardware_compatibility: HardwareCompatibility = Field(default="none", description="other GPUs that it runs on")
    strip_weights: bool = Field(default=False, description="whether it comes without its weights")
    refittable: bool = Field(default=False, description="whether it takes new weights without a build")
    time_limit_s: float = Field(default=1800.0, gt=0, description="seconds after which a build is given up")


class EngineTable(BuildOptions):
    """``[engine]``: what to compile, and for what."""

    library: EngineLibrary
    targets: tuple[str, ...] = ()
    precision: Precision | None = None
    timing_cache: Path | None = None

    @property
    def options(self) -> BuildOptions:
        """The part that says how, and nothing of the machine that builds."""
        return BuildOptions(**self.model_dump(include=set(BuildOptions.model_fields)))
