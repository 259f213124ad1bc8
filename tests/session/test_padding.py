"""Requests that share a run: every request once, similar lengths, no run larger than a profile."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layers import make_spec

from bca_deploy.session.padding import PADDING, grouped
from bca_deploy.signature import DimRange, Dims
from bca_deploy.spec import LAYER_DIMS, Interface, layer_signature

SHORT = Dims(batch=DimRange(1, 1, 16), x_len=DimRange(1, 64, 128), context_len=DimRange(1, 64, 128))
LONG = Dims(batch=DimRange(1, 1, 4), x_len=DimRange(129, 512, 2048), context_len=DimRange(129, 512, 2048))
LAYER = layer_signature(make_spec(), Interface())
length = st.integers(1, 128) | st.integers(129, 2048)


def run_of(shapes: list[tuple[int, int, int]]) -> dict[str, int]:
    batches, x_lens, context_lens = zip(*shapes, strict=True)
    return {"batch": sum(batches), "x_len": max(x_lens), "context_len": max(context_lens)}


@given(st.lists(st.tuples(st.integers(1, 4), length, length), max_size=40))
def test_every_request_is_in_one_run_that_a_profile_holds_with_little_padding(shapes: list[tuple[int, int, int]]) -> None:
    profiles = [SHORT, LONG]
    fitting = {index: shape for index, shape in enumerate(shapes) if any(p.holds(run_of([shape])) for p in profiles)}
    groups = grouped({index: LAYER.dims.named(shape) for index, shape in fitting.items()}, LAYER, profiles)
    assert sorted(index for group in groups for index in group) == sorted(fitting)
    for group in groups:
        run = run_of([fitting[index] for index in group])
        assert any(profile.holds(run) for profile in profiles)
        full = run["batch"] * (run["x_len"] + run["context_len"])
        assert full - sum(b * (n + m) for b, n, m in (fitting[index] for index in group)) <= PADDING * full


def test_requests_of_one_length_fill_the_largest_batch() -> None:
    assert [len(group) for group in grouped(dict.fromkeys(range(40), LAYER.dims.named((1, 64, 64))), LAYER, [SHORT])] == [
        16,
        16,
        8,
    ]


@pytest.mark.parametrize("seed", range(5))
def test_bands_take_fewer_runs_than_one_order_does(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(16, 513, (64, 2)).tolist()
    runs = len(grouped({i: LAYER.dims.named((1, *pair)) for i, pair in enumerate(lengths)}, LAYER, [LAYER_DIMS]))
    assert runs <= 16
    assert runs < len(one_order(lengths))


def one_order(lengths: list[list[int]]) -> list[list[int]]:
    """The plain way: by x, then by context."""
    groups: list[list[list[int]]] = []
    for pair in sorted(lengths):
        grown = [*(groups[-1] if groups else []), pair]
        full = len(grown) * sum(max(one[side] for one in grown) for side in (0, 1))
        if groups and len(grown) <= 8 and full - sum(map(sum, grown)) <= PADDING * full:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups  # type: ignore[return-value]
