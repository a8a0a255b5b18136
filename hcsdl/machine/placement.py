"""Which rank runs where: a `Machine` and the number of ranks → one `Place` a rank. Computes only; `binding` makes it so.

Ranks are laid into NUMA nodes so that each has the memory next to it; all get the same number of compute threads, one a physical core, for the
slowest rank sets the pace. What is left over in a node (machine.spare_cores, and what does not divide) is for the loader and communication
threads of its ranks. SMT siblings compute nothing: a second compute thread on a core takes the first one's vector units; a loader thread that
decodes there disturbs less than one that takes the compute thread's turn, so a rank's loader threads may use all siblings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hcsdl.config import ConfigError, MachineConfig
from hcsdl.machine.topology import Core, Machine, format_list


@dataclass(frozen=True)
class Place:
    """One rank's `threads` compute threads run on `cores`, its other threads there and on `spare`.

    With `bound` the rank is kept there; else only the number of threads is its own.
    """

    threads: int
    cores: tuple[Core, ...]
    spare: tuple[Core, ...] = ()
    bound: bool = True

    @property
    def cpus(self) -> set[int]:
        """Every CPU the rank's threads may run on."""
        return {cpu for core in self.cores + self.spare for cpu in core.cpus}

    @property
    def node(self) -> int | None:
        """The NUMA node of all compute threads; None where they are spread over several."""
        nodes = {core.node for core in self.cores}
        return nodes.pop() if len(nodes) == 1 else None

    def __str__(self) -> str:
        where = f"NUMA node {self.node}" if self.node is not None else f"NUMA nodes {format_list({c.node for c in self.cores})}"
        aside = f", kept aside {format_list({cpu for core in self.spare for cpu in core.cpus})}" if self.spare else ""
        cpus = format_list({cpu for core in self.cores for cpu in core.cpus})
        return f"{self.threads} thread{'s' * (self.threads > 1)} on CPUs {cpus}{aside}, {where}{'' if self.bound else ', not bound'}"


def default_ranks(machine: Machine, spare_cores: int = 0) -> int:
    """Return the ranks to start on a machine: one a NUMA node with usable cores, and two where there is one node of several cores.

    On one node neither one rank nor two is faster for every network (measured, see BENCHMARKS.md); two show on any machine what a cluster does.
    Where a quota is less than the cores that are seen, nodes mean nothing.
    """
    if machine.limited:
        return min(2, max(1, machine.usable_cores - spare_cores))
    return max(len(machine.nodes), min(2, len(machine.cores) - spare_cores))


def plan_places(machine: Machine, ranks: int, config: MachineConfig) -> tuple[Place, ...]:
    """Return a place for each of `ranks` ranks. Raises ConfigError where machine.spare_cores leaves no core to compute on.

    As many ranks as NUMA nodes or more: each node gets its share of them by its number of cores, and no rank spans two nodes. Fewer: ranks span
    nodes. More ranks than cores: they share cores.
    """
    if machine.limited:
        cores = machine.usable_cores - config.spare_cores
        _check_spare(cores, machine, config)
        return (Place(config.threads_per_rank or max(1, cores // ranks), machine.cores, bound=False),) * ranks
    kept, spare = [], []
    for node in machine.nodes:
        cores = [core for core in machine.cores if core.node == node]
        split = max(0, len(cores) - config.spare_cores)
        kept.append(cores[:split])
        spare += cores[split:]
    _check_spare(sum(map(len, kept)), machine, config)
    pools = kept if ranks >= len(kept) else [[core for cores in kept for core in cores]]
    shares = []
    for pool, count in zip(pools, _apportion([len(pool) for pool in pools], ranks), strict=True):
        each = len(pool) // count if count else 0
        shares += [pool[i * each : (i + 1) * each] or [pool[i % len(pool)]] for i in range(count)]
        spare += pool[max(1, each) * count :] if count else pool
    threads = config.threads_per_rank or min(map(len, shares))
    places = []
    for share in shares:
        own = share if config.threads_per_rank else share[:threads]
        near = share[len(own) :] + [core for core in spare if core.node in {c.node for c in share}]
        places.append(Place(threads, tuple(own), tuple(near), config.pin))
    return tuple(places)


def _check_spare(left: int, machine: Machine, config: MachineConfig) -> None:
    if left < 1:
        raise ConfigError(
            f"machine.spare_cores must leave cores to compute on. Got {config.spare_cores} for each of {len(machine.nodes)} NUMA nodes, "
            f"and {machine.usable_cores} cores can be used in all."
        )


def _apportion(sizes: Sequence[int], ranks: int) -> list[int]:
    """Return how many of `ranks` go to pools of these sizes, each next one to the pool with most cores a rank if it went there."""
    counts = [0] * len(sizes)
    for _ in range(ranks):
        best = max(range(len(sizes)), key=lambda i: sizes[i] / (counts[i] + 1))
        counts[best] += 1
    return counts
