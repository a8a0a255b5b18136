"""One process group over all ranks, or none for one rank; the same calls for both.

In: an `Identity`, the distributed settings and the device. Out: a `Group`, whose collectives work on CPU tensors, plain objects and, on GPUs, on
theirs. A peer that is lost, or a collective that outlasts `timeout_s`, raises `LostRank`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hcsdl.config import ConfigError, DistributedConfig
from hcsdl.distributed.backends import largest_bucket, missing, time_backends
from hcsdl.distributed.compression import bf16_hook
from hcsdl.distributed.handout import shared_store
from hcsdl.distributed.heartbeat import Heartbeat, LostRank, take_leave, watch
from hcsdl.distributed.identity import Identity
from hcsdl.distributed.interfaces import use_interface
from hcsdl.kernels.device import CPU, gpu_id
from hcsdl.machine.process import held_back_output

START_S = 60.0  # what oneCCL has for starting, when gloo is there instead; a guess


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# How a RuntimeError reads that is a failed collective's: gloo's have no type of their own, and the autograd engine keeps but the text of an error
# of a collective that DistributedDataParallel started ("…: CclError: …", tried with torch 2.8 and 2.13).
COMMUNICATION = re.compile(
    r"/gloo/|\bCclError\b|\boneCCL\b|\bNCCL\b|\bnccl\w*Error\b|Application timeout caused pair closure|Connection (closed|reset) by peer|Broken pipe"
)


def of_communication(error: RuntimeError) -> bool:
    """Return whether an error comes from talking to other ranks, not from computing: no memory left, shapes that do not fit."""
    return isinstance(error, dist.DistError) or type(error).__name__ == "CclError" or bool(COMMUNICATION.search(str(error)))


class Group:
    """The ranks of one run. With a world size of 1 every call returns at once and torch.distributed is not started.

    On GPUs, a rank each, tensors of theirs (gradients, buffers) go through NCCL, all else through gloo.
    """

    def __init__(self, identity: Identity, config: DistributedConfig, device: torch.device = CPU) -> None:
        self.rank, self.world_size, self.host, self.config = identity.rank, identity.world_size, identity.host, config
        self.device = device
        self.backend, self.backend_reason = "none", "one rank"
        self._store = None
        self._heart: Heartbeat | None = None
        self._begun = 0  # collectives
        self._reducing: dist.ProcessGroup | None = None  # what gradients go through; None: the group all else goes through
        if self.world_size > 1:
            usual = "gloo" if device.type == "cpu" else "nccl"  # of the processor with auto until `choose_backend`
            self.backend = usual if config.backend == "auto" else config.backend
            self.backend_reason = "as configured" if device.type == "cpu" or config.backend != "auto" else "between GPUs"
            if reason := missing(self.backend, device.type):
                raise ConfigError(f"distributed.backend={self.backend} cannot be used: {reason}")
            use_interface(config.interface, os.environ["MASTER_ADDR"])
            wait = timedelta(seconds=config.timeout_s)
            self._store = self.guard("rendezvous", lambda: shared_store(config.timeout_s))
            store = dist.PrefixStore("group", self._store)
            self._heart = self.guard("heartbeat", lambda: watch(store, self.rank, self.world_size, config.silence_s, config.stall_s))
            name = "cpu:gloo,cuda:nccl" if self.backend == "nccl" else self.backend
            with held_back_output():
                self.guard(
                    "start of the process group",
                    lambda: dist.init_process_group(name, store=store, rank=self.rank, world_size=self.world_size, timeout=wait),
                )
            self._check_gpus()

    def _check_gpus(self) -> None:
        """Raise ConfigError where two ranks have one GPU, as under a launcher that starts more of them than a host has."""
        if self.device.type == "cpu":
            return
        owners: dict[tuple[str, str], int] = {}
        for rank, own in enumerate(self.all_gather_object((self.host, gpu_id(self.device)))):
            if own in owners:
                raise ConfigError(
                    f"each rank must have a GPU of its own. Ranks {owners[own]} and {rank} have the same one on {own[0]}: start fewer there."
                )
            owners[own] = rank

    def guard(self, what: str, call: Callable[[], Any]) -> Any:
        """Return `call()`; what backends raise for a dead peer or a time-out becomes `LostRank`, other errors in it stay what they are."""
        if self.world_size == 1:
            return call()
        self._begun += 1
        if self._heart:
            self._heart.note(f"{what} #{self._begun}")
        try:
            return call()
        except RuntimeError as error:
            if isinstance(error, LostRank) or not of_communication(error):
                raise
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            why = self._heart.blame() if self._heart else ""
            why = why or f"another rank is lost or stuck. {first}"
            raise LostRank(f"rank {self.rank} of {self.world_size}: {what} #{self._begun} failed: {why}") from error

    def in_step(self, work: str) -> AbstractContextManager:
        """Return a context for a step of some `work`, that takes every rank about as long: who stays in it, behind the others, for `distributed.stall_s`
        is lost."""
        return self._heart.in_step(work) if self._heart else nullcontext()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` (any shape, dtype) over the ranks, in place; return it."""
        if self.world_size > 1:
            self.guard("all_reduce", lambda: dist.all_reduce(tensor))
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return every rank's `tensor` (the same shape and dtype everywhere), stacked in rank order: (ranks, *shape)."""
        if self.world_size == 1:
            return tensor[None]
        gathered = tensor.new_empty((self.world_size, *tensor.shape))
        self.guard("all_gather", lambda: dist.all_gather(list(gathered), tensor))
        return gathered

    def largest(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        return float(self.all_gather(torch.tensor([value], dtype=torch.float64)).max())

    def all_gather_object(self, value: Any) -> list:
        """Return every rank's `value`, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        self.guard("all_gather", lambda: dist.all_gather_object(values, value))
        return values

    def check_equal(self, what: str, value: Any) -> None:
        """Raise ConfigError naming both values, rank and host where a rank's `value` differs from rank 0's; of dicts, only what differs."""
        found = self.all_gather_object((self.host, value))
        host, first = found[0]
        for rank, (other_host, other) in enumerate(found):
            if other == first:
                continue
            if isinstance(first, dict) and isinstance(other, dict):
                keys = [key for key in first | other if first.get(key) != other.get(key)]
                first, other = ({key: one.get(key) for key in keys} for one in (first, other))
            raise ConfigError(
                f"every rank must have the same {what}. Rank 0 on {host} has {first!r}, rank {rank} on {other_host} has {other!r}."
            )

    def choose_backend(self, model: torch.nn.Module, before: str = "") -> None:
        """With `distributed.backend=auto`, time all_reduces of the model's largest gradient bucket through gloo and oneCCL and keep the faster.

        `before` is what the run went through until it was stopped: kept without timing, since another library adds in another order. What was
        chosen and why stands in `backend` and `backend_reason`, the same on every rank. At most about 2 s.
        """
        if self.world_size == 1 or self.config.backend != "auto" or self.device.type != "cpu":
            return
        reasons = [reason for reason in self.all_gather_object(missing("ccl")) if reason]
        if reasons:
            self.backend_reason = f"ccl cannot be used: {reasons[0]}"
            return
        if before == "gloo":
            self.backend_reason = "as before the resume"
            return
        ccl, failed = None, ""
        try:
            with held_back_output():
                ccl = dist.new_group(backend="ccl", timeout=timedelta(seconds=min(self.config.timeout_s, START_S)))
        except (RuntimeError, OSError) as error:
            failed = first_line(error)
        reasons = [reason for reason in self.all_gather_object(failed) if reason]
        if reasons:
            self.backend_reason = f"ccl did not start: {reasons[0]}"
            return
        if before == "ccl":
            self.backend, self.backend_reason, self._reducing = "ccl", "as before the resume", ccl
            return
        dtype, num_bytes = torch.float32, largest_bucket(model, self.config.bucket_mib)
        if self.config.gradient_dtype == "bf16":
            dtype, num_bytes = torch.bfloat16, num_bytes // 2
        size, seconds = self.guard(
            "timing of the backends", lambda: time_backends({"gloo": None, "ccl": ccl}, num_bytes, dtype, self.largest)
        )
        if seconds["ccl"] < seconds["gloo"]:
            self.backend, self._reducing = "ccl", ccl
        else:
            dist.destroy_process_group(ccl)
        self.backend_reason = f"all_reduce of {size / 2**20:.1f} MiB {self.config.gradient_dtype}: " + ", ".join(
            f"{name} {1000 * value:.1f} ms" for name, value in seconds.items()
        )

    @property
    def gradient_group(self) -> dist.ProcessGroup:
        """The process group that gradients go through, of several ranks."""
        return self._reducing or dist.group.WORLD

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the model under DistributedDataParallel (itself, for one rank); its gradients come out averaged over the ranks.

        Gradients are views into the buckets they are sent in, rounded to bf16 on their way with `distributed.gradient_dtype=bf16`. Buffers are
        not broadcast: each rank keeps its own batch-norm statistics, which `averaged_buffers` averages where they are used.
        """
        if self.world_size == 1:
            return model
        with warnings.catch_warnings():
            # torch 2.13 would have us say forward_sync_buffers=False, which gives every rank the first one's buffers at the start: not ours to lose.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = self._in_parallel(model)
        if self.config.gradient_dtype == "bf16":
            wrapped.register_comm_hook(self.gradient_group, bf16_hook)
        return wrapped

    def _in_parallel(self, model: torch.nn.Module) -> torch.nn.parallel.DistributedDataParallel:
        return self.guard(
            "DistributedDataParallel",
            lambda: torch.nn.parallel.DistributedDataParallel(
                model,
                device_ids=None if self.device.type == "cpu" else [self.device],
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=self.config.bucket_mib,
                process_group=self.gradient_group,
            ),
        )

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
        """End the process group, once all ranks are ready to: who misses this one later misses nothing."""
        if self.world_size > 1:
            self.all_reduce(torch.zeros(1))
            take_leave()
            dist.destroy_process_group()
