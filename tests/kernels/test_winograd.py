"""Our 3×3 convolution and its gradients against fp64, beside torch's in bf16, through every shape a network may have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hcsdl.config import ModelConfig
from hcsdl.kernels import Kernels, convolution, winograd
from hcsdl.kernels.convolution import Conv2d, replace_convolutions
from hcsdl.kernels.inference import for_inference
from hcsdl.models import build_model

pytestmark = pytest.mark.skipif(not convolution.usable(), reason="the processor has no AVX512_BF16, or has AMX")
LAST = torch.channels_last
GEOMETRY = (1, 1), (1, 1), (1, 1), False, (0, 0), 1
# images, in and out channels, rows, columns
SHAPES = {
    "odd everything": (3, 48, 80, 17, 7),
    "one row": (2, 32, 64, 1, 12),
    "one column": (1, 64, 32, 9, 1),
    "one pixel": (1, 32, 32, 1, 1),
    "two pixels square": (1, 16, 16, 2, 2),
    "several blocks of tiles a thread": (2, 64, 64, 40, 38),
    "several chunks of tiles": (1, 64, 64, 70, 66),
    "wide": (2, 256, 512, 9, 10),
}


def tensors(images: int, inputs: int, outputs: int, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """Return input, weight, bias and the output's gradient; the input as a ReLU leaves it."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(images, channels, rows, columns, generator=generator) for channels in (inputs, outputs))
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5
    x, gradient = (one.bfloat16().contiguous(memory_format=LAST) for one in (x.relu(), gradient))
    return x, weight.contiguous(memory_format=LAST), torch.randn(outputs, generator=generator), gradient


def far(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "output": winograd.convolution(x, weight, bias),
        "input_gradient": winograd.input_gradient(gradient, weight),
        "weight_gradient": winograd.weight_gradient(x, gradient),
    }


def torchs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    dx, dw, _ = torch.ops.aten.convolution_backward(gradient, x, weight, None, *GEOMETRY, [True, True, False])
    return {"output": torch.ops.aten.convolution(x, weight, bias, *GEOMETRY), "input_gradient": dx, "weight_gradient": dw}


@pytest.mark.parametrize("name", SHAPES)
def test_errors_are_at_most_about_twice_those_of_torchs_bf16(name: str) -> None:
    x, weight, bias, gradient = tensors(*SHAPES[name])
    limit = 2.2 if min(x.shape[2:]) > 2 else 3.0  # at borders more of what is added up cancels
    exact = torchs(x.double(), weight.double(), bias.double(), gradient.double())
    rounded = torchs(x, weight.bfloat16(), bias.bfloat16(), gradient)
    for what, found in ours(x, weight, bias, gradient).items():
        assert found.shape == exact[what].shape and found.is_contiguous(memory_format=LAST)
        print(f"{name}: {what} {far(found, exact[what]):.1e}, torch's {far(rounded[what], exact[what]):.1e}")
        assert far(found, exact[what]) < limit * far(rounded[what], exact[what])


def test_the_same_bits_with_any_threads_and_mini_batch() -> None:
    for name in ("odd everything", "one pixel", "several chunks of tiles"):
        given, before, found = tensors(*SHAPES[name]), torch.get_num_threads(), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ours(*given))
        torch.set_num_threads(before)
        assert all(torch.equal(one[what], found[0][what]) for one in found for what in one)
    x, weight, bias, _ = tensors(*SHAPES["odd everything"])
    together = winograd.convolution(x, weight, bias)
    assert torch.equal(torch.cat([winograd.convolution(one, weight, bias) for one in x.split(1)]), together)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_carried_through_and_no_farther_than_a_pixel_more(value: float) -> None:
    x, weight, bias, gradient = tensors(2, 32, 32, 12, 10)
    x[1, 5, 4, 4] = gradient[1, 7, 4, 4] = value
    exact = torchs(x.double(), weight.double(), bias.double(), gradient.double())
    for what, found in ours(x, weight, bias, gradient).items():
        assert not found.isfinite()[~exact[what].isfinite()].any()
    found = winograd.convolution(x, weight, bias)
    assert found[0].isfinite().all() and found[1, :, 7:].isfinite().all() and found[1, :, :2].isfinite().all()
    assert found[1, :, :, 7:].isfinite().all() and found[1, :, :, :2].isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_module_gives_what_torchs_does(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 48, 3, padding=1, bias=bias)  # contiguous weights, as a file has them
    own = nn.Sequential(nn.Conv2d(64, 48, 3, padding=1, bias=bias))
    own[0].load_state_dict(plain.state_dict())
    replace_convolutions(own)
    assert type(own[0]) is Conv2d
    x, _, _, gradient = tensors(2, 64, 48, 10, 12)
    grads = []
    for module in (plain, own):
        images = x.float().contiguous().requires_grad_()  # neither the type nor the layout the operator takes
        with torch.autocast("cpu", torch.bfloat16):
            out = module(images)
        out.backward(gradient.contiguous())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(images), out)
        grads.append((out, images.grad, *(parameter.grad for parameter in module.parameters())))
    for found, expected in zip(grads[1], grads[0], strict=True):
        assert found.dtype == expected.dtype and far(found, expected.double()) < 0.01
    own.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        nothing = own(torch.zeros(0, 64, 5, 5))
    nothing.sum().backward()
    assert nothing.shape == (0, 48, 5, 5) and not own[0].weight.grad.any()
    own[0].weight.requires_grad_(False)
    again = x.clone(memory_format=LAST).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        own(again).backward(gradient)
    assert torch.equal(again.grad.float(), grads[1][1])


def test_only_what_it_is_made_for() -> None:
    assert winograd.knows(nn.Conv2d(64, 32, 3, padding=1))
    others = [nn.Conv2d(64, 40, 3, padding=1), nn.Conv2d(16, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.Conv2d(64, 64, 3),
              nn.Conv2d(64, 64, 3, padding=1, groups=2), nn.Conv2d(64, 64, 3, padding="same"), nn.Conv2d(64, 64, 3, padding=2, dilation=2),
              nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), nn.Conv2d(64, 64, 5, padding=2), nn.Conv2d(64, 64, 1)]  # fmt: skip
    assert not any(winograd.knows(one) for one in others)


def test_inference_runs_it_too_and_has_gradients_of_images() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="resnet18", width=0.5, zero_init_residual=False), 3, 5, (128, 160)).eval()
    images = torch.randn(2, 3, 128, 160, requires_grad=True)
    fused, native, plain = (
        for_inference(model, Kernels(name, kind, "asked for")) for name, kind in (("fused", "bf16"), ("native", "bf16"), ("native", "fp32"))
    )
    chosen = [part for part in fused.modules() if isinstance(part, convolution.InferenceConv2d)]
    assert len(chosen) == 13 and all(part.weight.dtype == torch.float32 for part in chosen)
    embeddings = [network(images)[0] for network in (fused, native, plain)]
    gradients = [torch.autograd.grad(one.sum(), images)[0] for one in embeddings]
    for ours, theirs, exact in (embeddings, gradients):
        print(f"ours {far(ours, exact.double()):.1e}, torch's {far(theirs, exact.double()):.1e}")
        assert far(ours, exact.double()) < 2.2 * far(theirs, exact.double())


def test_tensors_it_cannot_take_are_refused() -> None:
    x, weight, bias, gradient = tensors(1, 32, 32, 4, 4)
    wrong = [(x.float(), weight), (x, weight.double()), (x[:, :16], weight), (x[:, :8], weight[:, :8]), (x, weight[:, :, :1, :1]), (x, weight[:8]),
             (x, weight, bias[:16])]  # fmt: skip
    for given in wrong:
        with pytest.raises(TypeError, match="use torch's convolution"):
            winograd.convolution(*given)
    for given in ((x.float(), gradient), (x, gradient[:, :, :3])):
        with pytest.raises(TypeError, match="must"):
            winograd.weight_gradient(*given)
    assert not winograd.weight_gradient(x[:0], gradient[:0]).any()
    assert torch.equal(winograd.convolution(x, weight, bias[:1].expand(32)), winograd.convolution(x, weight, bias[0].repeat(32)))
    assert torch.equal(winograd.weight_gradient(x.contiguous(), gradient.contiguous()), winograd.weight_gradient(x, gradient))
