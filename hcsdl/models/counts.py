"""What a training step has to do at least: the convolutions of a network, their floating-point operations, and the bytes that must move between them.

In: a network and the shape of an image. Out: `Counts`, for one image, exact. Promised: nothing is computed: the network's shapes are followed on
torch's `meta` device, so full resolution costs milliseconds; `torch.utils.flop_counter` counts the same operations (a test).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchvision.models.resnet import BasicBlock, Bottleneck

BF16_BYTES, FP32_BYTES = 2, 4
BATCH_NORM_PASSES = 8
"""Over each batch norm's input of bf16 values. Forward: read for the sums, read again, write the output, ReLU in the same pass. Backward: read gradient
and input for the sums, read both again, write the gradient. (The convolution's own writing and reading is in its time.)"""
RESIDUAL_PASSES = 3 + 2 / 16
"""Over each block's output, besides its batch norm's passes. Forward: read the shortcut. Backward: read the second branch's gradient, write the masked
sum of both for the shortcut; which outputs were positive, one bit each, written and read."""
RELU_PASSES = 3
"""Over the output of a ReLU that follows no batch norm: the convolution could write it, the backward pass reads gradient and output and writes."""
SGD_BYTES = 5 * FP32_BYTES + BF16_BYTES
"""A parameter and step: weight, gradient and momentum read, weight and momentum written, in fp32; the weight written again in bf16."""


@dataclass(frozen=True)
class Convolution:
    """One convolution: channels in and out, rows and columns of kernel, image in and image out, stride and padding; of all its groups one.

    `input_gradient` tells whether the backward pass needs it: not where the input is the image itself.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    input_gradient: bool

    @property
    def flop(self) -> int:
        """Operations of one of its three products for one image, a multiplication and an addition counted as two."""
        rows, columns = self.out_size
        return 2 * rows * columns * self.out_channels * self.in_channels * self.kernel[0] * self.kernel[1]

    @property
    def training_flop(self) -> int:
        """Operations of the forward pass, the weight gradient and, where needed, the input gradient of one image."""
        return self.flop * (2 + self.input_gradient)

    @property
    def pointwise(self) -> bool:
        """Whether it is 1×1 with stride 1: a plain matrix product over the pixels."""
        return self.kernel == (1, 1) and self.stride == (1, 1)

    def __str__(self) -> str:
        (rows, columns), (kernel, _) = self.in_size, self.kernel
        stride = f" / {self.stride[0]}" if self.stride[0] > 1 else ""
        return f"{kernel}×{kernel}{stride}, {self.in_channels} → {self.out_channels} at {rows} × {columns}"


@dataclass
class Counts:
    """One image's share of a training step.

    Attributes
    ----------
    convolutions : in the order of the forward pass, equal ones as often as they occur.
    linear_flop : operations of fully connected layers, forward and both gradients.
    moved_bytes : what must move between memory and processor outside convolutions and matrix products, in bf16, with every pass fused that can be:
        2 × (8 × inputs of batch norms + 3.125 × outputs of residual sums + 3 × outputs of other ReLUs + max-pools' inputs and outputs, twice where there
        is a gradient, and a byte an output to remember the place each way + 4 × outputs of concatenations + 3 × values of the image (fp32 read, bf16
        written)). The constants' docstrings say why.
    parameters : number of weights; the step moves `SGD_BYTES` for each, once a mini-batch.
    """

    convolutions: list[Convolution] = field(default_factory=list)
    linear_flop: int = 0
    moved_bytes: float = 0.0
    parameters: int = 0

    @property
    def training_flop(self) -> int:
        """Operations of one image's share of a training step: convolutions and matrix products, forward and backward."""
        return self.linear_flop + sum(one.training_flop for one in self.convolutions)

    def step_bytes(self, mini_batch_size: int) -> float:
        """Return the bytes that a step of `mini_batch_size` images must move outside convolutions and matrix products."""
        return mini_batch_size * self.moved_bytes + self.parameters * SGD_BYTES


def count(model: nn.Module, image_shape: tuple[int, int, int]) -> Counts:
    """Return the counts of `model` in training on images (C, H, W) of `image_shape`. The model itself is left as it is."""
    model = copy.deepcopy(model).to("meta").train()
    found = Counts(parameters=sum(parameter.numel() for parameter in model.parameters()))
    found.moved_bytes = math.prod(image_shape) * (FP32_BYTES + BF16_BYTES)
    hooks = [
        block.register_forward_hook(lambda _module, _images, output: _move(found, RESIDUAL_PASSES * output.numel()))
        for block in model.modules()
        if isinstance(block, BasicBlock | Bottleneck)
    ]
    with _Watch(found):
        model(torch.empty(1, *image_shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return found


def _move(counts: Counts, values: float) -> None:
    counts.moved_bytes += BF16_BYTES * values


class _Watch(TorchFunctionMode):
    """Notes every layer that a network calls, by the function of torch it ends in."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts
        self._normalised: set[int] = set()  # outputs of batch norms, whose ReLU costs no pass of its own
        self._kept: list[torch.Tensor] = []  # so that no other tensor gets one of those ids

    def __torch_function__(self, function: Callable, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        before = arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None
        output = function(*arguments, **(keywords or {}))
        if function is F.conv2d:
            self._convolution(arguments, output)
        elif function is F.linear:
            weight = arguments[1]
            self.counts.linear_flop += 2 * output.numel() * weight.shape[1] * (2 + before.requires_grad)
        elif function is F.batch_norm:
            _move(self.counts, BATCH_NORM_PASSES * output.numel())
            self._kept.append(output)
            self._normalised.add(id(output))
        elif function in (F.relu, torch.relu, torch.relu_) and output.ndim == 4 and not self._follows_norm(before):
            _move(self.counts, RELU_PASSES * output.numel())
        elif function in (torch.max_pool2d, F.max_pool2d):
            passes = 1 + before.requires_grad
            _move(self.counts, passes * (before.numel() + output.numel() + output.numel() / 2 * before.requires_grad))
        elif function is torch.cat:
            _move(self.counts, 4 * output.numel())
        return output

    def _follows_norm(self, before: torch.Tensor) -> bool:
        """Return whether a ReLU's input is a batch norm's output or a residual sum, whose passes are counted with those."""
        return id(before) in self._normalised

    def _convolution(self, arguments: tuple, output: torch.Tensor) -> None:
        images, weight, _bias, stride, padding, _dilation, groups = arguments[:7]
        self.counts.convolutions.append(
            Convolution(
                in_channels=images.shape[1] // groups,
                out_channels=weight.shape[0],
                kernel=tuple(weight.shape[2:]),
                stride=tuple(stride),
                padding=tuple(padding),
                in_size=tuple(images.shape[2:]),
                out_size=tuple(output.shape[2:]),
                input_gradient=images.requires_grad,
            )
        )
