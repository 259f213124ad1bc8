"""A whole model and every layer in it held against PyTorch: what a model's own outputs hide is found in its layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.layers import SMALL
from support.models import masked_mean, seeded
from torch import Tensor, nn

import bca_deploy
from bca_deploy.bundle import selftest
from bca_deploy.errors import InputError, ParityError
from bca_deploy.exporter.model_source import ModelSource, read_model
from bca_deploy.exporter.recipe import Recipe, read_recipe
from bca_deploy.layers import lowered_attention
from bca_deploy.layers.reference import BidirectionalCrossAttention
from bca_deploy.parity.verdict import Verdict
from bca_deploy.progress import Clock, Silent
from bca_deploy.whole_parity import judge
from bca_deploy.whole_parity.cases import cases_of, inputs_of
from bca_deploy.whole_parity.evaluate import Evaluator
from bca_deploy.whole_parity.yardstick import Yardstick, refuse_random

DIM, CONTEXT_DIM = SMALL["dim"], SMALL["context_dim"]


class Pooled(nn.Module):
    """Pools what is live alone, so that no dead row reaches its output."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = BidirectionalCrossAttention(**SMALL)
        self.head = nn.Linear(DIM + CONTEXT_DIM, 12)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor, context_mask: Tensor) -> Tensor:
        out, context_out = self.attend(x, context, mask, context_mask)
        live, context_live = mask & context_mask.any(1, keepdim=True), context_mask & mask.any(1, keepdim=True)
        return self.head(torch.cat([masked_mean(out, live), masked_mean(context_out, context_live)], -1))


def pair() -> list[dict[str, Tensor]]:
    def one(batch: int, n: int, m: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(n)
        x, context = (torch.randn(batch, *size, generator=generator) for size in ((n, DIM), (m, CONTEXT_DIM)))
        masks = {"mask": torch.ones(batch, n, dtype=torch.bool), "context_mask": torch.ones(batch, m, dtype=torch.bool)}
        return {"x": x, "context": context, **masks}

    return [one(3, 5, 7), one(2, 4, 6)]


RANGES = {"batch": (1, 2, 4), "x_len": (1, 6, 9), "context_len": (1, 6, 9)}


def recipe(**options: Any) -> Recipe:
    return read_recipe(None, {"dims": RANGES, "model": {"allow_none": True}, **options})


def made(source: ModelSource, directory: Path) -> Verdict:
    return source.make("fp32", "portable", directory / "fp32.onnx", recipe(), Clock(Silent())).verdict


@pytest.fixture
def zeros_at_dead_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowered_attention, "_mean", lambda v: v[:1] * 0)


def judged_by_its_outputs_alone(source: ModelSource, path: Path) -> Verdict:
    subject = judge.Subject(path, path, "fp32", keep_io_types=True)
    cases = cases_of(source.subject.draws, source.signature, source.samples, "quick")
    arrays = {case: inputs_of(case, source.subject.draws, source.samples, "fp32") for case in cases}
    return judge.judge(subject, Yardstick(source.subject.model, (), "fp32"), arrays, "quick", lambda done, total: None)


def test_zeros_at_dead_rows_are_found_where_the_model_hides_them(zeros_at_dead_rows: None, tmp_path: Path) -> None:
    source = read_model(seeded(Pooled), pair(), recipe(), Silent())
    verdict = made(source, tmp_path)
    assert not verdict
    assert all("attend" in failure for failure in verdict.failures)
    assert any("dead rows: RMS error" in failure for failure in verdict.failures)
    assert judged_by_its_outputs_alone(source, tmp_path / "fp32.onnx")


@pytest.mark.slow
def test_an_export_with_zeros_at_dead_rows_names_the_layer_and_leaves_nothing(zeros_at_dead_rows: None, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"attend(/0/\w+, dead rows: largest error| plain under onnxruntime, dead rows)"):
        bca_deploy.export(seeded(Pooled), tmp_path / "out", inputs=pair(), dims=RANGES)
    assert not (tmp_path / "out").exists()


def test_a_right_model_passes_with_its_layer_s_calls_judged_beside_its_outputs(tmp_path: Path) -> None:
    source = read_model(seeded(Pooled), pair(), recipe(), Silent())
    verdict = made(source, tmp_path)
    assert verdict, verdict.failures
    assert {group.family for group in verdict.groups} == {"output", "attend"}
    (layer,) = (group for group in verdict.groups if group.family == "attend")
    assert layer.dead_ratio is not None
    assert not any("NaN" in note for note in verdict.notes)


# ---- what draws random numbers, or keeps state


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"same": x * 2, "noisy": nn.functional.dropout(x, 0.5, training=True)}


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


class NoisyInVain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) * 0


XS = [{"x": torch.ones(3, 5, 4)}, {"x": torch.zeros(2, 6, 4)}]


@pytest.mark.parametrize(("model", "output"), [(Noisy, "noisy"), (Counting, "output")])
def test_a_model_that_gives_something_else_the_second_time_is_refused(model: type[nn.Module], output: str) -> None:
    with pytest.raises(InputError, match=f"output {output} is not the same when the model runs twice on one input: it draws"):
        read_model(model(), XS, read_recipe(None, {"model": {"allow_none": True}}), Silent())


def test_nan_that_comes_again_is_no_randomness() -> None:
    class Undefined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 2).log()

    refuse_random(Evaluator(Undefined(), (), torch.float32), {"x": np.ones((2, 3), np.float32)})


def test_a_graph_that_draws_random_numbers_in_vain_is_refused() -> None:
    with pytest.raises(InputError, match=r"the graph draws random numbers \(Random\w+\)"):
        read_model(NoisyInVain(), XS, read_recipe(None, {"model": {"allow_none": True}}), Silent())


def test_an_output_of_which_pytorch_gives_nothing_but_nan_is_not_judged_as_right(tmp_path: Path) -> None:
    class Undefined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (-1 - x.square()).log()

    source = read_model(Undefined(), XS, read_recipe(None, {"model": {"allow_none": True}}), Silent())
    verdict = source.make("fp32", "portable", tmp_path / "fp32.onnx", recipe(), Clock(Silent())).verdict
    assert not verdict
    assert "output: PyTorch itself gives NaN everywhere, so that nothing is judged" in verdict.failures


# ---- infinite outputs, and outputs that are inputs


class Masked(nn.Module):
    """Logits of classes that a mask leaves out, as behind the text of a detector."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * 3).masked_fill(~mask[..., None], self.fill)


MASKED = [{"x": torch.randn(b, n, 4), "mask": torch.ones(b, n, dtype=torch.bool)} for b, n in ((3, 5), (2, 6))]


def of_masked(fill: float, directory: Path) -> tuple[ModelSource, Verdict]:
    source = read_model(Masked(fill), MASKED, read_recipe(None, {"model": {"allow_none": True}}), Silent())
    return source, made(source, directory)


def test_what_is_infinite_in_pytorch_must_be_the_same_infinity(tmp_path: Path) -> None:
    source, verdict = of_masked(-np.inf, tmp_path)
    assert verdict, verdict.failures
    assert not any("NaN" in note for note in verdict.notes)
    for fill in (-1e30, np.inf):
        of_masked(fill, tmp_path)
        verdict = judged_by_its_outputs_alone(source, tmp_path / "fp32.onnx")
        assert not verdict
        assert any("values are not the infinity that PyTorch's are" in failure for failure in verdict.failures)


def test_a_bundle_keeps_infinite_truths_and_holds_outputs_to_them(tmp_path: Path) -> None:
    source, _ = of_masked(-np.inf, tmp_path)
    arrays = source.selftest(["fp32"])
    assert any(np.isneginf(array).any() for name, array in arrays.items() if "/output/" in name)
    model = Masked(-np.inf)

    def run(inputs: dict[str, Any], fill: float) -> dict[str, Any]:
        model.fill = fill
        return {"output": model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()}

    assert selftest.failures(arrays, "fp32", lambda inputs: run(inputs, -np.inf)) == []
    for fill in (-1e30, np.inf, np.nan):
        assert selftest.failures(arrays, "fp32", lambda inputs, fill=fill: run(inputs, fill))


class Echo(nn.Module):
    def forward(self, x: Tensor, words: Tensor) -> dict[str, Tensor]:
        return {"x": x, "words": words, "twice": x * words[..., None]}


def test_an_output_with_the_name_of_an_input_is_judged_under_another(tmp_path: Path) -> None:
    samples = [sample | {"words": torch.arange(sample["x"][..., 0].numel()).reshape(sample["x"].shape[:2])} for sample in XS]
    source = read_model(Echo(), samples, read_recipe(None, {"model": {"allow_none": True}}), Silent())
    assert [tensor.name for tensor in source.signature.outputs] == ["x_out", "words_out", "twice"]
    assert {group.family for group in made(source, tmp_path).groups} == {"x_out", "words_out", "twice"}


# ---- the truth of models that cast


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float()": lambda x: x.float() / 3,
    "half()": lambda x: x.half() / 3,
    "bfloat16()": lambda x: x.bfloat16() / 3,
    "to a dtype": lambda x: x.to(torch.float32) / 3,
    "to a dtype by name": lambda x: x.to(dtype=torch.float16) / 3,
    "type": lambda x: x.type(torch.float32) / 3,
    "softmax in float32": lambda x: nn.functional.softmax(x, -1, dtype=torch.float32),
    "sum in float32": lambda x: x.sum(-1, dtype=torch.float32) / 3,
    "zeros": lambda x: torch.zeros(4) + x / 3,
    "a product with ones": lambda x: x @ torch.ones(4, 4) / 3,
    "a product with an identity": lambda x: x @ torch.eye(4, dtype=torch.float32) / 3,
    "full": lambda x: (x / 3).where(x > 0, torch.full((), -1.0)),
    "new_zeros": lambda x: x.new_zeros(4, dtype=torch.float32) + x / 3,
    "zeros_like": lambda x: torch.zeros_like(x, dtype=torch.float32) + x / 3,
    "arange": lambda x: x @ torch.diag(torch.arange(4, dtype=torch.float32)) / 3,
    "einsum with ones": lambda x: torch.einsum("bnd,de->bne", x, torch.ones(4, 4)) / 3,
}


@pytest.mark.parametrize("name", CASTS)
def test_a_model_that_casts_has_a_truth_in_float64(name: str) -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return CASTS[name](x)

    given = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    exact = Evaluator(Casts(), (), torch.float64).run({"x": given}).outputs["output"]
    default = torch.get_default_dtype()
    wide = {"half()": lambda x: x / 3, "bfloat16()": lambda x: x / 3, "to a dtype by name": lambda x: x / 3}
    with torch.no_grad():
        x = torch.from_numpy(given).double()
        rounded = CASTS[name](torch.from_numpy(given)) if name not in wide else None
    assert torch.get_default_dtype() == default
    assert exact.dtype == np.float64
    assert not np.array_equal(exact, exact.astype(np.float32))  # it was never float32
    if rounded is not None:
        np.testing.assert_allclose(exact, rounded.numpy(), rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(exact, wide[name](x).numpy())


def test_integers_and_truths_are_left_as_they_are() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (
                (x > 0).float().sum(-1) / 3,
                x.long(),
                x.argmax(-1),
                x > 0,
                torch.arange(3),
                torch.zeros(2, dtype=torch.int32),
            )

    outputs = Evaluator(Counts(), (), torch.float64).run({"x": np.full((2, 4), 1.5, np.float32)}).outputs
    assert [a.dtype.name for a in outputs.values()] == ["float64", "int64", "int64", "bool", "int64", "int32"]
    assert outputs["output_0"][0] == 4 / 3


def test_what_pytorch_refuses_is_said_with_the_sizes() -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(3.0)

    with pytest.raises(
        InputError, match=r"the model itself refuses x \[2, 5\] in float64: RuntimeError: .*; declare dims that"
    ):
        Evaluator(Narrow(), (), torch.float64).run({"x": np.ones((2, 5), np.float32)})


def test_a_model_that_works_in_place_leaves_the_inputs_as_they_are() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    given = {"x": np.ones((2, 3), np.float32)}
    evaluator = Evaluator(InPlace(), (), torch.float32)
    assert (evaluator.run(given).outputs["output"] == evaluator.run(given).outputs["output"]).all()
    assert (given["x"] == 1).all()


# ---- PyTorch's own encoder


class Encoded(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(DIM, heads, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
        self.attend = BidirectionalCrossAttention(**SMALL)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor, context_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.attend(self.encoder(x, src_key_padding_mask=~mask), context, mask, context_mask)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "told"), [(2, True), (3, False)])  # PyTorch's fast path takes even numbers alone
def test_an_encoder_s_item_that_is_all_padding_is_told_and_does_not_fail(heads: int, told: bool, tmp_path: Path) -> None:
    source = read_model(seeded(lambda: Encoded(heads)), pair(), recipe(), Silent())
    verdict = made(source, tmp_path)
    assert verdict, verdict.failures[:3]
    assert told == any("PyTorch itself gives NaN in some cases, and nothing" in note for note in verdict.notes)
