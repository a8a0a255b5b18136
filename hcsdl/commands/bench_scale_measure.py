"""What `hcsdl bench scale` measures on the ranks it runs on.

In: networks by name, random images in memory, a process group. Out, the same on every rank, the slowest rank's times: the timeline of a training
step that sends nothing, all_reduces by size, how much both hold each other up, and real steps to check a prediction against.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hcsdl.config import BenchScaleCommand, ModelConfig, ObjectiveConfig, TrainingConfig
from hcsdl.distributed.group import Group
from hcsdl.distributed.scaling import Overlap, Timeline
from hcsdl.kernels import Kernels
from hcsdl.models import build_model
from hcsdl.training.loop import gradient_norm
from hcsdl.training.objectives import build_objective
from hcsdl.training.optimizers import build_optimizer

CHANNELS, CLASSES = 3, 13  # of BBBC021
SIZES = (2**10, 2**16, 2**20, 2**22, 25 * 2**20)  # bytes, besides the networks' own buckets; the last is torch's usual bucket
LONGEST_CALL_S = 4.0  # a larger all_reduce is extrapolated, not measured; a guess
SIZE_SPAN_S = 0.2  # a size is timed for so long each round, 20 times at most
SLOWEST_RATE = 0.01  # what a rate is at least, against division by zero where nothing was sent in a short pass


class Workload:
    """One network with what a training step needs, and random fields in memory.

    A silent one is wrapped in DistributedDataParallel with a communication hook that sends nothing and notes when each bucket was ready: it does all
    the work of a training step but the communication, bucket copies and divisions included. Its ranks' weights drift apart, which costs no time.
    """

    def __init__(self, name: str, config: BenchScaleCommand, group: Group, kernels: Kernels, silent: bool) -> None:
        self.group, self.kernels, self.silent = group, kernels, silent
        self.dtype = torch.bfloat16 if config.distributed.gradient_dtype == "bf16" else torch.float32
        self.objective = build_objective(ObjectiveConfig())
        torch.manual_seed(config.seed)
        rows, columns = config.bench.image_px
        model = build_model(ModelConfig(name=name), CHANNELS, CLASSES, (rows, columns))
        bare, self.optimizer = kernels.prepare(model, build_optimizer(model, TrainingConfig(learning_rate=1e-4)))
        self.data = {
            fields: (
                torch.randn(fields, CHANNELS, rows, columns).to(kernels.image_dtype).contiguous(memory_format=torch.channels_last),
                torch.arange(fields) % CLASSES,
            )
            for fields in config.bench.mini_batches
        }
        self._ready: list[tuple[float, int]] = []
        if silent:
            self.model = DistributedDataParallel(
                bare, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=config.distributed.bucket_mib
            )
            self.model.register_comm_hook(None, self._note)
        else:
            self.model = group.wrap(bare)

    def _note(self, _state, bucket):  # torch refuses annotations that are strings, as all are in this module
        buffer = bucket.buffer()
        if self.dtype != buffer.dtype:
            sent = (buffer / self.group.world_size).to(self.dtype)
            self._ready.append((time.perf_counter(), sent.nbytes))
            buffer.copy_(sent)
        else:
            buffer.div_(self.group.world_size)
            self._ready.append((time.perf_counter(), buffer.nbytes))
        done = torch.futures.Future()
        done.set_result(buffer)
        return done

    def passes(self, fields: int) -> None:
        """Run the forward and the backward pass of `fields` fields. Raises LostRank."""
        images, labels = self.data[fields]
        self._ready = []
        with self.kernels.autocast():
            logits = self.model(images)
        loss = self.objective.loss(logits, labels)
        if self.silent:  # which one rank may do alone
            loss.backward()
        else:
            self.group.guard("averaging of the gradients", loss.backward)

    def step(self, fields: int, together: bool = True) -> Timeline:
        """Take one training step as `training.loop.train_step` does and return this rank's times; `together` false: without the ranks' agreement."""
        begun = time.perf_counter()
        self.passes(fields)
        backward_s = time.perf_counter() - begun
        gradient_norm(self.model)
        if together:
            self.group.all_gather(torch.zeros(9, dtype=torch.float64))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        step_s = time.perf_counter() - begun
        return Timeline(step_s, backward_s, tuple(at - begun for at, _ in self._ready), tuple(size for _, size in self._ready))

    def loaded_pass(self, fields: int, chunk: torch.Tensor) -> tuple[float, float]:
        """Run both passes of a silent workload while a thread all_reduces `chunk`, zeros, again and again.

        Return the passes' seconds, and how many all_reduces were done in them, parts counted. The chunk's first element tells all ranks at once
        that one of them has finished, so all stop after the same all_reduce.
        """
        finished, sent = threading.Event(), []

        def load() -> None:
            chunk.zero_()
            while chunk[0] == 0:
                chunk[0] = float(finished.is_set())
                begun = time.perf_counter()
                dist.all_reduce(chunk, group=self.group.gradient_group)
                sent.append((begun, time.perf_counter()))

        self.group.all_reduce(torch.zeros(1))
        with ThreadPoolExecutor(1) as thread:
            loading = thread.submit(load)
            begun = time.perf_counter()
            try:
                self.passes(fields)
            finally:
                end = time.perf_counter()
                finished.set()
            self.group.guard("all_reduce", loading.result)
        self.optimizer.zero_grad(set_to_none=True)
        return end - begun, sum(min(1.0, max(0.0, (end - first) / (last - first))) for first, last in sent)


def choose_backend(config: BenchScaleCommand, group: Group) -> None:
    """Let the group choose its backend, where that is left to it, by the network with the largest parameter."""
    rows, columns = config.bench.image_px
    models = [build_model(ModelConfig(name=name), CHANNELS, CLASSES, (rows, columns)) for name in config.bench.models]
    group.choose_backend(max(models, key=lambda model: max(parameter.numel() for parameter in model.parameters())))


def slowest(timeline: Timeline, group: Group) -> Timeline:
    """Return the timeline whose every time is the slowest rank's."""
    own = torch.tensor([timeline.step_s, timeline.backward_s, *timeline.ready_s], dtype=torch.float64)
    step_s, backward_s, *ready = group.all_gather(own).amax(0).tolist()
    return Timeline(step_s, backward_s, tuple(ready), timeline.num_bytes)


def time_all_reduces(sizes: Iterable[int], dtype: torch.dtype, group: Group) -> dict[int, float]:
    """Return the median seconds of an all_reduce of each size (bytes) up to the first that would take longer than `LONGEST_CALL_S`."""
    found: dict[int, float] = {}
    for size in sorted(set(sizes)):
        if len(found) > 1 and found[max(found)] * size / max(found) > LONGEST_CALL_S:
            break
        buffer = torch.zeros(size // dtype.itemsize, dtype=dtype)
        times: list[float] = []
        group.all_reduce(torch.zeros(1))
        while not times or (len(times) < 20 and sum(times) < SIZE_SPAN_S):
            begun = time.perf_counter()
            group.guard("all_reduce", lambda buffer=buffer: dist.all_reduce(buffer, group=group.gradient_group))
            times.append(group.largest(time.perf_counter() - begun))
        found[size] = statistics.median(times)
    return found


def measure_overlap(workload: Workload, fields: int, undisturbed_s: float, all_reduces: Mapping[int, float]) -> Overlap:
    """Return the rates of computing and communicating while both go on, against each alone.

    `undisturbed_s` is what both passes take alone, `all_reduces` seconds by size. The chunk sent is the largest of `SIZES` of which a pass holds
    eight, or else the smallest.
    """
    size = max((s for s in SIZES if all_reduces.get(s, undisturbed_s) < undisturbed_s / 8), default=min(SIZES))
    seconds, chunks = workload.loaded_pass(fields, torch.zeros(size // workload.dtype.itemsize, dtype=workload.dtype))
    group = workload.group
    seconds, chunks = group.largest(seconds), group.largest(chunks)
    compute, communication = undisturbed_s / seconds, chunks * all_reduces[size] / seconds
    return Overlap(min(1.0, max(SLOWEST_RATE, compute)), min(1.0, max(SLOWEST_RATE, communication)))
