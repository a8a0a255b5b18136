"""3×3 convolutions with stride 1 and padding 1 by Winograd's F(2×2, 3×3), in bf16: 16 products where the plain sum takes 36.

In: channels_last tensors, bf16, and a float32 weight. Out: the convolution, its input's and its weight's gradient. Promised: sums are float32; beside
the values in fp64 the error is about twice that of torch's bf16 convolution, which rounds its output as this does (tests); the same bits with any
number of threads, and of outputs and input gradients with any mini-batch.

Of A. Lavin and S. Gray, Fast algorithms for convolutional neural networks, 2016 (arXiv:1509.09308). Transformed tiles and weights are rounded to bf16
once, where the plain convolution rounds the weight only: that is the difference in error. An infinite value makes NaN of what is infinite else.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from hcsdl.kernels.native.build import library

SOURCE = Path(__file__).parent / "native" / "winograd.c"
LANES = 16
"""Channels in and out are a multiple of it."""
FEWEST_CHANNELS = 32
"""In and out; with 16 the transforms cost what the products save (measured here)."""
_CHANNELS_LAST = torch.channels_last
_LIBRARY = torch.library.Library("hcsdl", "FRAGMENT")
_LIBRARY.define("convolution(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def knows(module: nn.Conv2d) -> bool:
    """Return whether a convolution has the shape for it."""
    shape = module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode
    known = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return known and all(n % LANES == 0 and n >= FEWEST_CHANNELS for n in (module.in_channels, module.out_channels))


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the convolution (N, K, H, W), bf16, channels_last, of `x` (N, C, H, W), bf16, channels_last, by `weight` (K, C, 3, 3), float32.

    `bias` is (K,) float32 or none. An operator of torch's, `hcsdl::convolution`, so that what keeps or counts operators sees it.
    """
    return torch.ops.hcsdl.convolution(x, weight, bias)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient (N, C, H, W) of a convolution's input, from that of its output (N, K, H, W); types and layout as in `convolution`."""
    return _convolve(gradient, weight, None, turned=True)


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient (K, C, 3, 3), float32, channels_last, of a convolution's weight, from its input (N, C, H, W) and that of its output, bf16."""
    images, channels, height, width = x.shape
    out_channels = gradient.shape[1]
    if gradient.shape != (images, out_channels, height, width):
        raise TypeError(f"The gradient must have the input's images and size. Got {tuple(gradient.shape)} and {tuple(x.shape)} instead.")
    x, gradient = _checked(x), _checked(gradient)
    found = torch.empty(out_channels, 3, 3, channels)
    if x.numel() == 0:
        return found.zero_().permute(0, 3, 1, 2)
    shape = (c_int64 * 5)(images, height, width, channels, out_channels)
    scratch = torch.empty(operators().weight_gradient_bytes(shape), dtype=torch.uint8)
    operators().weight_gradient(shape, *(tensor.data_ptr() for tensor in (x, gradient, found, scratch)), torch.get_num_threads())
    return found.permute(0, 3, 1, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool = False) -> Tensor:
    x = _checked(x)
    images, channels, height, width = x.shape
    out_channels, threads = weight.shape[1 if turned else 0], torch.get_num_threads()
    wanted = (channels, out_channels, 3, 3) if turned else (out_channels, channels, 3, 3)
    fits = weight.shape == wanted and out_channels % LANES == 0 and (bias is None or bias.shape == (out_channels,))
    if not fits or weight.dtype != torch.float32:
        raise TypeError(
            f"The weight must be float32 of 3 × 3, from and to multiples of {LANES} channels. Got {weight.dtype} {tuple(weight.shape)} "
            f"for activations {tuple(x.shape)} instead: use torch's convolution."
        )
    weight = weight.contiguous(memory_format=_CHANNELS_LAST)
    bias = None if bias is None else bias.float().contiguous()
    shape = (c_int64 * 5)(images, height, width, channels, out_channels)
    y = torch.empty(images, out_channels, height, width, dtype=x.dtype, memory_format=_CHANNELS_LAST)
    scratch = torch.empty(operators().convolve_bytes(shape, threads), dtype=torch.uint8)
    at = x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()
    operators().convolve(shape, *at, turned, scratch.data_ptr(), threads)
    return y


def _checked(x: Tensor) -> Tensor:
    """Return activations in channels_last. Raise TypeError for what the operators would take for something else."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.ndim != 4 or x.shape[1] % LANES:
        raise TypeError(
            f"Activations must be bf16 (N, C, H, W) on the processor, C a multiple of {LANES}. Got {x.dtype} {tuple(x.shape)} "
            f"on {x.device} instead: use torch's convolution."
        )
    return x.contiguous(memory_format=_CHANNELS_LAST)


_LIBRARY.impl("convolution", _convolve, "CPU")


@cache
def operators() -> ctypes.CDLL:
    """Return the native operators, compiled where need be. Raises `NoLibrary`."""
    made = library(SOURCE)
    if made.supported():
        made.convolve_bytes.argtypes, made.convolve_bytes.restype = (c_void_p, c_int64), c_int64
        made.convolve.argtypes, made.convolve.restype = (*(c_void_p,) * 5, c_int64, c_void_p, c_int64), None
        made.weight_gradient_bytes.argtypes, made.weight_gradient_bytes.restype = (c_void_p,), c_int64
        made.weight_gradient.argtypes, made.weight_gradient.restype = (*(c_void_p,) * 5, c_int64), None
    return made
