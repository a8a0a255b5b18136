"""Where a step's time goes: data, forward and backward pass, exposed communication, optimizer.

In: laps told by the training loop, and what a forward and backward pass of this rank takes when it is not sending gradients, measured by
`probe` before the first step. Out: seconds of each part, mean and largest over the ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from hcsdl.distributed.group import Group
from hcsdl.kernels.device import CPU, random_state, set_random_state, wait_for

PARTS = ("data", "forward_backward", "exposed_communication", "optimizer")
ENOUGH_S = 1.0  # a pass that takes longer is timed once, a shorter one three times; a guess


class StepClock:
    """Stops the time of one rank's steps on `device`, for which each lap waits.

    Exposed communication is what a step's passes take longer than the same rank's passes without communication (`alone_s`, of all its
    mini-batches), and the wait of the step before for the other ranks' agreement: what the backward pass does not hide. The optimizer's time,
    with that of the gradient's norm, is that of the step before, since all ranks hear of a step's times before its optimizer moves.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self.alone_s = 0.0
        self.data_s = 0.0
        self._last = self._passes_s = self._optimizer_s = self._agreement_s = 0.0
        self._before = (0.0, 0.0)

    def start(self) -> None:
        """A step's first forward pass begins."""
        self._before, self._optimizer_s = (self._optimizer_s, self._agreement_s), 0.0
        self._last = time.monotonic()

    def _lap(self) -> float:
        wait_for(self.device)
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return seconds

    def passes_done(self) -> None:
        """The last backward pass has ended, gradients averaged."""
        self._passes_s = self._lap()

    def norm_done(self) -> None:
        """The gradient's norm is known; what follows is the wait for the other ranks."""
        self._optimizer_s = self._lap()

    def agreed(self) -> None:
        """All ranks have agreed on the step; what follows is the optimizer."""
        self._agreement_s = self._lap()

    def step_done(self) -> None:
        """The optimizer has moved the weights."""
        self._optimizer_s += self._lap()

    def seconds(self) -> list[float]:
        """Return this rank's seconds of each of `PARTS`; call between `norm_done` and `agreed`."""
        exposed = max(0.0, self._passes_s - self.alone_s) if self.alone_s else 0.0
        optimizer_s, agreement_s = self._before
        return [self.data_s, self._passes_s - exposed, exposed + agreement_s, optimizer_s]


def over_ranks(table: torch.Tensor) -> dict[str, float]:
    """Return `<part>_s` and `<part>_max_s`, mean and largest over the ranks, of a (ranks, 4) table of `StepClock.seconds`."""
    mean, largest = table.mean(0).tolist(), table.amax(0).tolist()
    return {f"{part}_s": value for part, value in zip(PARTS, mean, strict=True)} | {
        f"{part}_max_s": value for part, value in zip(PARTS, largest, strict=True)
    }


@dataclass(frozen=True)
class Probe:
    """Median seconds of a forward and backward pass over one mini-batch: without sending gradients, and with averaging them."""

    alone_s: float
    together_s: float


def probe(model: torch.nn.Module, group: Group, one_pass: Callable[[], None]) -> Probe:
    """Time throw-away calls of `one_pass` (forward and backward over a mini-batch), the slowest rank's times, and leave no trace of them.

    The first pass, not timed, pays for memory and kernels being set up; with it DistributedDataParallel rebuilds its gradient buckets. A resumed
    run would otherwise sum its first gradients in another layout than the run left alone: with three ranks or more another order of
    additions, hence other bits. Buffers, gradients and random state are as before afterwards. Raises LostRank.
    """

    def timed(alone: bool) -> float:
        begun = time.monotonic()
        _pass(model, group, one_pass, alone)
        wait_for(group.device)
        taken = time.monotonic() - begun
        model.zero_grad(set_to_none=True)  # else the next pass adds to them, which a step's first does not
        return group.largest(taken)

    with _no_trace(model, group.device):
        timed(alone=False)
        first = timed(alone=True)
        times = 1 if first > ENOUGH_S else 3
        alone = statistics.median([first, *(timed(alone=True) for _ in range(times - 1))])
        together = statistics.median([timed(alone=False) for _ in range(times)]) if group.world_size > 1 else alone
    return Probe(alone, together)


def throw_away(model: torch.nn.Module, group: Group, one_pass: Callable[[], None]) -> None:
    """Make one call of `one_pass` without sending gradients, and leave no trace of it but the memory it took."""
    with _no_trace(model, group.device):
        _pass(model, group, one_pass, alone=True)


def _pass(model: torch.nn.Module, group: Group, one_pass: Callable[[], None], alone: bool) -> None:
    with model.no_sync() if alone and isinstance(model, DistributedDataParallel) else nullcontext():
        group.guard("averaging of the gradients", one_pass)


@contextmanager
def _no_trace(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    buffers, random = [b.detach().clone() for b in model.buffers()], random_state(device)
    yield
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    model.zero_grad(set_to_none=True)
    set_random_state(device, random)
