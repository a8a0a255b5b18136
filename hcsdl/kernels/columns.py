"""M-CNN's columns, whose gradients are computed only where there are any.

In: one column's image and its three convolutions. Out: its pooled activations. Promised: the numbers of torch's own operators up to rounding, where sums of
gradients are fp32 from end to end; the same bits with the same number of threads.

A column of M-CNN ends in a max-pool by its `window`: a gradient reaches one value in window² of the last convolution, hence only the 5 × 5 pixels around
those of the layer before, and 9 × 9 of the one before that. torch computes the products with all those zeros; `column_backward` leaves them out, which for
the two largest columns is most of the backward pass. One difference: a zero times an infinite activation is left out as well and not NaN; such an
activation is seen in the forward pass, where the pooling takes it on.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from hcsdl.kernels.max_pool import pooled
from hcsdl.kernels.native.build import library
from hcsdl.models.mcnn import MCNN

SOURCE = Path(__file__).parent / "native" / "column.c"
SMALLEST_WINDOW = 32
"""Below it the pixels with a gradient are most of the image, and torch's dense operators are faster (measured here)."""
LANES = 16
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class SparseColumn(nn.Sequential):
    """A column of `MCNN`, with the same parts under the same names."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled activations (N, C, H // window, W // window) of `images` (N, in_channels, H, W), channels_last."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        plain = not torch.is_grad_enabled() or images.requires_grad
        if plain or dtype not in _TYPES or images.device.type != "cpu" or images.numel() == 0:
            return super().forward(images)
        layers = [self[number] for number in (0, 2, 4)]
        parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
        return _Column.apply(images.to(dtype, memory_format=torch.channels_last), self[5].kernel_size, *parameters)


def replace_columns(model: nn.Module) -> int:
    """Put a `SparseColumn` in the place of each column of `model` that gains by it; return how many. The parameters stay the same objects."""
    if not isinstance(model, MCNN):
        return 0
    chosen = [
        n for n, column in enumerate(model.columns) if column[5].kernel_size >= SMALLEST_WINDOW and column[0].out_channels % LANES == 0
    ]
    for n in chosen:
        model.columns[n] = SparseColumn(*model.columns[n])
    return len(chosen)


@cache
def operators() -> ctypes.CDLL:
    """Return the native operator, compiled where need be. Raises `NoLibrary`."""
    return declared(library(SOURCE))


def declared(made: ctypes.CDLL) -> ctypes.CDLL:
    """Return a library made of `SOURCE` with its function's types told."""
    made.column_backward.argtypes, made.column_backward.restype = (*(c_void_p,) * 8, *(c_int64,) * 8), c_int
    return made


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, images: Tensor, window: int, *parameters: Tensor) -> Tensor:
        w1, b1, w2, b2, w3, b3 = (parameter.detach().to(images.dtype) for parameter in parameters)
        with torch.autocast("cpu", enabled=False):
            first = F.conv2d(images, w1, b1, padding=2).relu_()
            second = F.conv2d(first, w2, b2, padding=2).relu_()
            last, places = pooled(F.conv2d(second, w3, b3, padding=2), window, window)
        out = last.relu_()
        ctx.window = window
        ctx.save_for_backward(images, first, second, places, out, w2, w3)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, first, second, places, out, w2, w3 = ctx.saved_tensors
        count, in_channels, height, width = images.shape
        channels, threads = first.shape[1], torch.get_num_threads()
        gradient = torch.where(out <= 0, 0, gradient).permute(0, 2, 3, 1).float().contiguous()
        weights = [weight.float().permute(2, 3, 0, 1).contiguous() for weight in (w2, w3)]
        places = places.to(torch.int32).to(torch.uint16) if places.dtype == torch.uint8 else places
        sizes = 25 * in_channels * channels, 25 * channels**2, 25 * channels**2, channels, channels, channels
        sums = torch.zeros(threads, sum(sizes))
        tensors = images, first, second, places, gradient, *weights, sums
        shape = count, height, width, in_channels, channels, ctx.window, _TYPES[images.dtype], threads
        if operators().column_backward(*(tensor.data_ptr() for tensor in tensors), *shape):
            raise MemoryError("a column's backward pass could not have the memory for its windows.")
        dw1, dw2, dw3, db1, db2, db3 = sums[0].split(sizes)
        dw1 = dw1.view(5, 5, in_channels, channels).permute(3, 2, 0, 1)
        dw2, dw3 = (dw.view(5, 5, channels, channels).permute(2, 3, 0, 1) for dw in (dw2, dw3))
        return None, None, dw1, db1, dw2, db2, dw3, db3
