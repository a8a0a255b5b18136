"""Which cores, NUMA nodes, quotas and memory a process has, read from other machines' /proc and /sys."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from hcsdl.machine.cgroup import out_of_memory_kills
from hcsdl.machine.topology import Core, format_list, parse_list, read_machine
from tests.machine import trees

pytestmark = pytest.mark.xeon_only
GIB = 2**30


def test_xeon_of_two_sockets_and_four_nodes(tmp_path: Path) -> None:
    found = read_machine(trees.xeon(tmp_path))
    assert found.usable_cores == 40 and found.nodes == (0, 1, 2, 3)
    assert found.cores[0] == Core((0, 40), 0) and found.cores[-1] == Core((39, 79), 3)
    assert found.memory_bytes == 128 * GIB and found.quota == math.inf and not found.limited


def test_smt_siblings_of_a_desktop_are_one_core(tmp_path: Path) -> None:
    found = read_machine(trees.desktop(tmp_path))
    assert found.usable_cores == 8 and found.cores[1] == Core((2, 3), 0)


def test_cpus_outside_the_affinity_mask_do_not_count(tmp_path: Path) -> None:
    found = read_machine(trees.xeon(tmp_path, allowed={12, 13, 52, 53, 54}))
    assert found.cores == (Core((12, 52), 1), Core((13, 53), 1), Core((54,), 1))


def test_offline_cpus_do_not_count_even_where_they_are_allowed(tmp_path: Path) -> None:
    found = read_machine(trees.xeon(tmp_path, offline=[*range(40, 80), 5]))
    assert found.usable_cores == 39 and all(len(core.cpus) == 1 for core in found.cores)


def test_a_kernel_without_numa_is_one_node(tmp_path: Path) -> None:
    found = read_machine(trees.machine(tmp_path, [[[0], [1]], [[2], [3]]], numa=False))
    assert found.nodes == (0,) and found.usable_cores == 4


def test_limits_of_nested_groups_of_version_2(tmp_path: Path) -> None:
    root = trees.write(
        trees.xeon(tmp_path),
        {
            "proc/self/cgroup": "0::/slice/pod/container",
            "sys/fs/cgroup/slice/cpu.max": "800000 100000",
            "sys/fs/cgroup/slice/pod/cpu.max": "250000 100000",
            "sys/fs/cgroup/slice/pod/memory.max": str(6 * GIB),
            "sys/fs/cgroup/slice/pod/container/cpu.max": "max 100000",
            "sys/fs/cgroup/slice/pod/container/memory.max": "max",
        },
    )
    found = read_machine(root)
    assert found.quota == 2.5 and found.usable_cores == 3 and found.limited and found.memory_bytes == 6 * GIB


@pytest.mark.parametrize("inside", ["/", "/docker/abc"])
def test_limits_of_version_1_seen_from_the_host_and_from_the_container(tmp_path: Path, inside: str) -> None:
    """A container's mount begins at its own group, though the path in /proc/self/cgroup is the host's."""
    own = "/docker/abc/inner".removeprefix(inside.rstrip("/")).lstrip("/")
    outer = own.removesuffix("inner").rstrip("/")
    root = trees.write(
        trees.xeon(tmp_path),
        {
            "proc/self/cgroup": "5:memory:/docker/abc/inner\n4:cpu,cpuacct:/docker/abc/inner\n1:name=systemd:/",
            "proc/self/mountinfo": trees.V1.format(inside=inside),
            f"sys/fs/cgroup/cpu,cpuacct/{outer}/cpu.cfs_quota_us": "400000",
            f"sys/fs/cgroup/cpu,cpuacct/{outer}/cpu.cfs_period_us": "100000",
            f"sys/fs/cgroup/cpu,cpuacct/{own}/cpu.cfs_quota_us": "-1",
            f"sys/fs/cgroup/cpu,cpuacct/{own}/cpu.cfs_period_us": "100000",
            f"sys/fs/cgroup/memory/{own}/memory.limit_in_bytes": str(3 * GIB),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    found = read_machine(root)
    assert found.quota == 4 and found.memory_bytes == 3 * GIB


def test_a_group_outside_the_namespace_shows_the_limits_of_the_mount(tmp_path: Path) -> None:
    limits = {"sys/fs/cgroup/cpu.max": "100000 100000", "sys/fs/other/cpu.max": "50000 100000"}
    root = trees.write(trees.two_cores(tmp_path), {"proc/self/cgroup": "0::/../other"} | limits)
    assert read_machine(root).quota == 1


def test_kernel_lists_are_read_and_written() -> None:
    assert parse_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11} and parse_list("") == set()
    assert format_list({11, 0, 1, 2, 3, 8, 10}) == "0-3,8,10-11"


def test_this_machine_follows_the_affinity_mask() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert {cpu for core in read_machine().cores for cpu in core.cpus} == {min(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)
    assert {cpu for core in read_machine().cores for cpu in core.cpus} == allowed


def test_kills_for_want_of_memory_are_those_of_the_own_group(tmp_path: Path) -> None:
    newer = {
        "proc/self/cgroup": "0::/slice/job",
        "proc/self/mountinfo": trees.V2,
        "sys/fs/cgroup/slice/memory.events": "oom_kill 7",
        "sys/fs/cgroup/slice/job/memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0",
    }
    older = {
        "proc/self/cgroup": "5:memory:/job",
        "proc/self/mountinfo": trees.V1.format(inside="/"),
        "sys/fs/cgroup/memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4",
    }
    assert out_of_memory_kills(trees.write(tmp_path / "2", newer)) == 2
    assert out_of_memory_kills(trees.write(tmp_path / "1", older)) == 4
    assert out_of_memory_kills(tmp_path / "none") == 0
