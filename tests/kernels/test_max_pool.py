"""Max-pool: torch's values, ties and gradients, with one byte for each maximum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcsdl.kernels import max_pool as module
from hcsdl.kernels.max_pool import MaxPool2d, max_pool, pooled, replace_max_pools
from hcsdl.kernels.native.build import InstructionSet
from tests.kernels import instructions

DTYPES = [torch.float32, torch.bfloat16]
CASES = [((2, 16, 12, 14), 3, 2, 1), ((1, 3, 13, 9), 2, 2, 0), ((2, 37, 1, 8), 1, 1, 0), ((1, 5, 17, 33), 5, 3, 2), ((1, 20, 64, 70), 32, 32, 0),
         ((2, 4, 1, 11), 3, 2, 1), ((1, 64, 9, 9), 3, 3, 0), ((2, 3, 130, 65), 64, 64, 0), ((1, 18, 10, 10), 4, 1, 1),
         ((2, 64, 12, 14), 3, 2, 1), ((2, 32, 13, 9), 3, 2, 1), ((1, 96, 2, 7), 3, 2, 1), ((2, 32, 7, 1), 3, 2, 1), ((1, 32, 1, 1), 3, 2, 1)]  # fmt: skip


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of few digits, so that there are ties."""
    made = torch.randint(-20, 20, shape, generator=torch.Generator().manual_seed(seed)) / 8
    return made.to(dtype).contiguous(memory_format=torch.channels_last)


def passes(function, x: Tensor, *settings: int) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = function(x, *settings)
    out.backward(drawn(out.shape, out.dtype, 1))
    return out.detach(), x.grad


@pytest.mark.parametrize("each", instructions.EACH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_torchs(each: InstructionSet, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    instructions.use(each, module, monkeypatch)
    for shape, *settings in CASES:
        x = drawn(shape, dtype)
        out, gradient = passes(max_pool, x, *settings)
        expected, wanted = passes(F.max_pool2d, x.double(), *settings)
        assert out.dtype == gradient.dtype == dtype
        assert torch.equal(out.double(), expected), (shape, settings)
        assert torch.equal(gradient.double(), wanted.to(dtype).double()), (shape, settings)
        with torch.no_grad():
            assert torch.equal(max_pool(x, *settings), out), "without places the same"


def test_gradcheck_by_finite_differences_of_the_twin() -> None:
    """The operator knows no fp64: the twin passes gradcheck, and gradients of the operator equal its to the bit, in `test_values_and_gradients_are_torchs`."""
    x = torch.randperm(2 * 3 * 6 * 6, generator=torch.Generator().manual_seed(0)).view(2, 3, 6, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.max_pool2d(x, 3, 2, 1), (x,))
    out = max_pool(x.detach().float().requires_grad_(), 3, 2, 1)
    assert torch.equal(out.double(), F.max_pool2d(x, 3, 2, 1))


def test_places_are_rows_and_columns_of_the_window() -> None:
    x = drawn((2, 19, 40, 24), torch.float32)
    for size in (8, 20):
        out, places = pooled(x, size, size)
        assert places.dtype == (torch.uint8 if size == 8 else torch.uint16)
        flat = F.max_pool2d(x, size, return_indices=True)[1]
        row, column = flat // 24, flat % 24
        assert torch.equal(places.long(), row % size * size + column % size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_carried_through(dtype: torch.dtype, value: float) -> None:
    for channels in (3, 21):
        x = drawn((1, channels, 12, 12), dtype)
        x[0, 1, 3:7, 2:9] = value
        out, gradient = passes(max_pool, x, 2, 2, 0)
        expected, wanted = passes(F.max_pool2d, x, 2, 2, 0)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=0, equal_nan=True)
        with torch.no_grad():
            torch.testing.assert_close(max_pool(x, 2), expected, rtol=0, atol=0, equal_nan=True)
    assert value != float("-inf") or torch.isneginf(out).any()


def test_other_memory_formats_empty_mini_batches_and_other_types() -> None:
    x = drawn((2, 5, 8, 12), torch.float32)
    expected = passes(max_pool, x, 3, 2, 1)
    for strange in (x.contiguous(), x.repeat_interleave(2, 3)[..., ::2]):
        assert all(torch.equal(a, b) for a, b in zip(passes(max_pool, strange, 3, 2, 1), expected, strict=True))
    assert max_pool(torch.zeros(0, 3, 8, 8), 2).shape == (0, 3, 4, 4)
    assert max_pool(x.double(), 2).dtype == torch.float64
    with pytest.raises(RuntimeError, match="too small"):
        max_pool(torch.zeros(1, 3, 1, 1), 2)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    x = torch.randn(2, 24, 31, 33, generator=torch.Generator().manual_seed(3)).bfloat16()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(passes(max_pool, x, 3, 2, 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_only_what_is_the_same_is_replaced() -> None:
    model = nn.Sequential(
        nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 3)), nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()
    )
    assert replace_max_pools(model) == 1
    assert [type(module) is MaxPool2d for module in model] == [True, False, False, False, False]
    assert (model[0].kernel_size, model[0].stride, model[0].padding) == (3, 2, 1)
