"""Sends and receives, through gloo beside the communicator.

In: a tensor, a peer, a tag. Out: a `Work` that says who and what when it fails. oneCCL's own calls end the process with host buffers, and know
neither tags nor any source.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo

from hcsdl.distributed.oneccl.api import CclError
from hcsdl.distributed.oneccl.collectives import kind


class PairWork(dist.distributed_c10d.Work):
    """One send or receive."""

    def __init__(self, work: dist.distributed_c10d.Work, label: str, tensor: torch.Tensor, buffer: torch.Tensor) -> None:
        super().__init__()
        self._work, self._label, self._tensor, self._buffer = work, label, tensor, buffer

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return True once the tensor has gone out or come in."""
        try:
            self._work.wait(timeout) if timeout else self._work.wait()
        except RuntimeError as error:
            raise CclError(f"{self._label} failed: {error}") from error
        if self._buffer is not self._tensor:
            self._tensor.detach().copy_(self._buffer)
        return True

    def is_completed(self) -> bool:
        """Return whether waiting would return at once."""
        return self._work.is_completed()

    def _source_rank(self) -> int:
        return self._work._source_rank()


class PointToPoint:
    """The pairs among `size` ranks. Where gloo cannot connect them, that is said at the first send or receive."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, prefix: str) -> None:
        self._prefix, self._failure = prefix, ""
        options = ProcessGroupGloo._Options()
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("FI_TCP_IFACE") or ""
        options._timeout = timeout
        try:
            options._devices = [
                ProcessGroupGloo.create_device(interface=interface) if interface else ProcessGroupGloo.create_default_device()
            ]
            self._gloo = ProcessGroupGloo(store, rank, size, options)
        except RuntimeError as error:
            self._failure = str(error)

    def close(self) -> None:
        """Part with the others."""
        self._gloo, self._failure = None, "the process group has been destroyed"

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> PairWork:
        """Send to rank `peer`."""
        label, buffer = self._ready(f"send to rank {peer}", tensor)
        return PairWork(self._gloo.send([buffer], peer, tag), label, buffer, buffer)

    def receive(self, tensor: torch.Tensor, peer: int | None, tag: int) -> PairWork:
        """Receive from rank `peer`, or from whoever sends first."""
        label, buffer = self._ready(f"receive from {'any rank' if peer is None else f'rank {peer}'}", tensor)
        work = self._gloo.recv_anysource([buffer], tag) if peer is None else self._gloo.recv([buffer], peer, tag)
        return PairWork(work, label, tensor, buffer)

    def _ready(self, what: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        label = f"{self._prefix}{what} of{kind(tensor)}"
        if self._failure:
            raise CclError(f"{label} failed: gloo could not connect the ranks: {self._failure}")
        return label, tensor if tensor.is_contiguous() else tensor.detach().contiguous()
