"""Machines made of files: what /proc and /sys of another machine would hold, under a folder of the test's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hcsdl.machine.topology import format_list

V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 {inside} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {inside} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def write(root: Path, files: dict[str, str]) -> Path:
    """Write `files`, {path below root: text}; return `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def machine(
    root: Path, nodes: Sequence[Sequence[Sequence[int]]], *, allowed: set[int] | None = None, offline: Sequence[int] = (), numa: bool = True
) -> Path:
    """Write a machine of NUMA `nodes`, each a list of cores, each a list of its SMT siblings; 128 GiB. CPUs in `offline` are switched off."""
    cpus = {cpu for cores in nodes for core in cores for cpu in core}
    online = cpus - set(offline)
    files = {
        "proc/self/status": f"Name:\tpython\nCpus_allowed:\tff\nCpus_allowed_list:\t{format_list(allowed or cpus)}",
        "proc/meminfo": f"MemTotal:       {128 * 2**20} kB\nMemFree: 1 kB",
        "proc/self/cgroup": "0::/",
        "proc/self/mountinfo": V2,
        "sys/devices/system/cpu/online": format_list(online),
    }
    for number, cores in enumerate(nodes):
        if numa:
            files[f"sys/devices/system/node/node{number}/cpulist"] = format_list({cpu for core in cores for cpu in core} & online)
        for core in cores:
            for cpu in set(core) & online:
                files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = format_list(set(core) & online)
    return write(root, files)


def xeon(root: Path, **options: object) -> Path:
    """Two sockets of 20 cores with SMT, two NUMA nodes each; CPU n and n + 40 are one core."""
    return machine(root, [[[cpu, cpu + 40] for cpu in range(10 * n, 10 * n + 10)] for n in range(4)], **options)  # type: ignore[arg-type]


def desktop(root: Path) -> Path:
    """Eight cores with SMT in one node; CPU 2n and 2n + 1 are one core."""
    return machine(root, [[[2 * n, 2 * n + 1] for n in range(8)]])


def two_cores(root: Path) -> Path:
    """A virtual machine of two cores."""
    return machine(root, [[[0], [1]]])
