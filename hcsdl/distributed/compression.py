"""Gradients sent as bf16: half the bytes, 8 bits of mantissa. torch's own hook refuses builds without a GPU.

In: DistributedDataParallel's gradient buckets, fp32. Out: their mean over the ranks, rounded to bf16 before they are sent and, in the sum, wherever
the backend rounds.
"""

import torch
import torch.distributed as dist


# No `from __future__ import annotations` here: DDP compares the annotations of a hook with the types themselves.
def bf16_hook(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket over the ranks of `group` (None: all) by way of bf16; a DistributedDataParallel communication hook.

    Each rank divides by the number of ranks in fp32 before it rounds, so the sum cannot leave bf16's range, which is fp32's.
    """
    buffer = bucket.buffer()
    sent = (buffer / dist.get_world_size(group)).to(torch.bfloat16)
    future = dist.all_reduce(sent, group=group, async_op=True).get_future()

    def received(done: torch.futures.Future) -> torch.Tensor:
        done.value()  # raises what the collective raised
        buffer.copy_(sent)
        return buffer

    return future.then(received)
