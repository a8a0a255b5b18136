"""Which cores this process may use, and what they can do. Read from the kernel (/proc, /sys), never from torch."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

BF16_FLAGS = ("amx_bf16", "avx512_bf16")


def usable_cores() -> int:
    """Return how many physical cores this process may use: its affinity, SMT siblings counted once, and the cgroup's CPU quota."""
    allowed = os.sched_getaffinity(0)
    physical = {_siblings(cpu) for cpu in allowed}
    return max(1, math.ceil(min(len(physical), _cgroup_quota())))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_quota() -> float:
    """Return the CPU limit of this process's cgroup (version 2, then 1) in cores; infinity without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text())
        return math.inf if quota <= 0 else quota / int(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return math.inf


def numa_nodes() -> int:
    """Return how many NUMA nodes hold a core this process may use."""
    allowed = os.sched_getaffinity(0)
    nodes = [p for p in Path("/sys/devices/system/node").glob("node[0-9]*") if _cpus(p / "cpulist") & allowed]
    return max(1, len(nodes))


def _cpus(path: Path) -> set[int]:
    cpus: set[int] = set()
    for part in path.read_text().strip().split(","):
        if part:
            low, _, high = part.partition("-")
            cpus |= set(range(int(low), int(high or low) + 1))
    return cpus


def processor() -> str:
    """Return the processor's name and the bf16 instruction sets it has, e.g. `AMD EPYC (AVX512_BF16)`."""
    info = _cpuinfo()
    name = re.search(r"^model name\s*:\s*(.*)$", info, re.M)
    return f"{name.group(1).strip() if name else 'unknown processor'} ({', '.join(f.upper() for f in bf16_flags()) or 'no bf16'})"


def bf16_flags() -> list[str]:
    """Return which of AMX_BF16 and AVX512_BF16 this processor has, as the kernel spells them."""
    flags = re.search(r"^flags\s*:\s*(.*)$", _cpuinfo(), re.M)
    return [f for f in BF16_FLAGS if flags and f in flags.group(1).split()]


def _cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text().split("\n\n")[0]


def default_ranks(cores: int, nodes: int) -> int:
    """Return the ranks to start on a machine: one a NUMA node, and two where there is one node of several cores."""
    return max(nodes, min(2, cores))
