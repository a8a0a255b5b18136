"""One process group over all ranks, or none for one rank; the same calls for both.

In: an `Identity` and the distributed settings. Out: a `Group`, whose collectives work on CPU tensors and plain objects. A peer that is
lost, or a collective that outlasts `timeout_s`, raises `LostRank`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hcsdl.config import ConfigError, DistributedConfig
from hcsdl.distributed.identity import Identity
from hcsdl.machine.process import held_back_output


class LostRank(RuntimeError):
    """Another rank ended or does not answer."""

    exit_code = 5


class Group:
    """The ranks of one run. With a world size of 1 every call returns at once and torch.distributed is not started."""

    def __init__(self, identity: Identity, config: DistributedConfig) -> None:
        self.rank, self.world_size = identity.rank, identity.world_size
        self.backend = config.backend if self.world_size > 1 else "none"
        self._store = None
        if self.world_size > 1:
            wait = timedelta(seconds=config.timeout_s)
            self._store, _, _ = self.guard("rendezvous", lambda: next(dist.rendezvous("env://", timeout=wait)))
            store = dist.PrefixStore("group", self._store)
            with held_back_output():
                self.guard(
                    "start of the process group",
                    lambda: dist.init_process_group(config.backend, store=store, rank=self.rank, world_size=self.world_size, timeout=wait),
                )

    def guard(self, what: str, call: Callable[[], Any]) -> Any:
        """Return `call()`; a RuntimeError in it, which is how backends report a dead peer or a time-out, becomes `LostRank`."""
        if self.world_size == 1:
            return call()
        try:
            return call()
        except (RuntimeError, dist.DistError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise LostRank(f"rank {self.rank} of {self.world_size}: {what} failed, so another rank is lost or stuck. {first}") from error

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` (any shape, dtype) over the ranks, in place; return it."""
        if self.world_size > 1:
            self.guard("all_reduce", lambda: dist.all_reduce(tensor))
        return tensor

    def all_gather_object(self, value: Any) -> list:
        """Return every rank's `value`, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        self.guard("all_gather", lambda: dist.all_gather_object(values, value))
        return values

    def check_equal(self, what: str, value: Any) -> None:
        """Raise ConfigError naming both values where a rank's `value` differs from rank 0's."""
        values = self.all_gather_object(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ConfigError(f"every rank must have the same {what}. Rank 0 has {values[0]!r}, rank {rank} has {other!r}.")

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the model under DistributedDataParallel (itself, for one rank); its gradients come out averaged over the ranks.

        Buffers are not broadcast: each rank keeps its own batch-norm statistics, which `averaged_buffers` averages where they are used.
        """
        if self.world_size == 1:
            return model
        return self.guard(
            "DistributedDataParallel",
            lambda: torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True),
        )

    def settle(self, model: torch.nn.Module, step: Callable[[], None]) -> None:
        """Take one throw-away `step()` (forward and backward), so that DistributedDataParallel rebuilds its gradient buckets before the first.

        A resumed run would otherwise sum its first gradients in another layout than the run left alone: with three ranks or more another order
        of additions, hence other bits. Buffers, gradients and random state are as before afterwards. Nothing to do for one or two ranks.
        """
        if self.world_size <= 2:
            return
        buffers, random = [b.detach().clone() for b in model.buffers()], torch.get_rng_state()
        self.guard("averaging of the gradients", step)
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        model.zero_grad(set_to_none=True)
        torch.set_rng_state(random)

    def averaged_buffers(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the model's floating-point buffers averaged over the ranks, by name; the model is left as it is.

        With a million pixels an image local batch statistics are ample, so ranks normalise alone in training, and share here.
        """
        buffers = {name: b.detach().clone() for name, b in model.named_buffers() if b.is_floating_point()}
        if self.world_size > 1 and buffers:
            flat = self.all_reduce(torch.cat([b.flatten() for b in buffers.values()])) / self.world_size
            for buffer, mean in zip(buffers.values(), flat.split([b.numel() for b in buffers.values()]), strict=True):
                buffer.copy_(mean.view_as(buffer))
        return buffers

    def close(self) -> None:
        """End the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def hand_out(identity: Identity, make: Callable[[], str], timeout_s: float) -> str:
    """Return `make()`'s text on every rank: rank 0 calls it and passes the text on through the rendezvous store.

    For launchers that start every rank with the user's own command line (torchrun). What `make` raises on rank 0 is raised there; the others
    then exit quietly with the same kind of error.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except (RuntimeError, dist.DistError) as error:
        raise LostRank(
            f"rank {identity.rank} of {identity.world_size}: the other ranks must come within {timeout_s:g} s. {str(error).splitlines()[0]}"
        ) from error
    if identity.rank > 0:
        store.wait(["hcsdl/text"], timedelta(days=2))  # rank 0 may have many plates to look at first
        text = store.get("hcsdl/text").decode()
        if text.startswith("!"):
            raise SystemExit(int(text[1:]))
        return text[1:]
    try:
        text = make()
    except BaseException as error:
        store.set("hcsdl/text", f"!{getattr(error, 'exit_code', 1)}")
        raise
    store.set("hcsdl/text", "=" + text)
    return text
