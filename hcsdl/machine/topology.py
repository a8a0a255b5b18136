"""The part of a machine this process may use: physical cores, NUMA nodes, CPU quota, memory.

In: /proc and /sys under a root folder (the real one, or a test's). Out: a `Machine`. Promised: SMT siblings are one core; a CPU that is
offline or outside this process's affinity mask does not count; a kernel without NUMA is one node.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from hcsdl.machine.cgroup import cpu_quota, memory_limit


@dataclass(frozen=True)
class Core:
    """A physical core: the numbers of those of its SMT siblings that may be used, and its NUMA node."""

    cpus: tuple[int, ...]
    node: int


@dataclass(frozen=True)
class Machine:
    """What may be used here. Cores are in the order of their NUMA nodes; `quota` is in cores, infinity for none."""

    cores: tuple[Core, ...]
    quota: float
    memory_bytes: int

    @property
    def nodes(self) -> tuple[int, ...]:
        """The NUMA nodes that hold a usable core."""
        return tuple(sorted({core.node for core in self.cores}))

    @property
    def usable_cores(self) -> int:
        """How many cores' worth of time there is: the physical cores, or the quota, rounded up, where it is less."""
        return max(1, math.ceil(min(len(self.cores), self.quota)))

    @property
    def limited(self) -> bool:
        """Whether a quota gives less than the cores that are seen: then they are shared with others, and which of them are free is unknown."""
        return self.quota < len(self.cores)


def read_machine(root: Path = Path("/")) -> Machine:
    """Return what this process may use of the machine described under `root`."""
    cpus = root / "sys/devices/system/cpu"
    status = (root / "proc/self/status").read_text()
    allowed = parse_list(_field(status, "Cpus_allowed_list"))
    online = cpus / "online"
    usable = allowed & parse_list(online.read_text()) if online.exists() else allowed
    node_of = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        node_of |= dict.fromkeys(parse_list((folder / "cpulist").read_text()), int(folder.name.removeprefix("node")))
    siblings = {tuple(sorted(_siblings(cpus / f"cpu{cpu}/topology", cpu) & usable)) for cpu in usable}
    cores = sorted((Core(group, node_of.get(group[0], 0)) for group in siblings), key=lambda core: (core.node, core.cpus))
    total = int(_field((root / "proc/meminfo").read_text(), "MemTotal").split()[0]) * 1024
    return Machine(tuple(cores), cpu_quota(root), int(min(total, memory_limit(root))))


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{name}:\s*(.*)$", text, re.M)
    return found.group(1) if found else ""


def _siblings(topology: Path, cpu: int) -> set[int]:
    try:
        return parse_list((topology / "thread_siblings_list").read_text()) | {cpu}
    except OSError:
        return {cpu}


def parse_list(text: str) -> set[int]:
    """Return the numbers in the kernel's list format: `0-3,8` is 0, 1, 2, 3, 8."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if part:
            low, _, high = part.partition("-")
            numbers |= set(range(int(low), int(high or low) + 1))
    return numbers


def format_list(numbers: set[int]) -> str:
    """Return numbers in the kernel's list format."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
