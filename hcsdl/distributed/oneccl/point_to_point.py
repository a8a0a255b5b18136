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

    def __init__(self, work: dist.distributed_c10d.Work, label: str, tensor: torch.Tensor, buffer: torch.Tensor, limit: timedelta) -> None:
        super().__init__()
        self._work, self._label, self._tensor, self._buffer, self._limit = work, label, tensor, buffer, limit

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return True once the tensor has gone out or come in."""
        try:
            self._work.wait(timeout or self._limit)
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
    """The pairs among `size` ranks. Raises CclError where gloo cannot connect them."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, prefix: str) -> None:
        self._prefix = prefix
        self._timeout = timeout
        options = ProcessGroupGloo._Options()
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "")  # as `use_interface` has set it, or the user
        options._timeout = 2 * timeout  # where ranks meet for a collective, that one's own time-out comes first, and says more
        try:
            device = ProcessGroupGloo.create_device(interface=interface) if interface else ProcessGroupGloo.create_default_device()
            options._devices = [device]
            self._gloo: ProcessGroupGloo | None = ProcessGroupGloo(store, rank, size, options)
        except RuntimeError as error:
            raise CclError(
                f"{prefix}gloo, which carries sends and receives, could not connect the ranks over {interface or 'any interface'}: {error}"
            ) from error

    def close(self) -> None:
        """Part with the others."""
        self._gloo = None

    def meet(self) -> None:
        """Return once every rank has called this; who waits sleeps. Raises RuntimeError with gloo's text where one cannot be reached any more."""
        self._gloo.barrier().wait()  # type: ignore[union-attr]

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> PairWork:
        """Send to rank `peer`."""
        label, buffer = self._ready(f"send to rank {peer}", tensor)
        return PairWork(self._gloo.send([buffer], peer, tag), label, buffer, buffer, self._timeout)  # type: ignore[union-attr]

    def receive(self, tensor: torch.Tensor, peer: int | None, tag: int) -> PairWork:
        """Receive from rank `peer`, or from whoever sends first."""
        label, buffer = self._ready(f"receive from {'any rank' if peer is None else f'rank {peer}'}", tensor)
        work = self._gloo.recv_anysource([buffer], tag) if peer is None else self._gloo.recv([buffer], peer, tag)  # type: ignore[union-attr]
        return PairWork(work, label, tensor, buffer, self._timeout)

    def _ready(self, what: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return f"{self._prefix}{what} of{kind(tensor)}", tensor if tensor.is_contiguous() else tensor.detach().contiguous()
