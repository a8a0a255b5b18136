"""Max-pool that keeps one byte for each maximum and writes each value of the input's gradient once.

In: (N, C, H, W), bf16 or fp32. Out: the maxima, as `torch.nn.functional.max_pool2d` gives them, ties and values that are no numbers included, in
channels_last. Promised: the same bits with any number of threads. torch keeps 8 bytes for each maximum, and clears the gradient before it scatters.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from hcsdl.kernels.native.build import library

SOURCE = Path(__file__).parent / "native" / "max_pool.c"
ONE_BYTE_WINDOW, TWO_BYTE_WINDOW = 16, 256
"""The largest sides of windows whose places fit one byte, and two."""
FEW_CHANNELS = 8
"""Below this many channels vectors run along the row and not over the channels; a guess."""
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def max_pool(x: Tensor, kernel_size: int, stride: int | None = None, padding: int = 0) -> Tensor:
    """Return the maxima of square windows of `x` (N, C, H, W); its twin is `torch.nn.functional.max_pool2d`, which serves what this does not know.

    Parameters
    ----------
    x : bf16 or fp32 on the CPU; another memory format than channels_last is copied.
    kernel_size, stride, padding : pixels; the stride is the kernel's size unless given, the padding at most half of that.
    """
    stride = stride or kernel_size
    fits = x.device.type == "cpu" and x.dtype in _TYPES and x.ndim == 4 and x.numel() > 0 and kernel_size <= TWO_BYTE_WINDOW
    if not fits or 2 * padding > kernel_size or min(x.shape[2:]) + 2 * padding < kernel_size:
        return F.max_pool2d(x, kernel_size, stride, padding)
    if x.requires_grad and torch.is_grad_enabled():
        return _MaxPool.apply(x, kernel_size, stride, padding)
    if (kernel_size, stride, padding) == (2, 2, 0) and x.shape[1] < FEW_CHANNELS:
        return _halved(x)
    return pooled(x, kernel_size, stride, padding, places=False)[0]


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` by `max_pool`, for square windows."""

    @classmethod
    def like(cls, pool: nn.MaxPool2d) -> MaxPool2d | None:
        """Return the same pooling in this class; None where it needs what only torch's has."""
        whole = all(isinstance(value, int) for value in (pool.kernel_size, pool.stride, pool.padding))
        return (
            cls(pool.kernel_size, pool.stride, pool.padding)
            if whole and pool.dilation == 1 and not (pool.ceil_mode or pool.return_indices)
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima of the windows of `x` (N, C, H, W)."""
        return max_pool(x, self.kernel_size, self.stride, self.padding)


def replace_max_pools(model: nn.Module) -> int:
    """Put `MaxPool2d` in the place of torch's in `model`; return how many there were."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children() if type(child) is nn.MaxPool2d]
    made = [(parent, name, MaxPool2d.like(child)) for parent, name, child in found]
    for parent, name, pool in made:
        if pool is not None:
            setattr(parent, name, pool)
    return sum(pool is not None for _, _, pool in made)


def pooled(x: Tensor, kernel_size: int, stride: int, padding: int = 0, places: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return the maxima of `x` and, with `places`, where they stand in their windows: row * kernel_size + column, uint8 or uint16, as the maxima."""
    x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    size = [(side + 2 * padding - kernel_size) // stride + 1 for side in (height, width)]
    wide = kernel_size > ONE_BYTE_WINDOW
    out = torch.empty((images, channels, *size), dtype=x.dtype, memory_format=torch.channels_last)
    kept = torch.empty_like(out, dtype=torch.uint16 if wide else torch.uint8) if places else None
    shape = images, height, width, channels, kernel_size, stride, padding, *size
    at = None if kept is None else kept.data_ptr()
    operators().max_pool_forward(x.data_ptr(), out.data_ptr(), at, *shape, _TYPES[x.dtype], wide, torch.get_num_threads())
    return out, kept


def _halved(x: Tensor) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    out = torch.empty((images, channels, height // 2, width // 2), dtype=x.dtype, memory_format=torch.channels_last)
    rows = torch.empty(torch.get_num_threads(), width * channels)
    shape = images, height, width, channels
    operators().halve(x.data_ptr(), out.data_ptr(), rows.data_ptr(), *shape, _TYPES[x.dtype], torch.get_num_threads())
    return out


@cache
def operators() -> ctypes.CDLL:
    """Return the native operators, compiled where need be. Raises `NoLibrary`."""
    return declared(library(SOURCE))


def declared(made: ctypes.CDLL) -> ctypes.CDLL:
    """Return a library made of `SOURCE` with its functions' types told."""
    made.max_pool_forward.argtypes = made.max_pool_backward.argtypes = (*(c_void_p,) * 3, *(c_int64,) * 12)
    made.halve.argtypes = (*(c_void_p,) * 3, *(c_int64,) * 6)
    for function in (made.max_pool_forward, made.max_pool_backward, made.halve):
        function.restype = None
    return made


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
        out, places = pooled(x, kernel_size, stride, padding)
        ctx.settings = x.shape, kernel_size, stride, padding
        ctx.save_for_backward(places)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        (images, channels, height, width), kernel_size, stride, padding = ctx.settings
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        out = torch.empty((images, channels, height, width), dtype=gradient.dtype, memory_format=torch.channels_last)
        shape = images, height, width, channels, kernel_size, stride, padding, *gradient.shape[2:]
        at = gradient.data_ptr(), places.data_ptr(), out.data_ptr()
        operators().max_pool_backward(*at, *shape, _TYPES[out.dtype], kernel_size > ONE_BYTE_WINDOW, torch.get_num_threads())
        return out, None, None, None
