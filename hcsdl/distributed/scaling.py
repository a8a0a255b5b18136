"""Formulas: what a collective costs, and what a training step costs on another number of nodes. Pure arithmetic: no torch, no clock.

A step of synchronous data parallelism takes

    step = step without communication + what the communication of the gradients adds,

and the second part comes from a simulation of one step (`exposed_s`), because communication overlaps with the backward pass: gradients are
averaged bucket by bucket, each as soon as it is complete on every rank, one after the other (Li et al. 2020, arXiv:2006.15704, section 3.2).
It needs when each bucket is ready, what its all_reduce takes, and how much computing and communicating hold each other up.

An all_reduce of S bytes over n peers in a ring takes 2(n-1) steps of latency α and moves 2(n-1)/n · S bytes over every link of β bytes/s:

    ring = 2(n-1) · α + 2(n-1)/n · S / β

(Thakur, Rabenseifner, Gropp 2005, IJHPCA 19(1), on long messages; Patarasuk and Yuan 2009, JPDC 69(2), who show that no all_reduce moves less).
Ranks of one node share its link, so with several to a node the all_reduce is counted as one among the
node's ranks followed by one between the nodes, S bytes through each link however many ranks are behind it (hierarchical all_reduce; a ring
that visits the nodes in order crosses each link as often).

Left out: the all_reduce of 40 bytes in which the ranks agree on a step, stragglers beyond those in the measured steps, and contention in switches.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

AllReduce = Callable[[float], float]
"""Bytes → seconds."""


def bus_bandwidth(operation: str, num_bytes: float, seconds: float, ranks: int) -> float:
    """Return the bus bandwidth of a collective in bytes/s: what each rank's link carries, comparable over operations and rank numbers.

    As nccl-tests defines it (NVIDIA/nccl-tests, doc/PERFORMANCE.md): size / time times 2(n-1)/n for all_reduce, (n-1)/n for all_gather, whose
    size is that of every rank's output, and 1 for broadcast.
    """
    factor = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": (ranks - 1) / ranks, "broadcast": 1.0}[operation]
    return factor * num_bytes / seconds


def ring_s(num_bytes: float, peers: int, latency_s: float, bytes_per_s: float) -> float:
    """Return the seconds of a ring all_reduce of `num_bytes` over `peers` peers; 0 for one. The formula and its sources stand above."""
    return 2 * (peers - 1) * latency_s + 2 * (peers - 1) / peers * num_bytes / bytes_per_s


def measured_s(sizes: Sequence[float], seconds: Sequence[float]) -> AllReduce:
    """Return the all_reduce that measured `seconds` at ascending `sizes` (bytes, at least two) describe.

    Linear between the sizes; as quick as the smallest below it; beyond the largest, its time grown in proportion less the smallest's, the latency.
    """

    def all_reduce_s(num_bytes: float) -> float:
        if num_bytes <= sizes[0]:
            return seconds[0]
        if num_bytes >= sizes[-1]:
            return seconds[0] + (seconds[-1] - seconds[0]) * (num_bytes - sizes[0]) / (sizes[-1] - sizes[0])
        right = bisect.bisect_right(sizes, num_bytes)
        left = right - 1
        return seconds[left] + (seconds[right] - seconds[left]) * (num_bytes - sizes[left]) / (sizes[right] - sizes[left])

    return all_reduce_s


def on_peers(all_reduce_s: AllReduce, measured: int, wanted: int) -> AllReduce:
    """Return the all_reduce over `wanted` peers of one that was measured over `measured` (at least 2), by the ring's formula.

    The time of one byte is taken for latency and grows as n-1; the rest grows as (n-1)/n.
    """
    latency, volume = (wanted - 1) / (measured - 1), (wanted - 1) / wanted * measured / (measured - 1)
    return lambda num_bytes: latency * all_reduce_s(1) + volume * (all_reduce_s(num_bytes) - all_reduce_s(1))


def hierarchical(within: AllReduce | None, between: AllReduce | None) -> AllReduce:
    """Return the all_reduce within each node followed by that between the nodes; None for a part with a single peer."""
    return lambda num_bytes: sum(part(num_bytes) for part in (within, between) if part is not None)


@dataclass(frozen=True)
class Overlap:
    """How fast the backward pass and the communication go on while both do, against each alone: 1 is undisturbed."""

    compute_rate: float
    communication_rate: float

    def with_cores(self, measured: int, wanted: int) -> Overlap:
        """Return what is left of the disturbance on `wanted` cores a rank where it was measured on `measured`.

        Communication is taken to keep a fixed number of cores busy, so the more there are, the smaller its share; on fewer it stays as measured.
        """
        share = min(1.0, measured / wanted)
        return Overlap(1 - (1 - self.compute_rate) * share, 1 - (1 - self.communication_rate) * share)


@dataclass(frozen=True)
class Timeline:
    """One training step without communication, in seconds from its start.

    Attributes
    ----------
    step_s : its end.
    backward_s : end of the backward pass.
    ready_s : when each gradient bucket is complete, in the order in which they are sent.
    num_bytes : what is sent of each bucket.
    """

    step_s: float
    backward_s: float
    ready_s: tuple[float, ...]
    num_bytes: tuple[int, ...]

    def times(self, factor: float) -> Timeline:
        """Return the same step at another speed."""
        return Timeline(self.step_s * factor, self.backward_s * factor, tuple(r * factor for r in self.ready_s), self.num_bytes)


def median_timeline(timelines: Sequence[Timeline]) -> Timeline:
    """Return the timeline whose every time is the median of all; their buckets are the same."""
    return Timeline(
        statistics.median(one.step_s for one in timelines),
        statistics.median(one.backward_s for one in timelines),
        tuple(statistics.median(ready) for ready in zip(*(one.ready_s for one in timelines), strict=True)),
        timelines[0].num_bytes,
    )


def at_mini_batch(measured: Mapping[int, Timeline], wanted: int) -> Timeline:
    """Return the step with mini-batches of `wanted` fields: as measured, else on the line through the smallest and the largest measured.

    Time is affine in the fields: the optimizer's and the fixed costs of each layer, and a part for each field. Raises ValueError where one
    size only was measured, and it is another.
    """
    if wanted in measured:
        return measured[wanted]
    low, high = min(measured), max(measured)
    if low == high:
        raise ValueError(f"two mini-batch sizes must be measured to predict a third. Measured {low}, wanted {wanted}.")
    share = (wanted - low) / (high - low)
    one, other = measured[low], measured[high]

    def line(a: float, b: float) -> float:
        return max(0.0, a + share * (b - a))

    ready = tuple(line(a, b) for a, b in zip(one.ready_s, other.ready_s, strict=True))
    return Timeline(line(one.step_s, other.step_s), line(one.backward_s, other.backward_s), ready, one.num_bytes)


def exposed_s(timeline: Timeline, all_reduce_s: AllReduce, overlap: Overlap) -> float:
    """Return by how many seconds communication lengthens a step.

    The step is played through from event to event. Bucket k can be sent when the backward pass has come to `ready_s[k]` and bucket k-1 has been
    sent. While the backward pass goes on and a bucket is on its way, the first advances at `compute_rate` and the second at
    `communication_rate`; alone, each at its full rate. The optimizer waits for both.
    """
    jobs = [(min(ready, timeline.backward_s), all_reduce_s(size)) for ready, size in zip(timeline.ready_s, timeline.num_bytes, strict=True)]
    now = done = 0.0  # seconds passed, and seconds of undisturbed computing done
    for ready, work in jobs:
        if done < ready:  # nothing to send: compute alone
            now, done = now + ready - done, ready
        left = timeline.backward_s - done
        together = min(left / overlap.compute_rate, work / overlap.communication_rate)
        done = min(timeline.backward_s, done + together * overlap.compute_rate)
        now += together + max(0.0, work - together * overlap.communication_rate)
    return now + (timeline.backward_s - done) - timeline.backward_s


@dataclass(frozen=True)
class Prediction:
    """A predicted training step: seconds, of them added by communication, and images/s of all ranks."""

    step_s: float
    exposed_s: float
    images_per_s: float

    @property
    def efficiency(self) -> float:
        """Return the speed against ranks that never wait for communication."""
        return 1 - self.exposed_s / self.step_s


def predict(timeline: Timeline, all_reduce_s: AllReduce | None, overlap: Overlap, ranks: int, mini_batch: int) -> Prediction:
    """Return the step of `ranks` ranks with `mini_batch` fields each; `all_reduce_s` None: one rank, which has nobody to talk to."""
    exposed = exposed_s(timeline, all_reduce_s, overlap) if all_reduce_s is not None else 0.0
    step_s = timeline.step_s + exposed
    return Prediction(step_s, exposed, ranks * mini_batch / step_s)
