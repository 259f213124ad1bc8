"""What TensorRT-RTX engines of the default layer need, built ahead of time: scratch memory, file size, seconds. No GPU needed.

python benchmarks/engines.py [--json]

Layer: dims 512/386, 8 heads of 64, fp16 with fp16 edges, one profile up to 8 x 2048 x 2048. Each build is a process of its
own; seconds are the median of five, that process included.
"""

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bca_deploy.bundle.engine_options import EngineTable
from bca_deploy.engines import build_log
from bca_deploy.engines.builder_process import Request
from bca_deploy.engines.compile import Built, compile_engine
from bca_deploy.engines.libraries import LIBRARIES
from bca_deploy.engines.profiles import shapes
from bca_deploy.layers.checkpoint import from_module
from bca_deploy.layers.lowered_model import lower
from bca_deploy.layers.reference import build
from bca_deploy.spec import LAYER_DIMS, Bias, Interface, LayerSpec, Lowering, Precision, layer_signature
from bca_deploy.tracing import graph

LAYER = LayerSpec(dim=512, context_dim=386, heads=8, prenorm=True)


@dataclass(frozen=True)
class Variant:
    """One engine of the table."""

    name: str
    spec: LayerSpec = LAYER
    bias: Bias = "none"
    masks: bool = True
    lowering: Lowering = "fused"
    precision: Precision = "fp16"
    fp32_edges: bool = False
    every_target: bool = False

    @property
    def interface(self) -> Interface:
        """The optional inputs."""
        return Interface(self.masks, self.masks, self.bias)


def transformer(depth: int) -> LayerSpec:
    return LayerSpec(
        dim=512, context_dim=386, heads=8, prenorm=True, norm="rms", depth=depth, ff_hidden=2048, context_ff_hidden=1544
    )


VARIANTS = (
    Variant("masks"),
    Variant("masks, all six targets", every_target=True),
    Variant("masks, fp32 edges", fp32_edges=True),
    Variant("masks, bf16", precision="bf16"),
    Variant("masks, fp32", precision="fp32"),
    Variant("masks, literal graph", lowering="reference"),
    Variant("no masks", masks=False),
    Variant("bias shared", bias="shared"),
    Variant("bias shared, fp32 edges", bias="shared", fp32_edges=True),
    Variant("bias per batch", bias="batch"),
    Variant("transformer of depth 1", spec=transformer(1)),
    Variant("transformer of depth 3", spec=transformer(3)),
)


def write_model(variant: Variant, path: Path) -> int:
    """Write the ONNX file; return the bytes of its weights."""
    lowered = lower(from_module(build(variant.spec)), variant.lowering, variant.precision, variant.fp32_edges)
    graph.write(graph.trace(lowered, layer_signature(variant.spec, variant.interface), 17), path)
    return sum(tensor.nbytes for tensor in lowered.core.state_dict().values())


def build_engine(variant: Variant, onnx: Path) -> Built:
    inputs = layer_signature(variant.spec, variant.interface).inputs
    request = Request(
        module="tensorrt_rtx",
        onnx=str(onnx),
        out=str(onnx.with_suffix(".engine")),
        profiles=[{name: [list(s) for s in triple] for name, triple in shapes(LAYER_DIMS, inputs).items()}],
        targets=list(LIBRARIES["rtx"].targets) if variant.every_target else ["sm89"],
        options=EngineTable(library="rtx").model_dump(mode="json"),
    )
    return compile_engine(request, 600, lambda share: None)


def measure(variant: Variant, directory: Path) -> dict[str, object]:
    onnx = directory / "model.onnx"
    weights = write_model(variant, onnx)
    runs = [build_engine(variant, onnx) for _ in range(5)]
    largest = math.prod(LAYER_DIMS.at("max").values()) * variant.spec.heads
    log = runs[0].log
    fused, evidence = build_log.judge_fusion(log, 2 * (variant.spec.depth or 1), largest * 2)
    return {
        "engine": variant.name,
        "scratch_mb": round((log.scratch_bytes or 0) / 1e6, 1),
        "weights_mb": round(weights / 1e6, 2),
        "file_mb": round(runs[0].facts.bytes / 1e6, 2),
        "build_s": round(statistics.median(run.seconds for run in runs), 2),
        "fused": {True: "yes", False: "no", None: "unknown"}[fused] + f" ({evidence})",
        "version": runs[0].facts.version,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measure(variant, Path(scratch)) for variant in VARIANTS]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print(f"TensorRT-RTX {rows[0]['version']}, target sm89 unless said otherwise\n")
    print("| engine | scratch MB | weights MB | file MB | build s | attentions fused |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            "| " + " | ".join(str(row[k]) for k in ("engine", "scratch_mb", "weights_mb", "file_mb", "build_s", "fused")) + " |"
        )


if __name__ == "__main__":
    main()
