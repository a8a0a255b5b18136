"""What both networks share: channel counts, the checks of an image's shape, and recomputed activations.

In: tensors and modules. Out: tensors and numbers. Promised: recomputing a block changes neither its gradients nor its buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, set_checkpoint_early_stop

from hcsdl.config import ConfigError, DataError

CONVOLUTIONS = ("aten::convolution", "hcsdl::convolution")
"""torch's operator and our own (`hcsdl.kernels.winograd`); both take the weight second."""
CHEAP = 128
"""Products a value up to which a convolution is computed again. Of ResNet-50 of width 1 these are the 1×1 convolutions of the first stage's 64 channels
and the second's 128: half of what 1×1 convolutions to more channels would keep, for a third of their time."""
_recall: ContextVar[Callable[[Callable[[], Tensor]], Tensor] | None] = ContextVar("_recall", default=None)


def scaled_channels(channels: int, width: float) -> int:
    """Return `channels * width`, rounded to the nearest multiple of 8 and at least 8.

    Multiples of 8 are the rule of MobileNets' width multiplier; they keep the blocks of vectorised convolutions full.
    """
    return max(8, int(channels * width / 8 + 0.5) * 8)


def check_image_size(image_size: tuple[int, int], minimum_size: tuple[int, int], error: type[Exception] = ConfigError) -> None:
    """Raise `error` unless `image_size` (rows, columns) is at least `minimum_size`."""
    if image_size[0] < minimum_size[0] or image_size[1] < minimum_size[1]:
        raise error(
            f"Images must have at least {minimum_size[0]} rows and {minimum_size[1]} columns for this network. Got "
            f"{image_size[0]} × {image_size[1]} instead: use a larger data.crop_px or a smaller data.downsample."
        )


def check_images(images: Tensor, in_channels: int, minimum_size: tuple[int, int]) -> None:
    """Raise `DataError` unless `images` is (N, in_channels, H, W) with H and W at least `minimum_size` (rows, columns)."""
    if images.ndim != 4 or images.shape[1] != in_channels:
        raise DataError(
            f"The network takes mini-batches of shape (N, {in_channels}, rows, columns). Got {tuple(images.shape)} instead: "
            "feed it the channels it was built for."
        )
    check_image_size((images.shape[2], images.shape[3]), minimum_size, DataError)


def recomputed(function: Callable, *inputs: Tensor, buffers_of: nn.Module, selective: bool) -> Any:
    """Return `function(*inputs)` without keeping its inner activations: the backward pass computes them again.

    `selective` keeps the outputs of convolutions, but of those that cost no more than `CHEAP` products a value: little beside what they would keep.
    What `function` gets by `remembered` is kept either way.

    The second pass works on copies of the buffers of `buffers_of`, so that batch norm's running statistics move once a step and not twice.
    Nothing random may happen inside `function`: the random state is not put back.
    """

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        kept: list[Tensor] = []
        first, second = [_remembering(kept)], [_recalling(kept), _spared_buffers(buffers_of)]
        if selective:
            for own, torchs in zip((first, second), create_selective_checkpoint_contexts(_worth_keeping), strict=True):
                own.append(torchs)
        return _all(first), _all(second)

    if not torch.is_grad_enabled():
        return function(*inputs)
    with set_checkpoint_early_stop(
        False
    ):  # it ends the second pass by an exception, which with our own operators keeps that pass's tensors alive
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def remembered(compute: Callable[[], Tensor]) -> Tensor:
    """Return `compute()`; in the second pass of `recomputed` what it was in the first: for what is small, or is kept anyway as the next block's input."""
    recall = _recall.get()
    return recall(compute) if recall else compute()


@contextmanager
def _remembering(kept: list[Tensor]) -> Iterator[None]:
    def recall(compute: Callable[[], Tensor]) -> Tensor:
        kept.append(compute())
        return kept[-1].data  # a tensor of its own: one that got the graph, which keeps `kept`, would keep itself

    with _recalled_by(recall):
        yield


@contextmanager
def _recalling(kept: list[Tensor]) -> Iterator[None]:
    left = iter(kept)
    with _recalled_by(lambda _compute: next(left).data):
        yield


@contextmanager
def _recalled_by(recall: Callable[[Callable[[], Tensor]], Tensor]) -> Iterator[None]:
    before = _recall.set(recall)
    try:
        yield
    finally:
        _recall.reset(before)


def _worth_keeping(_context: object, operator: torch._ops.OpOverload, *inputs: object, **_: object) -> CheckpointPolicy:
    if operator.name() in CONVOLUTIONS:
        weight = inputs[1]
        if weight[0].numel() > CHEAP:  # type: ignore[index]
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _all(managers: list[AbstractContextManager]) -> Iterator[None]:
    with ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        yield


@contextmanager
def _spared_buffers(module: nn.Module) -> Iterator[None]:
    # Copies rather than `track_running_stats = False`: without running statistics batch norm saves fewer tensors for the
    # backward pass, and `checkpoint` insists on the same number both times.
    own = [(part, name, buffer) for part in module.modules() for name, buffer in part.named_buffers(recurse=False)]
    for part, name, buffer in own:
        setattr(part, name, buffer.clone())
    try:
        yield
    finally:
        for part, name, buffer in own:
            setattr(part, name, buffer)
