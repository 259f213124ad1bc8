"""What a builder's log says: memory, fused attentions, warnings, and where it stopped."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bca_deploy.bundle.manifest import Evidence

#: The name that NVIDIA's compiler gives a fused attention, seen with TensorRT-RTX 1.7.1.
_FUSED = re.compile(r"^Name: _gemm_mha\w*,", re.MULTILINE)
_LAYER = re.compile(r"^Name: [^,]+, LayerType: (?!ShapeHostToDevice)", re.MULTILINE)
_SCRATCH = re.compile(r"^Max Scratch Memory: (\d+) bytes", re.MULTILINE)
_WEIGHTS = re.compile(r"^Total Weights Memory: (\d+) bytes", re.MULTILINE)
_NODE = re.compile(r"^Parsing node: (.+)$", re.MULTILINE)
_COMPILED = re.compile(r"^Compiling subgraph (.+)$|^Layer: (\{.+?\}) ", re.MULTILINE)
_SEVERITY = re.compile(r"^(INTERNAL_ERROR|ERROR|WARNING|INFO|VERBOSE)\t", re.MULTILINE)


@dataclass(frozen=True)
class BuildLog:
    """A builder's log.

    Attributes:
        text: the messages without their severities.
        warnings: the warnings, each once, in order.
        errors: the errors, likewise.
    """

    text: str
    warnings: tuple[str, ...]
    errors: tuple[str, ...]

    @property
    def scratch_bytes(self) -> int | None:
        """Device memory that the engine needs besides weights, inputs and outputs; None where the log does not say."""
        return _number(_SCRATCH, self.text)

    @property
    def weight_bytes(self) -> int | None:
        """Device memory for weights; None where the log does not say."""
        return _number(_WEIGHTS, self.text)

    @property
    def fused_attentions(self) -> int | None:
        """Attention kernels in the list of layers; None where there is no such list (it takes detailed layer names)."""
        return len(_FUSED.findall(self.text)) if _LAYER.search(self.text) else None

    def last_lines(self, count: int = 5) -> str:
        """Return the end of the log."""
        return "\n".join(f"  {line}" for line in self.text.strip().splitlines()[-count:]) or "  (the log is empty)"

    def last_place(self) -> str:
        """Return the last node parsed or layer compiled: where a crash probably was."""
        parsed = _NODE.findall(self.text)
        compiled = [a or b for a, b in _COMPILED.findall(self.text)]
        return str((compiled or parsed or ["before the first node"])[-1])


def read(path: Path) -> BuildLog:
    """Read a log as engines/builder_process.py writes it; an absent one is empty."""
    raw = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    parts = _SEVERITY.split(raw)
    entries = list(zip(parts[1::2], (text.rstrip("\n") for text in parts[2::2]), strict=True))
    return BuildLog(
        text=parts[0] + "\n".join(text for _, text in entries),
        warnings=_distinct(text for severity, text in entries if severity == "WARNING"),
        errors=_distinct(text for severity, text in entries if severity.endswith("ERROR")),
    )


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.findall(text)
    return max(int(number) for number in found) if found else None


def judge_fusion(log: BuildLog, attentions: int, map_bytes: int) -> tuple[bool | None, Evidence]:
    """Say whether every attention was fused.

    The rule where the log names no layers: an attention that is not fused writes its map ``[batch, heads, x_len,
    context_len]`` to scratch memory, so scratch smaller than one map proves that all are fused. The reverse does not hold.

    Args:
        log: of the build.
        attentions: in the graph: two for each layer, and none where the family's form has no ordinary ones.
        map_bytes: of one attention map at the largest shapes, in the model's precision.

    Returns:
        True, False or None for unknown; and what the answer rests on.
    """
    if not attentions:
        return None, "unknown"
    if log.fused_attentions is not None:
        return log.fused_attentions >= attentions, "log"
    if log.scratch_bytes is not None and log.scratch_bytes < map_bytes:
        return True, "scratch"
    return None, "unknown"
