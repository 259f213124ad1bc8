"""What a model is given and what comes out, by name."""

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bca_deploy.errors import InputError
from bca_deploy.whole.samples import named_outputs, named_sample, rooted


class Takes(nn.Module):
    def forward(self, video: Tensor, audio: Tensor, mask: Tensor | None = None, *, speed: Tensor | None = None) -> Tensor:
        return video


class OpenEnded(nn.Module):
    def forward(self, video: Tensor, **more: Tensor) -> Tensor:
        return video + sum(more.values())


class ByPosition(nn.Module):
    def forward(self, video: Tensor, /, mask: Tensor | None = None) -> Tensor:
        return video


VIDEO, AUDIO = torch.ones(2, 3), torch.zeros(2, 4)


# ---- what is given


@pytest.mark.parametrize("given", [(VIDEO, AUDIO), [VIDEO, AUDIO], {"audio": AUDIO, "video": VIDEO}])
def test_a_sample_is_named_in_forward_s_order(given: Any) -> None:
    found = named_sample(Takes(), given)
    assert list(found) == ["video", "audio"]
    assert torch.equal(found["audio"], AUDIO)


def test_none_is_left_out() -> None:
    speed = torch.ones(1)
    assert list(named_sample(Takes(), (VIDEO, AUDIO, None))) == ["video", "audio"]
    assert list(named_sample(Takes(), (VIDEO, AUDIO, None, speed))) == ["video", "audio", "speed"]
    assert list(named_sample(Takes(), {"video": VIDEO, "speed": speed, "mask": None, "audio": AUDIO})) == [
        "video",
        "audio",
        "speed",
    ]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.ones((2, 3)), torch.float32),
        (np.ones((2, 3), dtype=np.float16)[:, ::-1], torch.float32),
        (np.ones((2, 3), dtype=np.int32), torch.int32),
        (np.ones((2, 3), dtype=bool), torch.bool),
        (np.float64(0.5), torch.float32),
        (torch.ones(2, 3, dtype=torch.bfloat16), torch.float32),
        (torch.ones(2, 3, dtype=torch.float64), torch.float32),
        (torch.ones(2, 3, dtype=torch.int64), torch.int64),
    ],
)
def test_arrays_become_tensors_and_floats_float32(value: Any, dtype: torch.dtype) -> None:
    found = named_sample(Takes(), (value, AUDIO))["video"]
    assert (found.dtype, found.shape) == (dtype, torch.Size(np.shape(value)))


def test_a_sample_is_a_copy_without_a_gradient() -> None:
    array, tensor = np.ones((2, 3), dtype=np.float32), torch.ones(2, 4, requires_grad=True)
    found = named_sample(Takes(), (array, tensor))
    found["video"].zero_()
    found["audio"].zero_()
    assert array.all()
    assert tensor.all()


def test_what_forward_takes_by_kwargs_comes_last() -> None:
    found = named_sample(OpenEnded(), {"late": AUDIO, "video": VIDEO, "later": AUDIO})
    assert list(found) == ["video", "late", "later"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vidoe": VIDEO, "audio": AUDIO}, r"a sample has 'vidoe', which forward does not take \(did you mean 'video'\?\); it"),
        ({"video": VIDEO}, "a sample lacks audio, which forward needs; it has video"),
        ({}, "a sample lacks video, which forward needs; it has nothing"),
        ({"video": VIDEO, "audio": None}, "a sample lacks audio"),
        ((VIDEO,), "a sample lacks audio"),
        ((VIDEO,) * 5, "a sample has 5 inputs, and forward takes 4: video, audio, mask, speed"),
        (VIDEO, "a sample is a Tensor; give a dict by forward's argument names, or a tuple in order"),
        ("video", "a sample is a str; give a dict"),
        ((VIDEO, AUDIO.to(torch.complex64)), "the sample's audio is complex; give its real and imaginary parts"),
        ((VIDEO, np.ones(3, dtype=complex)), "the sample's audio is complex"),
        ((VIDEO, 0.5), "the sample's audio is a float; inputs are tensors: fix other arguments with a wrapper"),
        ((VIDEO, True), "the sample's audio is a bool"),
        ((VIDEO, [AUDIO]), "the sample's audio is a list"),
        ((VIDEO, "loud"), "the sample's audio is a str"),
        (
            (VIDEO, AUDIO.to_sparse()),
            r"the sample's audio is torch.float32, torch.sparse_coo; allowed: dense tensors of float32",
        ),
        ((VIDEO, AUDIO.to(torch.uint8)), "the sample's audio is torch.uint8, torch.strided; allowed"),
        ((VIDEO, AUDIO / 0), "the sample's audio holds NaN or infinity in float32; give one of finite numbers"),
        ((VIDEO, np.array([-np.inf])), "the sample's audio holds NaN or infinity"),
        ((VIDEO, np.array([1e300])), "the sample's audio holds NaN or infinity"),
        ((VIDEO, np.array(["loud"])), r"the sample's audio is an array of <U4; allowed"),
        ((VIDEO, np.array([None])), r"the sample's audio is an array of object; allowed"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        named_sample(Takes(), given)


def test_an_argument_by_position_alone_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"forward takes video by position alone; let it have a name \(no '/' in"):
        named_sample(ByPosition(), (VIDEO,))


# ---- what comes out


class Pair(NamedTuple):
    score: Tensor
    parts: Any


@dataclasses.dataclass
class Result:
    logits: Tensor
    loss: Tensor | None = None
    inner: Any = None


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As transformers' outputs are: a dataclass that is a mapping, too."""


class Lookup(Mapping):  # type: ignore[type-arg]
    def __init__(self, **values: Any) -> None:
        self._values = values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (VIDEO, ["output"]),
        ((VIDEO,), ["output_0"]),
        ([VIDEO, None, AUDIO], ["output_0", "output_2"]),
        ({"b": VIDEO, "a": AUDIO}, ["b", "a"]),
        ({"loss": None, "score": VIDEO, "count": 3, "tag": "x"}, ["score"]),
        ({"a b": VIDEO, 0: AUDIO, "x.y": VIDEO}, ["a_b", "output_0", "x_y"]),
        (Pair(VIDEO, (AUDIO, VIDEO)), ["score", "parts_0", "parts_1"]),
        (Result(VIDEO), ["logits"]),
        (Result(VIDEO, AUDIO, {"a": [VIDEO]}), ["logits", "loss", "inner_a_0"]),
        (
            ModelOutput(last_hidden_state=VIDEO, hidden_states=(AUDIO, VIDEO)),
            ["last_hidden_state", "hidden_states_0", "hidden_states_1"],
        ),
        (Lookup(score=VIDEO, text=Pair(AUDIO, None)), ["score", "text_score"]),
        ((torch.tensor(1.0), torch.tensor(True)), ["output_0", "output_1"]),
        (None, []),
        ((), []),
        (3.0, []),
    ],
)
def test_outputs_have_names(result: Any, names: list[str]) -> None:
    found = named_outputs(result)
    assert list(found) == names
    assert all(name.isidentifier() for name in found)


@pytest.mark.parametrize("result", [{"a": {"b": VIDEO}, "a_b": AUDIO}, {"x y": VIDEO, "x_y": AUDIO}])
def test_two_outputs_of_one_name_are_refused_and_none_is_lost(result: Any) -> None:
    with pytest.raises(InputError, match=r"two outputs are called (a_b|x_y); give"):
        named_outputs(result)


def test_an_output_never_has_the_name_of_an_input_or_of_another_output() -> None:
    assert list(named_outputs({"x": VIDEO, "x_out": AUDIO}, {"x"})) == ["x_out_out", "x_out"]
    assert list(named_outputs({"x": VIDEO}, {"y"})) == ["x"]


# ---- the model under a forward of its inputs' names


def test_a_root_takes_the_named_inputs_and_gives_what_was_tapped_after_its_own() -> None:
    taps: dict[str, Tensor] = {}

    class Tapped(nn.Module):
        def forward(self, video: Tensor, mask: Tensor, **more: Tensor) -> dict[str, Any]:
            assert video.dtype == torch.float64
            assert mask.dtype == torch.bool
            taps["inside"] = video * 2
            return {"sum": video.sum() + sum(t.sum() for t in more.values()), "none": None, "mask": mask}

    root = rooted(Tapped(), ["video", "mask", "late"], taps, torch.float64, torch.float32)
    assert list(inspect.signature(root.forward).parameters) == ["video", "mask", "late"]
    taps["from the run before"] = VIDEO
    for _ in range(2):
        total, mask, inside = root(video=VIDEO, mask=VIDEO > 0, late=AUDIO)
    assert (total.dtype, total.item(), mask.dtype, inside.dtype) == (torch.float32, 6.0, torch.bool, torch.float32)
    assert list(taps) == ["inside"]
