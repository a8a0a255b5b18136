"""Which collective library the gradients go through: what can be used here, and which is the faster.

In: process groups over the same ranks, and the size of the largest gradient bucket. Out: seconds of an all_reduce through each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

BUDGET_S = 1.5  # of the two seconds that a choice may take, the rest is for the start of oneCCL
SMALLEST = 2**20
ROUNDS = 3, 15


def missing(backend: str, device: str = "cpu") -> str:
    """Return a sentence why this process, computing on `device`, cannot use `backend`, empty if it can."""
    if backend == "nccl" and device == "cpu":
        return "nccl moves data between GPUs, and machine.device=cpu: use auto, ccl or gloo."
    if backend == "nccl" and not dist.is_nccl_available():
        return "this torch was built without it: use gloo."
    if backend == "ccl":
        from hcsdl.distributed import oneccl

        return oneccl.missing()
    return ""


def largest_bucket(model: torch.nn.Module, bucket_mib: float) -> int:
    """Return the bytes of the largest gradient bucket of `model`, parameters packed in reverse order up to `bucket_mib` as DDP does."""
    largest = current = 0
    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        current += parameter.numel() * 4
        largest = max(largest, current)
        if current >= int(bucket_mib * 2**20):
            current = 0
    return largest


def time_backends(
    candidates: dict[str, dist.ProcessGroup | None], num_bytes: int, dtype: torch.dtype, largest: Callable[[float], float]
) -> tuple[int, dict[str, float]]:
    """Return a size in bytes and the median seconds of an all_reduce of it through each candidate, rounds interleaved.

    The size is `num_bytes`, or less where that would not fit into the time: it grows fourfold from 1 MiB. `largest` returns the largest of all
    ranks' values, so that all do the same rounds and the slowest rank's time counts.
    """

    def once(group: dist.ProcessGroup | None, buffer: torch.Tensor) -> float:
        begun = time.monotonic()
        dist.all_reduce(buffer, group=group)
        return largest(time.monotonic() - begun)

    size = min(SMALLEST, num_bytes)
    while True:
        buffer = torch.zeros(max(1, size // dtype.itemsize), dtype=dtype)
        round_s = sum(once(group, buffer) for group in candidates.values())
        if size == num_bytes or 4 * round_s * ROUNDS[0] > BUDGET_S / 2:
            break
        size = min(4 * size, num_bytes)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(BUDGET_S / 2 / round_s)))
    times = [{name: once(group, buffer) for name, group in candidates.items()} for _ in range(rounds)]
    return size, {name: statistics.median(one[name] for one in times) for name in candidates}
