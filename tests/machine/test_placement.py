"""Where ranks are put, on machines made of files."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hcsdl.config import ConfigError, MachineConfig
from hcsdl.machine.placement import Place, default_ranks, plan_places
from hcsdl.machine.topology import Machine, read_machine
from tests.machine import trees

pytestmark = pytest.mark.xeon_only


def first_cpus(place: Place) -> list[int]:
    return [core.cpus[0] for core in place.cores]


def test_xeon_a_rank_in_each_numa_node(tmp_path: Path) -> None:
    found = read_machine(trees.xeon(tmp_path))
    places = plan_places(found, default_ranks(found), MachineConfig())
    assert [place.node for place in places] == [0, 1, 2, 3]
    assert [first_cpus(place) for place in places] == [list(range(10 * n, 10 * n + 10)) for n in range(4)]
    assert all(place.threads == 10 and not place.spare for place in places)
    assert places[1].cpus == {*range(10, 20), *range(50, 60)}, "loader threads may use the siblings"


def test_spare_cores_are_the_last_of_each_node(tmp_path: Path) -> None:
    places = plan_places(read_machine(trees.xeon(tmp_path)), 4, MachineConfig(spare_cores=2))
    assert all(place.threads == 8 for place in places)
    assert [[core.cpus[0] for core in place.spare] for place in places] == [[8, 9], [18, 19], [28, 29], [38, 39]]


def test_desktop_two_ranks_on_one_node(tmp_path: Path) -> None:
    found = read_machine(trees.desktop(tmp_path))
    assert default_ranks(found) == 2
    assert [first_cpus(place) for place in plan_places(found, 2, MachineConfig())] == [[0, 2, 4, 6], [8, 10, 12, 14]]


def test_two_cores(tmp_path: Path) -> None:
    found = read_machine(trees.two_cores(tmp_path))
    assert default_ranks(found) == 2 and default_ranks(found, spare_cores=1) == 1
    assert [(place.threads, place.cpus) for place in plan_places(found, 2, MachineConfig())] == [(1, {0}), (1, {1})]
    with pytest.raises(ConfigError, match=r"machine.spare_cores must leave cores.*Got 2 for each of 1 NUMA nodes, and 2 cores"):
        plan_places(found, 1, MachineConfig(spare_cores=2))


def test_a_core_that_does_not_divide_is_spare_to_all(tmp_path: Path) -> None:
    places = plan_places(read_machine(trees.machine(tmp_path, [[[cpu] for cpu in range(7)]])), 2, MachineConfig())
    assert [(place.threads, first_cpus(place), place.cpus) for place in places] == [
        (3, [0, 1, 2], {0, 1, 2, 6}),
        (3, [3, 4, 5], {3, 4, 5, 6}),
    ]


def test_more_ranks_than_cores_share_them(tmp_path: Path) -> None:
    places = plan_places(read_machine(trees.two_cores(tmp_path)), 5, MachineConfig())
    assert [(place.threads, place.cpus) for place in places] == [(1, {0}), (1, {1}), (1, {0}), (1, {1}), (1, {0})]


def test_under_a_quota_nobody_is_bound(tmp_path: Path) -> None:
    """Other containers see the same cores: all would be bound to the first of them."""
    found = read_machine(trees.write(trees.xeon(tmp_path), {"sys/fs/cgroup/cpu.max": "600000 100000"}))
    assert default_ranks(found) == 2, "nodes mean nothing to threads that may run anywhere"
    places = plan_places(found, 2, MachineConfig())
    assert all(place.threads == 3 and not place.bound and len(place.cpus) == 80 for place in places)
    assert plan_places(found, 2, MachineConfig(spare_cores=2))[0].threads == 2
    with pytest.raises(ConfigError, match="machine.spare_cores"):
        plan_places(found, 1, MachineConfig(spare_cores=6))


def test_a_node_of_which_little_is_left_gets_no_rank(tmp_path: Path) -> None:
    found = read_machine(trees.xeon(tmp_path, allowed={0, *range(10, 20)}))
    assert [first_cpus(place) for place in plan_places(found, 2, MachineConfig())] == [list(range(10, 15)), list(range(15, 20))]


def test_fewer_ranks_than_nodes_span_nodes(tmp_path: Path) -> None:
    found = read_machine(trees.xeon(tmp_path))
    assert [(place.threads, place.node) for place in plan_places(found, 2, MachineConfig())] == [(20, None)] * 2
    assert [place.threads for place in plan_places(found, 3, MachineConfig())] == [13] * 3


def test_the_slowest_rank_sets_the_threads_and_the_rest_is_spare(tmp_path: Path) -> None:
    found = read_machine(trees.xeon(tmp_path, allowed=set(range(26))))  # nodes of 10, 10 and 6 cores
    places = plan_places(found, 3, MachineConfig())
    assert [place.threads for place in places] == [6] * 3
    assert [len(place.spare) for place in places] == [4, 4, 0]


def test_fewer_threads_than_cores_leave_the_rank_its_whole_share(tmp_path: Path) -> None:
    places = plan_places(read_machine(trees.xeon(tmp_path)), 4, MachineConfig(threads_per_rank=3))
    assert all(place.threads == 3 and len(place.cores) == 10 for place in places)


def test_pin_false_binds_nobody(tmp_path: Path) -> None:
    assert not any(place.bound for place in plan_places(read_machine(trees.xeon(tmp_path)), 4, MachineConfig(pin=False)))


def check(found: Machine, ranks: int, spare: int) -> None:
    """Equal threads, a core for each, no core for two ranks, none computing on a spare core, each rank in one node where there are enough."""
    places = plan_places(found, ranks, MachineConfig(spare_cores=spare))
    assert len(places) == ranks and len({place.threads for place in places}) == 1
    used = list(itertools.chain.from_iterable(place.cores for place in places))
    assert all(place.threads == len(place.cores) for place in places)
    assert len(used) == len(set(used))
    assert not {core for place in places for core in place.spare} & set(used)
    if ranks >= len(found.nodes):
        assert all(place.node is not None for place in places)


def test_any_machine_keeps_the_promises(tmp_path: Path) -> None:
    for number, sizes in enumerate([(4,), (7,), (4, 4), (8, 3), (5, 5, 5), (6, 6, 6, 6), (2, 9, 9, 1)]):
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        found = read_machine(
            trees.machine(tmp_path / str(number), [[[s + i] for i in range(n)] for s, n in zip(starts, sizes, strict=True)])
        )
        for spare in (0, 1):
            for ranks in range(1, sum(max(0, size - spare) for size in sizes) // 2):
                check(found, ranks, spare)
