"""Batch norm with what follows it, ReLU or the sum with a residual and ReLU, in one operator that moves as few bytes as it can.

In: activations (N, C, H, W), a batch norm, perhaps a residual of the same shape. Out: relu(norm(x) + residual). Promised: the numbers of torch's own
operators up to rounding, and its running statistics; activations bf16 or fp32, everything else fp32; the same bits with any number of threads.

Of activations the backward pass keeps x, and with a residual the output, which the next convolution keeps anyway. Bytes for each element of a bf16
activation: forward 6 (with a residual 8; computed again 4 and 0), backward 10 (14; 16 where two gradients of the output are added), where torch's operators
move 12 (18) and 16 (16; 22).
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from hcsdl.kernels.native.build import library
from hcsdl.models.layers import remembered

SOURCE = Path(__file__).parent / "native" / "batch_norm.c"
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_PLAIN, _RELU, _ADD_RELU = 0, 1, 2
_CHANNELS_LAST = torch.channels_last


def batch_norm_relu(x: Tensor, norm: nn.Module, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """Return relu(norm(x) + residual), or norm(x) without `relu`; one native operator where `norm` trains, else `plain_batch_norm_relu`.

    Parameters
    ----------
    x : activations (N, C, H, W), bf16 or fp32; another memory format than channels_last is copied.
    norm : an `nn.BatchNorm2d` with weight and bias; its running statistics move as torch's. What stands in its place after folding is called.
    residual : as `x`, or none; not without `relu`.
    """
    if not _is_native(x, norm, residual):
        return plain_batch_norm_relu(x, norm, residual, relu)
    return _native(x, norm, residual, _ADD_RELU if residual is not None else _RELU if relu else _PLAIN)[0]


def batch_norm_relu_twice(x: Tensor, norm: nn.Module, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return relu(norm(x) + residual) as two tensors in the same memory, for two that take it.

    The gradients of both are added where the backward pass reads them, in the bits of an addition by autograd, which would read and write memory once more
    (sums too small for a normal number are zero here). Take whole gradients of the output from the two together. Parameters as of `batch_norm_relu`.
    """
    if not _is_native(x, norm, residual):
        return (plain_batch_norm_relu(x, norm, residual),) * 2
    return _native(x, norm, residual, _ADD_RELU)


def plain_batch_norm_relu(x: Tensor, norm: nn.Module, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """Return what `batch_norm_relu` does, by torch's operators."""
    out = norm(x)
    if residual is not None:
        out = out + residual
    return torch.relu(out) if relu else out


def _is_native(x: Tensor, norm: nn.Module, residual: Tensor | None) -> bool:
    """Whether the native operator knows the case: torch's own serves evaluation, empty mini-batches and refuses single values.

    What the operator is given as an address must be what it takes it for.
    """
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and all(
            own is None or own.dtype == torch.float32 and own.is_contiguous()
            for own in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        and (residual is None or residual.shape == x.shape)
        and x.dtype in _TYPES
        and x.device.type == "cpu"
        and x.ndim == 4
        and x.shape[1] == norm.num_features
        and x.numel() > x.shape[1]
    )


def _native(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None, form: int) -> tuple[Tensor, Tensor]:
    factor = 0.0
    if norm.track_running_stats:
        norm.num_batches_tracked.add_(1)
        factor = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    if residual is not None:
        residual = residual.to(x.dtype)
    return _BatchNorm.apply(x, norm.weight, norm.bias, residual, norm.running_mean, norm.running_var, factor, norm.eps, form)


@cache
def operators() -> ctypes.CDLL:
    """Return the native operators, compiled where need be. Raises `NoLibrary`."""
    return declared(library(SOURCE))


def declared(made: ctypes.CDLL) -> ctypes.CDLL:
    """Return a library made of `SOURCE` with its functions' types told."""
    made.batch_norm_measure.argtypes = (c_int, *(c_void_p,) * 3, *(c_double,) * 2, c_void_p, *(c_long,) * 2, c_int)
    made.batch_norm_apply.argtypes = (*(c_int,) * 2, *(c_void_p,) * 6, *(c_long,) * 2, c_int)
    made.batch_norm_backward.argtypes = (*(c_int,) * 2, *(c_void_p,) * 11, *(c_long,) * 2, c_int)
    return made


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        factor: float,
        eps: float,
        form: int,
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=_CHANNELS_LAST)
        residual = None if residual is None else residual.contiguous(memory_format=_CHANNELS_LAST)

        def measure() -> Tensor:
            statistics = weight.new_empty(2, x.shape[1])
            running = _at(running_mean), _at(running_var), factor, eps
            _call(operators().batch_norm_measure, _TYPES[x.dtype], _at(x), *running, _at(statistics), *_size(x))
            return statistics

        def apply() -> Tensor:
            y = torch.empty_like(x)
            read = _at(x), _at(residual), _at(weight), _at(bias), _at(statistics)
            _call(operators().batch_norm_apply, _TYPES[x.dtype], form, *read, _at(y), *_size(x))
            return y

        statistics = remembered(measure)
        y = remembered(apply) if form == _ADD_RELU else apply()  # a block's output, which the next one keeps
        ctx.form = form
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, statistics, y if form == _ADD_RELU else None)
        return y, y.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics, y = ctx.saved_tensors
        dy, more_dy = sorted(
            (None if each is None else each.to(x.dtype).contiguous(memory_format=_CHANNELS_LAST) for each in gradients),
            key=lambda each: each is None,
        )
        if dy is None:
            return (None,) * 9
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        dresidual = torch.empty_like(x) if ctx.form == _ADD_RELU else None
        read = _at(x), _at(dy), _at(more_dy), _at(y), _at(weight), _at(bias), _at(statistics)
        written = _at(dweight), _at(dbias), _at(dx), _at(dresidual)
        _call(operators().batch_norm_backward, _TYPES[x.dtype], ctx.form, *read, *written, *_size(x))
        return dx, dweight, dbias, dresidual, None, None, None, None, None


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _size(x: Tensor) -> tuple[int, int, int]:
    return x.numel() // x.shape[1], x.shape[1], torch.get_num_threads()


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments):
        raise MemoryError("batch norm could not have the memory for its sums.")
