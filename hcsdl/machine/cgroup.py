"""What the control groups this process is in leave it, CPU quota and memory limit, and whom the kernel ended for want of memory.

In: /proc/self/cgroup and mountinfo under a root folder (the real one, or a test's). Out: plain numbers, infinity where nothing is limited.
Version 2, version 1 and both at once are read; a limit counts wherever on the way from the process's own group up to the mount it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

UNLIMITED_BYTES = 2**60  # version 1 writes a number near 2^63 for "no limit"


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the smallest CPU quota of this process's control groups, in cores; infinity without one."""
    return min((_quota(version, folder) for version, folder in _folders(root, "cpu")), default=math.inf)


def memory_limit(root: Path = Path("/")) -> float:
    """Return the smallest memory limit of this process's control groups, in bytes; infinity without one."""
    return min((_limit(version, folder) for version, folder in _folders(root, "memory")), default=math.inf)


def out_of_memory_kills(root: Path = Path("/")) -> int:
    """Return how many processes of this process's own control group the kernel has ended for want of memory; 0 where that is not told."""
    for version, folder in _folders(root, "memory"):
        for line in _text(folder / ("memory.events" if version == 2 else "memory.oom_control")).splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def _quota(version: int, folder: Path) -> float:
    if version == 2:
        quota, _, period = _text(folder / "cpu.max").partition(" ")
    else:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else math.inf  # "max", "-1": none


def _limit(version: int, folder: Path) -> float:
    limit = _text(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
    return int(limit) if limit.isdigit() and int(limit) < UNLIMITED_BYTES else math.inf


def _folders(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of each control group with `controller` that holds this process, from its own up to where it is mounted."""
    own = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        own |= dict.fromkeys(names.split(","), path)  # version 2 has the empty name
    for line in _text(root / "proc/self/mountinfo").splitlines():
        words = line.split()
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        if kind == "cgroup2":
            version, path = 2, own.get("")
        elif kind == "cgroup" and controller in options:
            version, path = 1, own.get(controller)
        else:
            continue
        if path is None:
            continue
        mounted, top = Path(words[3]), root / words[4].lstrip("/")
        inside = Path(path).relative_to(mounted) if Path(path).is_relative_to(mounted) else Path()
        if ".." in inside.parts:  # a group outside this namespace: only the mount can be seen
            inside = Path()
        yield from ((version, top / step) for step in (inside, *inside.parents))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
