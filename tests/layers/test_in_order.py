"""Products summed in order: the order, the precision, and that nothing of the reference escapes."""

import pytest
import torch
from support.layers import make_checkpoint
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bca_deploy.layers import in_order
from bca_deploy.layers.in_order import InOrder

LAYERS: list[dict[str, object]] = [
    {"prenorm": True},
    {"talking_heads": True},
    {"prenorm": True, "norm": "rms", "depth": 2, "ff_hidden": 40, "context_ff_hidden": 30},
]


class Products(TorchDispatchMode):
    """Counts what PyTorch's libraries would sum."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "convolution", "matmul", "linear"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_terms_are_added_one_after_another() -> None:
    # 1e8 + 1 is 1e8 in float32: only the order decides whether the 1 is left in the end.
    lost, kept = torch.tensor([[1e8, 1.0, -1e8]]), torch.tensor([[1e8, -1e8, 1.0]])
    with InOrder():
        assert functional.linear(lost, torch.ones(1, 3)).item() == 0.0
        assert functional.linear(kept, torch.ones(1, 3)).item() == 1.0
        assert torch.einsum("b i j, b j d -> b i d", lost[None], torch.ones(1, 3, 2)).tolist() == [[[0.0, 0.0]]]
        assert torch.conv2d(lost.reshape(1, 3, 1, 1), torch.ones(2, 3, 1, 1)).flatten().tolist() == [0.0, 0.0]


def test_each_order_is_one_of_its_own_and_always_the_same() -> None:
    terms = torch.randn(1, 200, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-3, 3, 200)
    sums = []
    for order in (0, 1, 2, 1):
        with InOrder(order):
            sums.append(functional.linear(terms, torch.ones(1, 200)).item())
    assert len(set(sums)) == 3
    assert sums[1] == sums[3]
    assert sums == pytest.approx([terms.double().sum().item()] * 4, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    ones = torch.ones(1, 4096, dtype=dtype)  # summed in float16 they would stop at 2048, in bfloat16 at 256
    with InOrder():
        total = functional.linear(ones, ones)
    assert total.dtype == dtype
    assert total.item() == 4096.0


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    # Whole numbers: every order gives the same sum, so that only a term lost or taken twice can show.
    a, b = (torch.randint(-8, 9, shape, generator=generator).float() for shape in ((3, 2, 33, 20), (3, 2, 17, 20)))
    wanted = torch.einsum("b h i d, b h j d -> b h i j", a, b)
    monkeypatch.setattr(in_order, "_BLOCK", 64)
    with InOrder():
        torch.testing.assert_close(torch.einsum("b h i d, b h j d -> b h i j", a, b), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("layer", LAYERS, ids=["bare", "talking heads", "transformer"])
def test_the_reference_stays_the_same_function_and_no_product_escapes(layer: dict[str, object]) -> None:
    module = make_checkpoint(**layer).module(torch.float64)
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(2, n, width, generator=generator, dtype=torch.float64) for n, width in ((7, 24), (5, 16)))
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    rounded = make_checkpoint(**layer).module(torch.float32)
    with torch.no_grad():
        truth = module(x, context, mask=mask)
        with Products() as products, InOrder():
            found = rounded(x.float(), context.float(), mask=mask)
    assert products.seen == []
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)
