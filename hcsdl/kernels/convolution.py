"""Convolutions that run our own operators in bf16, where the processor has AVX512_BF16 and no AMX.

In: an `nn.Conv2d` under bf16 autocast. Out: its output. Promised: the same numbers up to rounding and the same bits with any number of threads.

3×3 convolutions with stride 1 run by `winograd` in all three products: 1.3 to 2 times oneDNN's speed here, with about twice its rounding error. Of others
output and input gradient are torch's, bit for bit, and only the weight's gradient is ours, float from end to end (torch rounds it to bf16 on the way): oneDNN
reaches 0.8 to 0.95 of the matrix product's rate in forward passes and input gradients here, and 0.6 to 0.85 in weight gradients (BENCHMARKS.md). With AMX,
oneDNN's own are expected to be far ahead of these operators; that is unmeasured.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from hcsdl.kernels import winograd
from hcsdl.kernels.native.build import library
from hcsdl.machine.cores import bf16_flags

SOURCE = Path(__file__).parent / "native" / "weight_gradient.c"
FEWEST_CHANNELS = 16
"""Below so many input channels most of a vector would be padding, and torch's operator is faster (measured here)."""
FEWEST_PRODUCTS = 200
"""For each value that is copied. With fewer, memory decides: between 0.5 and 1.3 of torch's speed, as busy as the memory is (measured here)."""
_CHANNELS_LAST = torch.channels_last
_CPU_BF16 = "avx512_bf16"


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with our operators in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of `x` (N, C, H, W)."""
        if not (torch.is_autocast_enabled("cpu") and _is_native(x, self)):
            return super().forward(x)
        if winograd.knows(self):
            return _WinogradConvolution.apply(x, self.weight, self.bias)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        return _Convolution.apply(x, self.weight, self.bias, self.stride[0], self.padding[0])


def replace_convolutions(modules: Iterable[nn.Module]) -> None:
    """Turn those of torch's convolutions among `modules` that our operator knows into `Conv2d`, if it is faster on this processor."""
    if not usable():
        return
    for module in modules:
        if type(module) is nn.Conv2d and (winograd.knows(module) or _is_known(module)):
            module.__class__ = Conv2d  # only `forward` differs


class InferenceConv2d(nn.Conv2d):
    """A 3×3 `torch.nn.Conv2d` of bf16 activations and float32 weights by `winograd`, outside autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of `x` (N, C, H, W), bf16."""
        return _WinogradConvolution.apply(x, self.weight, self.bias)


def replace_for_inference(model: nn.Module) -> list[nn.Module]:
    """Turn those of torch's convolutions in `model` that `winograd` knows into `InferenceConv2d`, if it is faster on this processor; return them."""
    if not usable():
        return []
    found = [module for module in model.modules() if type(module) is nn.Conv2d and winograd.knows(module)]
    for module in found:
        module.__class__ = InferenceConv2d
    return found


def usable() -> bool:
    """Return whether the processor has what the operator needs and nothing better; may raise `NoLibrary`."""
    flags = bf16_flags()
    return _CPU_BF16 in flags and len(flags) == 1 and bool(operators().supported())


def _is_known(module: nn.Conv2d) -> bool:
    stride, padding, kernel = module.stride, module.padding, module.kernel_size
    square = not isinstance(padding, str) and stride[0] == stride[1] and padding[0] == padding[1]
    plain = module.groups == 1 and tuple(module.dilation) == (1, 1) and module.padding_mode == "zeros"
    products = kernel[0] * kernel[1] * module.in_channels * module.out_channels / (module.in_channels + module.out_channels)
    enough = module.in_channels >= FEWEST_CHANNELS and products >= FEWEST_PRODUCTS
    return square and plain and enough and (kernel != (1, 1) or padding[0] == 0)


def _is_native(x: Tensor, module: nn.Conv2d) -> bool:
    bf16 = torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype in (torch.bfloat16, torch.float32)
    return bf16 and module.weight.dtype == torch.float32 and x.ndim == 4 and x.device.type == "cpu" and x.numel() > 0


def weight_gradient(x: Tensor, gradient: Tensor, kernel_size: tuple[int, int], stride: int, padding: int) -> Tensor:
    """Return the gradient (out channels, in channels, rows, columns), float32, channels_last, of a convolution's weight.

    Parameters
    ----------
    x : the convolution's input (N, C, H, W), bf16, channels_last.
    gradient : of its output, bf16, channels_last.
    kernel_size, stride, padding : pixels; the stride and padding of both directions.
    """
    sizes = *x.shape, *gradient.shape[2:], gradient.shape[1], *kernel_size, stride, padding
    images, channels, height, width, *rest = sizes
    shape = (c_int64 * 11)(images, height, width, channels, *rest)
    scratch = torch.empty(operators().scratch_bytes(shape), dtype=torch.uint8)
    found = torch.empty(gradient.shape[1], *kernel_size, channels)
    tensors = x, gradient, found, scratch
    operators().weight_gradient(shape, *(tensor.data_ptr() for tensor in tensors), torch.get_num_threads())
    return found.permute(0, 3, 1, 2)


@cache
def operators() -> ctypes.CDLL:
    """Return the native operator, compiled where need be. Raises `NoLibrary`."""
    made = library(SOURCE)
    if made.supported():
        made.scratch_bytes.argtypes, made.scratch_bytes.restype = (c_void_p,), c_int64
        made.weight_gradient.argtypes, made.weight_gradient.restype = (*(c_void_p,) * 5, c_int64), None
    return made


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        x, used = x.to(torch.bfloat16).contiguous(memory_format=_CHANNELS_LAST), weight.to(torch.bfloat16)
        ctx.geometry = (stride,) * 2, (padding,) * 2, (1, 1), False, (0, 0), 1
        ctx.save_for_backward(x, used)
        return torch.ops.aten.convolution(x, used, None if bias is None else bias.to(torch.bfloat16), *ctx.geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.to(torch.bfloat16).contiguous(memory_format=_CHANNELS_LAST)
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if of_input:
            dx = torch.ops.aten.convolution_backward(gradient, x, weight, None, *ctx.geometry, [True, False, False])[0]
        if of_weight:
            dw = weight_gradient(x, gradient, tuple(weight.shape[2:]), ctx.geometry[0][0], ctx.geometry[1][0])
        if of_bias:
            db = gradient.sum((0, 2, 3), dtype=torch.float32)
        return dx, dw, db, None, None


class _WinogradConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.to(torch.bfloat16).contiguous(memory_format=_CHANNELS_LAST)
        ctx.save_for_backward(x, weight)
        return winograd.convolution(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.to(torch.bfloat16).contiguous(memory_format=_CHANNELS_LAST)
        of_input, of_weight, of_bias = ctx.needs_input_grad
        dx = winograd.input_gradient(gradient, weight) if of_input else None
        dw = winograd.weight_gradient(x, gradient) if of_weight else None
        return dx, dw, gradient.sum((0, 2, 3), dtype=torch.float32) if of_bias else None
