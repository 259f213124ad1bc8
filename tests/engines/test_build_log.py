"""What is read from a builder's log, and the rule that says whether every attention was fused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bca_deploy.engines import build_log
from bca_deploy.engines.build_log import BuildLog, judge_fusion, read

KERNEL = "Name: _gemm_mha_v2_myl1_{}, LayerType: kgen, Inputs: []"
OTHER = "Name: __myl_Fc_myl1_3, LayerType: runtime_fusion, Inputs: []"
#: Stands in every list of layers, also in one that names no layer.
SHAPES = "Name: __myl_x, LayerType: ShapeHostToDevice, Inputs: []"


def log_of(*lines: str) -> BuildLog:
    return BuildLog("\n".join(lines), (), ())


def written(tmp_path: Path, content: str | bytes) -> BuildLog:
    path = tmp_path / "log"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read(path)


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    log = read(tmp_path / "absent")
    assert log == BuildLog("", (), ())
    assert log.last_lines() == "  (the log is empty)"
    assert log.last_place() == "before the first node"


def test_messages_are_told_apart_by_severity_and_kept_once(tmp_path: Path) -> None:
    log = written(
        tmp_path,
        "INFO\thello\nWARNING\tslow\nERROR\tbad\nof two lines\nWARNING\tslow\nINTERNAL_ERROR\tworse\nWARNING\tother\n",
    )
    assert log.warnings == ("slow", "other")
    assert log.errors == ("bad\nof two lines", "worse")
    assert log.text.splitlines() == ["hello", "slow", "bad", "of two lines", "slow", "worse", "other"]


def test_a_severity_inside_a_message_is_no_message(tmp_path: Path) -> None:
    assert written(tmp_path, "INFO\tnode ERROR\tis a name\n").errors == ()


def test_a_line_cut_off_by_a_crash_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    log = written(tmp_path, b"VERBOSE\tParsing node: first [MatMul]\nVERBOSE\tParsing node: \xc3")
    assert log.last_place() == "�"
    assert log.last_lines(1) == "  Parsing node: �"


@given(st.lists(st.sampled_from(["INFO", "WARNING", "ERROR", "VERBOSE"]), max_size=8))
def test_no_message_is_lost(severities: list[str]) -> None:
    raw = "".join(f"{severity}\tmessage {number}\n" for number, severity in enumerate(severities))
    parts = build_log._SEVERITY.split(raw)
    assert [text.strip() for text in parts[2::2]] == [f"message {number}" for number in range(len(severities))]


def test_memory_is_the_largest_that_the_log_names() -> None:
    """One line for each profile and target; the engine needs the largest."""
    log = log_of("Max Scratch Memory: 512 bytes", "Max Scratch Memory: 4096 bytes", "Total Weights Memory: 77 bytes")
    assert (log.scratch_bytes, log.weight_bytes) == (4096, 77)
    assert (log_of("nothing").scratch_bytes, log_of("nothing").weight_bytes) == (None, None)


def test_attention_kernels_are_counted_only_where_layers_are_listed() -> None:
    assert log_of(OTHER, KERNEL.format(1), KERNEL.format(2)).fused_attentions == 2
    assert log_of(OTHER).fused_attentions == 0
    assert log_of("no list at all").fused_attentions is None
    assert log_of(SHAPES).fused_attentions is None


def test_the_last_place_is_the_last_layer_compiled_or_else_the_last_node_parsed() -> None:
    parsed = log_of("Parsing node: one [Shape]", "Parsing node: two [MatMul]")
    assert parsed.last_place() == "two [MatMul]"
    assert log_of(parsed.text, "Compiling subgraph of two").last_place() == "of two"


def test_the_last_lines_are_the_end_of_the_log() -> None:
    assert log_of("a", "b", "c").last_lines(2) == "  b\n  c"


@pytest.mark.parametrize(
    ("lines", "judged"),
    [
        ([OTHER, KERNEL.format(1), KERNEL.format(2)], (True, "log")),
        ([OTHER, KERNEL.format(1)], (False, "log")),
        # The list of layers is the better witness: little scratch memory does not overrule it.
        ([OTHER, "Max Scratch Memory: 1 bytes"], (False, "log")),
        (["Max Scratch Memory: 999 bytes"], (True, "scratch")),
        # Enough memory for a map proves nothing: it may be used for something else.
        (["Max Scratch Memory: 1000 bytes"], (None, "unknown")),
        ([], (None, "unknown")),
    ],
)
def test_whether_every_attention_was_fused(lines: list[str], judged: tuple[bool | None, str]) -> None:
    assert judge_fusion(log_of(*lines), attentions=2, map_bytes=1000) == judged


@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_scratch_memory_never_proves_that_something_was_not_fused(scratch: int, map_bytes: int) -> None:
    fused, evidence = judge_fusion(log_of(f"Max Scratch Memory: {scratch} bytes"), 2, map_bytes)
    assert fused in (True, None)
    assert (fused is True) == (scratch < map_bytes) == (evidence == "scratch")
