"""The bundle's manifest, format 1: what is in the bundle, field by field. docs/bundle-format.md tells it, beside its schema."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, field_validator, model_validator

from bca_deploy.arithmetic import LIMIT
from bca_deploy.bundle.engine_options import BuildOptions
from bca_deploy.bundle.trust import Trust
from bca_deploy.signature import Dims, Signature, hull
from bca_deploy.spec import DTYPE_OF, EngineLibrary, Interface, LayerSpec, Lowering, Precision, Runtime

FORMAT = 1
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
SELFTEST_FILE = "selftest.npz"
EXPECT_FILE = "expect.npz"
PARITY_FILE = "parity.json"
SAMPLES_FILE = "samples.npz"
MODEL_FILE = "model.json"
WEIGHTS_MAP_FILE = "weights_map.json"
TRACES = "traces"
BUILD_FILE = "build.json"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
#: The form of the attention in a graph that may have several layers, or none.
ModelLowering = Lowering | Literal["mixed", "none"]
Evidence = Literal["log", "scratch", "unknown"]


def _from_word(value: object) -> object:
    """Read what JSON has no number for: the ratio of a bundle that failed parity may be endless."""
    return float(value) if isinstance(value, str) and value in ("Infinity", "-Infinity", "NaN") else value


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class ParityEntry(_Model):
    """How the model was held against PyTorch; the whole report is in parity.json."""

    passed: bool = Field(description="false only in a bundle kept by --keep-failed")
    scope: Literal["quick", "full"] = Field(description="which parity matrix ran")
    cases: int = Field(description="distinct cases")
    runtimes: tuple[str, ...] = Field(description="what the cases ran on")
    worst_ratio: Annotated[float, BeforeValidator(_from_word)] = Field(
        description="pooled RMS error over PyTorch's at the same precision, of the pool nearest to its limit"
    )


class ProofEntry(_Model):
    """How a layer inside a model was held against the layer that its weights say."""

    cases: int = Field(description="combinations of inputs, masks and logits that were run in float64")
    worst: float = Field(description="the largest difference, as a share of the largest value")


class LayerEntry(_Model):
    """A layer that was lowered."""

    path: str = Field(description="its name in the model; empty where the model is the layer")
    spec: LayerSpec = Field(description="what it is")
    lowering: Lowering = Field(description="form of its attention in the graphs")
    why: str | None = Field(default=None, description="what the form was chosen by, where the family has several")
    calls: int = Field(default=1, description="how often the model calls it")
    proof: ProofEntry | None = Field(default=None, description="of a layer inside a model")


class ModelEntry(_Model):
    """One ONNX file."""

    file: str = Field(description="path in the bundle")
    runtime: Runtime = Field(description="what the graph is made for; portable means plain ai.onnx operators")
    opset: int = Field(description="ai.onnx opset of the file")
    precision: Precision = Field(description="of weights and activations; norms and means over values are float32")
    lowering: ModelLowering = Field(
        description="form of the attention in the graph: mixed where layers differ, none without any"
    )
    keep_io_types: bool = Field(
        description="whether floating-point inputs and outputs are float32 whatever the precision, else they have its type"
    )
    nodes: int = Field(description="nodes in the graph")
    external_data: str | None = Field(description="file that holds the weights, where they are outside the .onnx file")
    parity: ParityEntry


class GpuEntry(_Model):
    """A GPU, as its driver names it."""

    name: str = Field(description="product name")
    compute_capability: str = Field(description="such as sm90")
    driver: str = Field(description="version of the driver")


class EngineEntry(_Model):
    """One compiled engine."""

    file: str = Field(description="path in the bundle")
    library: EngineLibrary = Field(description="what loads it: TensorRT or TensorRT-RTX")
    version: str = Field(description="version of that library, which must load it unless it is version compatible")
    model: str = Field(description="the ONNX file it was compiled from")
    model_sha256: Sha256 = Field(description="that file's hash then; another one now means that the engine is stale")
    precision: Precision = Field(description="of the model")
    targets: tuple[str, ...] = Field(description="compute capabilities it runs on; empty where it was built on its GPU")
    gpu: GpuEntry | None = Field(description="the GPU it was built on and is for; none where it was built ahead of time")
    profiles: tuple[Dims, ...] = Field(min_length=1, description="the ranges of each optimization profile")
    static: bool = Field(description="whether every dimension is fixed, so that there is no profile to choose")
    matmuls: dict[str, int] = Field(description="matrix products in the network, by element type")
    weights: dict[str, int] = Field(description="values of the constants in the network, by element type")
    scratch_bytes: int | None = Field(description="device memory besides weights, inputs and outputs, at the largest shapes")
    weight_bytes: int | None = Field(description="device memory for weights")
    attentions_fused: bool | None = Field(description="whether every attention became one kernel; null where unknown")
    fusion_evidence: Evidence = Field(description="what that rests on: the log's layers, the scratch memory, or nothing")
    options: BuildOptions = Field(description="what it was built with; building with the same again refreshes it")


class FileEntry(_Model):
    """Size and hash of one file."""

    bytes: int = Field(description="size in bytes", ge=0, lt=LIMIT)
    sha256: Sha256 = Field(description="hash of the content")


class Manifest(_Model):
    """The bundle's table of contents."""

    format: Literal[1] = Field(description="bundle format; a reader refuses a newer one")
    source: str = Field(default="layer", description="layer, or the class of the whole model")
    trust: Trust = Field(
        default="on-trust",
        description="what shows that it is the function that its user runs: the live module, a sample of outputs, or nothing",
    )
    layers: tuple[LayerEntry, ...] = Field(description="the layers that were lowered; of a bare layer enough to rebuild it")
    interface: Interface | None = Field(
        default=None, description="which optional inputs and outputs the bare layer has; null for a whole model"
    )
    signature: Signature = Field(description="what every model takes and gives: tensors, dimensions and their ranges, masks")
    models: tuple[ModelEntry, ...] = Field(min_length=1, description="the ONNX files, the preferred one first")
    engines: tuple[EngineEntry, ...] = Field(description="compiled engines")
    versions: dict[str, str] = Field(description="versions of the packages that made the bundle")
    files: dict[str, FileEntry] = Field(description="every file but manifest.json and build.json, by path")

    @property
    def layer(self) -> LayerSpec | None:
        """The layer, where the model is that and nothing more."""
        return self.layers[0].spec if self.interface is not None and self.layers else None

    @field_validator("format", mode="before")
    @classmethod
    def _check_format(cls, value: object) -> object:
        if type(value) is not int:  # true and 1.0 are 1 to Python
            raise ValueError("Input should be a valid integer")
        return value

    @model_validator(mode="after")
    def _check_signature(self) -> Self:
        if not (self.signature.inputs and self.signature.outputs):
            raise ValueError("the signature has no inputs or no outputs")
        return self

    @model_validator(mode="after")
    def _check_engines(self) -> Self:
        for engine in self.engines:
            if engine.model not in {model.file for model in self.models}:
                raise ValueError(f"{engine.file} was built from {engine.model}, which the bundle has not")
            for profile in engine.profiles:
                if set(profile) != set(self.signature.dims):
                    raise ValueError(f"{engine.file} has a profile of {', '.join(profile)}, not of the signature's dimensions")
        return self


def json_schema() -> dict[str, JsonValue]:
    """Return the JSON Schema of the manifest."""
    schema: dict[str, JsonValue] = Manifest.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def precisions(manifest: Manifest) -> tuple[Precision, ...]:
    """Return the precisions that the bundle has portable models of, in the manifest's order."""
    return tuple(model.precision for model in manifest.models if model.runtime == "portable")


def cpu_lowering(manifest: Manifest) -> Lowering | None:
    """Return the form of the graph for onnxruntime on the CPU where measuring chose it, as ``bca-export --tune`` does."""
    literal = {model.runtime for model in manifest.models if model.lowering == "reference"}
    return "reference" if literal == {"onnxruntime-cpu"} else None


def model_of(manifest: Manifest, precision: Precision) -> ModelEntry:
    """Return the portable model of a precision; the caller made sure that there is one."""
    return next(m for m in manifest.models if m.precision == precision and m.runtime == "portable")


def signature_of(manifest: Manifest, model: ModelEntry) -> Signature:
    """Return what one model takes and gives, in its own element types."""
    return manifest.signature if model.keep_io_types else manifest.signature.of_floats(DTYPE_OF[model.precision])


def signature_of_engine(manifest: Manifest, engine: EngineEntry) -> Signature:
    """Return what an engine takes and gives, within its profiles: it was compiled from one of the models."""
    model = next(model for model in manifest.models if model.file == engine.model)
    return signature_of(manifest, model).within(hull(engine.profiles))
