"""The network over fields, without gradients: the one loop that validation and every later use of a trained network share.

In: a bare network, an evaluation loader over this rank's fields. Out: rows and what the network says of them, mini-batch by mini-batch (`outputs`),
or logits in row order of all ranks (`predict`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from hcsdl.config import DataError
from hcsdl.data.loading import MiniBatch
from hcsdl.distributed.group import Group
from hcsdl.kernels import Kernels


def outputs(
    model: torch.nn.Module,
    loader: Iterable[MiniBatch],
    kernels: Kernels,
    in_step: Callable[[str], AbstractContextManager] = nullcontext,
    pad_to: int | None = None,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield (rows int64 (n,), labels int64 (n,), what the model returns: one or several tensors float32 (n, …)) of each mini-batch, on the processor.

    The model runs in evaluation mode and without gradients; between two mini-batches it is in its own mode. With `pad_to` a smaller mini-batch is
    filled up to so many fields with copies of its last one, which are taken off again: kernels choose their order of additions by the shape.
    Each runs inside an `in_step` of its own, a group's: a rank whose network hangs is missed by those that have gone on to a collective.
    """
    for batch in loader:
        images, missing = batch.images, (pad_to or 0) - len(batch.images)
        if missing > 0:
            images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]).contiguous(memory_format=torch.channels_last)
        training = model.training
        model.eval()
        try:
            with in_step("prediction"), torch.no_grad(), kernels.autocast():
                found = model(images)
                found = [one[: len(batch.images)].float().cpu() for one in (found if isinstance(found, tuple) else (found,))]
        finally:
            model.train(training)
        yield batch.rows, batch.labels.cpu(), *found


def predict(
    model: torch.nn.Module, loader: Iterable[MiniBatch], kernels: Kernels, group: Group
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (rows int64 (N,), labels int64 (N,), logits float32 (N, K)), sorted by row, the same on every rank.

    Ranks may hold different numbers of fields, none included. The model is put into evaluation mode and back. Raises DataError where no rank
    has a field.
    """
    parts = list(outputs(model, loader, kernels, group.in_step))
    parts = [part for rank in group.all_gather_object(parts) for part in rank]
    if not parts:
        raise DataError("at least one field held out must be readable. None is: `hcsdl check` lists what is wrong with them.")
    rows, labels, logits = (torch.cat(column) for column in zip(*parts, strict=True))
    order = rows.argsort()
    return rows[order], labels[order], logits[order]


@contextmanager
def buffers_swapped(model: torch.nn.Module, buffers: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let `model` have `buffers` (by name) inside the context, and its own again after it, bit for bit."""
    own = {name: buffer.detach().clone() for name, buffer in model.named_buffers() if name in buffers}
    _copy(model, buffers)
    try:
        yield
    finally:
        _copy(model, own)


def _copy(model: torch.nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
