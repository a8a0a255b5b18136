"""Our weight gradient against torch's in fp64, through every shape a network may have; the rest of the convolution is torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hcsdl.kernels import convolution
from hcsdl.kernels.convolution import Conv2d, replace_convolutions, weight_gradient

pytestmark = pytest.mark.skipif(not convolution.usable(), reason="the processor has no AVX512_BF16, or has AMX")
LAST = torch.channels_last
# images, in and out channels, rows, columns, kernel, stride, padding
SHAPES = {
    "odd everything": (1, 33, 17, 7, 9, (3, 3), 1, 1),
    "one row": (2, 32, 8, 1, 12, (1, 1), 1, 0),
    "one pixel": (1, 16, 8, 1, 1, (3, 3), 1, 1),
    "pointwise": (2, 64, 40, 12, 10, (1, 1), 1, 0),
    "pointwise with a stride": (3, 48, 24, 9, 11, (1, 1), 2, 0),
    "with a stride": (2, 32, 64, 13, 16, (3, 3), 2, 1),
    "five wide, few channels": (2, 16, 16, 20, 22, (5, 5), 1, 2),
    "no padding, not square": (1, 20, 9, 11, 14, (3, 5), 1, 0),
    "images share a chunk": (5, 64, 64, 4, 5, (3, 3), 1, 1),
    "several chunks": (1, 128, 128, 70, 66, (3, 3), 1, 1),
}


def tensors(images, inputs, outputs, rows, columns, kernel, stride, padding, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = [(side + 2 * padding - width) // stride + 1 for side, width in zip((rows, columns), kernel, strict=True)]
    x, gradient = (torch.randn(images, *shape, generator=generator).bfloat16() for shape in ((inputs, rows, columns), (outputs, *size)))
    return x.contiguous(memory_format=LAST), gradient.contiguous(memory_format=LAST)


def exact(x, gradient, kernel, stride, padding):
    weight = torch.empty(gradient.shape[1], x.shape[1], *kernel, dtype=torch.float64)
    geometry = (stride,) * 2, (padding,) * 2, (1, 1), False, (0, 0), 1
    return torch.ops.aten.convolution_backward(gradient.double(), x.double(), weight, None, *geometry, [False, True, False])[1]


@pytest.mark.parametrize("name", SHAPES)
def test_sums_are_torchs_and_the_same_bits_with_any_threads(name: str) -> None:
    *_, kernel, stride, padding = shape = SHAPES[name]
    x, gradient = tensors(*shape)
    expected, before, found = exact(x, gradient, kernel, stride, padding), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(weight_gradient(x, gradient, kernel, stride, padding))
    torch.set_num_threads(before)
    largest = float((found[0] - expected).abs().max() / expected.abs().max())
    print(f"{name}: largest difference {largest:.1e} of the largest value")
    assert largest < 3e-6 and all(torch.equal(one, found[0]) for one in found)


def test_what_is_no_number_is_carried_through() -> None:
    x, gradient = tensors(*SHAPES["with a stride"])
    for value in (float("nan"), float("inf")):
        spoilt = gradient.clone(memory_format=LAST)
        spoilt[1, 5, 3, 4] = value
        found = weight_gradient(x, spoilt, (3, 3), 2, 1)
        assert not found[5].isfinite().any() and found[[c for c in range(64) if c != 5]].isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_the_rest_is_torchs_bit_for_bit(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 64, 3, padding=1, stride=2, bias=bias).to(memory_format=LAST)
    ours = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, stride=2, bias=bias)).to(memory_format=LAST)
    ours[0].load_state_dict(plain.state_dict())
    replace_convolutions(ours)
    assert type(ours[0]) is Conv2d
    x, gradient = tensors(2, 64, 64, 10, 12, (3, 3), 2, 1)
    grads = []
    for module in (plain, ours):
        images = x.clone(memory_format=LAST).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(images)
        out.backward(gradient)
        grads.append((out, images.grad, *(parameter.grad for parameter in module.parameters())))
    (out, dx, dw, *_), (our_out, our_dx, our_dw, *our_db) = grads
    assert torch.equal(out, our_out) and torch.equal(dx, our_dx)
    assert our_dw.stride() == ours[0].weight.stride() and our_dw.dtype == torch.float32
    torch.testing.assert_close(our_dw, dw, rtol=0.01, atol=0.02 * float(dw.std()))
    assert not bias or torch.allclose(our_db[0], gradient.double().sum((0, 2, 3)).float(), rtol=1e-3, atol=1e-2)


def test_what_the_operator_does_not_know_stays_torchs() -> None:
    few, grouped, spread = nn.Conv2d(3, 64, 7), nn.Conv2d(64, 64, 3, groups=2), nn.Conv2d(64, 64, 3, dilation=2)
    reflected, pointwise = nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), nn.Conv2d(64, 64, 1)
    replace_convolutions([few, grouped, spread, reflected, pointwise])
    assert not any(isinstance(one, Conv2d) for one in (few, grouped, spread, reflected, pointwise))
    ours = nn.Conv2d(64, 64, 3, padding=1)
    replace_convolutions([ours])
    empty = torch.zeros(0, 64, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours(empty).sum().backward()
    assert torch.equal(ours.weight.grad, torch.zeros_like(ours.weight))
    ours.double()(torch.randn(1, 64, 8, 8, dtype=torch.float64)).sum().backward()
