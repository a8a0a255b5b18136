"""The ccl backend when a peer is killed, what killed processes leave in /dev/shm, and where a group's ranks meet a second time."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hcsdl.distributed import oneccl, segments
from hcsdl.distributed import oneccl_library as library
from hcsdl.distributed.oneccl import settings
from hcsdl.distributed.oneccl.settings import Whereabouts
from tests.distributed.oneccl_ranks import finish, on_ranks, start

LARGE = 2_000_000  # elements: the ranks meet over gloo before


def segments_of(pid: int) -> list[Path]:
    """Return a process's files in /dev/shm."""
    return list(segments.FOLDER.glob(f"{pid}:*"))


# A peer is killed.


def rank_0_is_killed() -> dict:
    """The rank beside the store is killed while the other waits for it."""
    return _killed_in_an_all_reduce(0)


def rank_1_is_killed() -> dict:
    """The other rank is killed while rank 0 waits for it."""
    return _killed_in_an_all_reduce(1)


def _killed_in_an_all_reduce(victim: int) -> dict:
    dist.all_reduce(torch.ones(LARGE))
    had = len(segments_of(os.getpid()))
    if dist.get_rank() == victim:
        time.sleep(2)  # the other has begun by now; where it has not, it hears of it all the same
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    try:
        dist.all_reduce(torch.ones(LARGE))
    except oneccl.CclError as error:
        return {"text": str(error), "seconds": time.monotonic() - begun, "had": had}
    return {}


def test_a_peer_killed_in_a_large_all_reduce_is_named() -> None:
    """Under plain torch the survivor's call raises CclError with the dead rank's name and host within the heartbeat's silence; it ends with code 5."""
    pairs = [start(function, 2) for function in (rank_0_is_killed, rank_1_is_killed)]
    for victim, ranks in enumerate(pairs):
        survivors_pid = ranks[1 - victim].pid
        said = finish(ranks)
        assert said[victim]["code"] == -signal.SIGKILL and said[1 - victim]["code"] == 5, said
        survivor = said[1 - victim]["value"]
        assert f"rank {victim} on {os.uname().nodename}" in survivor["text"], survivor
        assert survivor["seconds"] < 30
        assert survivor["had"] >= 1 and segments_of(survivors_pid) == []


# What killed processes leave behind.


def both_are_killed() -> None:
    """Kill this process once both have what they need from each other."""
    dist.all_reduce(torch.ones(LARGE))
    print("\nI have", len(segments_of(os.getpid())), flush=True)
    dist.barrier()
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def all_reduce() -> float:
    """Do what any run does."""
    tensor = torch.ones(4)
    dist.all_reduce(tensor)
    return tensor[0].item()


def test_the_next_run_removes_what_killed_ranks_left() -> None:
    """Two ranks with segments are killed; after the next two have started, there is nothing left of the first."""
    ranks = start(both_are_killed, 2)
    pids = [rank.pid for rank in ranks]
    for said in finish(ranks):
        assert said["code"] == -signal.SIGKILL and "I have 1" in said["output"]
    assert [one["value"] for one in on_ranks(all_reduce, 2)] == [2.0, 2.0]
    assert [segments_of(pid) for pid in pids] == [[], []]


def test_only_what_nobody_holds_is_removed(tmp_path: Path) -> None:
    """Of a dead process's files all go but what is locked by somebody who lives (in another container, say); a live process's stay, too."""
    dead = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    dead.kill()
    dead.wait()
    free, held, ours, other = (tmp_path / name for name in (f"{dead.pid}:0:0", f"{dead.pid}:0:1", f"{os.getpid()}:0:0", "psm3_shm.1:2"))
    for path in (free, held, ours, other):
        path.write_bytes(b"")
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        segments.remove_stale(tmp_path)
    assert not free.exists() and held.exists() and ours.exists() and other.exists()
    segments.remove_stale(tmp_path)
    assert not held.exists()


# How a group ends, and begins again.


def destroyed_with_an_all_reduce_pending() -> list:
    """Rank 1 comes late to an all_reduce after which both destroy the group at once."""
    tensor = torch.ones(LARGE)
    if dist.get_rank() == 1:
        time.sleep(1)
    work = dist.all_reduce(tensor, async_op=True)
    dist.destroy_process_group()
    return [str(work.exception()), tensor[-1].item()]


def test_what_was_issued_before_the_end_is_done() -> None:
    """`destroy_process_group` lets a large all_reduce be done that waits for a peer."""
    assert [one["value"] for one in on_ranks(destroyed_with_an_all_reduce_pending, 2)] == [["None", 2.0]] * 2


def rank_0_ends_first() -> str:
    """Rank 0 goes at once; rank 1 has work of its own to do until rank 0's process and the store are long gone."""
    from hcsdl.distributed.oneccl import process_group

    process_group.LEAVE_S = 1.0  # twice in turn: for oneCCL, and for the store
    all_reduce()
    if dist.get_rank() == 1:
        time.sleep(8)
    return "done"


def test_a_rank_may_work_on_after_rank_0_has_ended_in_peace() -> None:
    """Who destroys the group long after its peers ends with code 0, too, and leaves no shared memory behind; nobody is said to be lost."""
    ranks = start(rank_0_ends_first, 2)
    pids = [rank.pid for rank in ranks]
    for said in finish(ranks):
        assert (said["code"], said["value"]) == (0, "done"), said
        assert "lost" not in said["output"]
    assert [segments_of(pid) for pid in pids] == [[], []]


def twice_on_one_store() -> list:
    """Make, use and destroy the group twice on a store that outlives it; rank 0 comes late."""
    rank, outer = dist.get_rank(), dist.distributed_c10d._get_default_store()
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        outer.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(outer.get("port")), is_master=False, wait_for_workers=False)
    dist.destroy_process_group()
    said = []
    for _ in range(2):
        time.sleep(0.5 if rank == 0 else 0)
        dist.init_process_group("ccl", store=store, rank=rank, world_size=2)
        said.append(all_reduce())
        dist.destroy_process_group()
    store.set(f"done {rank}", "")
    if rank == 0:
        store.wait(["done 0", "done 1"])
    return said


def test_a_group_can_be_made_again_on_the_same_store() -> None:
    """Nothing that the first group left in the store is taken for the second's."""
    assert [one["value"] for one in on_ranks(twice_on_one_store, 2)] == [[2.0, 2.0]] * 2


# Which settings and which libraries.


def shared_memory_with(places: list[Whereabouts], monkeypatch: pytest.MonkeyPatch, given: str = "", **more: object) -> str:
    """Return CCL_ATL_SHM as it is set for rank 0 of ranks at `places`, where the user has given this."""
    for name in ("CCL_LOCAL_RANK", "CCL_LOCAL_SIZE", "CCL_ATL_SHM", "FI_TCP_IFACE", "CCL_KVS_IFACE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    if given:
        os.environ["CCL_ATL_SHM"] = given
    settings.before_first_communicator(0, places, **more)  # type: ignore[arg-type]
    return os.environ["CCL_ATL_SHM"]


def test_shared_memory_needs_room_on_every_host(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One host with too little in /dev/shm turns it off on all, said once by name, unless the user wants it; without /dev/shm it is always off."""
    roomy, tight = [Whereabouts("a", "1", 300)] * 2, [Whereabouts("b", "2", 200)] * 2
    with caplog.at_level(logging.WARNING):
        assert shared_memory_with(roomy, monkeypatch) == "1" and caplog.messages == []
        assert shared_memory_with(roomy + tight, monkeypatch) == "0"
        assert len(caplog.messages) == 1 and " b has less than 128 MiB a rank" in caplog.messages[0]
    assert shared_memory_with(roomy + tight, monkeypatch, given="1") == "1"
    assert shared_memory_with(roomy, monkeypatch, given="0") == "0"
    assert shared_memory_with([*roomy, Whereabouts("b", "2", -1)], monkeypatch, given="1") == "0"


def test_ranks_of_a_part_are_counted_as_the_launcher_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first group of some ranks only does not settle who is whose neighbour for later groups, where the launcher has said so."""
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    places = [Whereabouts("a", "1", 1000)] * 2
    shared_memory_with(places, monkeypatch, whole=False)
    assert (os.environ["CCL_LOCAL_RANK"], os.environ["CCL_LOCAL_SIZE"]) == ("2", "4")
    shared_memory_with(places, monkeypatch, whole=True)
    assert (os.environ["CCL_LOCAL_RANK"], os.environ["CCL_LOCAL_SIZE"]) == ("0", "2")


def test_a_folder_without_all_libraries_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """$CCL_ROOT/lib as oneAPI's modules set it has no libfabric and no MPI beside oneCCL: the package's own folder is taken; with both, it is taken."""
    (tmp_path / "lib").mkdir()
    monkeypatch.setenv("CCL_ROOT", str(tmp_path))
    for name in (library.PLUGIN, "libccl.so.2", "libmpi.so.12"):
        (tmp_path / "lib" / name).touch()
    assert library.folder() not in (None, tmp_path / "lib") and library.missing() == ""
    (tmp_path / "lib" / "libfabric.so.1").touch()
    assert library.folder() == tmp_path / "lib"


STAND_IN = """
import torch.distributed as dist
class Official(dist.ProcessGroup):
    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
dist.Backend.register_backend("ccl", Official, devices=["cpu"])
"""
WHOSE = """
import os, hcsdl.distributed.oneccl as o, torch.distributed as dist
ours = [name for name in os.environ if name.startswith("CCL_")]
dist.init_process_group("ccl", store=dist.HashStore(), rank=0, world_size=1)
print(o.binding, type(dist.group.WORLD).__name__, len(ours) > 0, o.missing() == "")
"""


def test_the_official_binding_goes_first_where_it_imports(tmp_path: Path) -> None:
    """A stand-in for Intel's package, which registers a group of its own, is used, with its own defaults; one that does not import is not."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("CCL_")}
    clean["PYTHONPATH"] = os.pathsep.join([str(tmp_path), clean.get("PYTHONPATH", "")])
    said = []
    for content in (STAND_IN, "raise ImportError('undefined symbol')"):
        (tmp_path / f"{oneccl.OFFICIAL}.py").write_text(content)
        done = subprocess.run([sys.executable, "-c", WHOSE], env=clean, capture_output=True, text=True, timeout=120, check=True)
        said.append(done.stdout.split())
    assert said == [[oneccl.OFFICIAL, "Official", "False", "True"], ["hcsdl", "ProcessGroupCCL", "True", "True"]]


def test_a_provider_that_libfabric_has_not_is_told_instead_of_a_crash() -> None:
    """Clusters' modules set FI_PROVIDER for their own MPI; oneCCL would end the process with SIGABRT."""
    show = "from hcsdl.distributed import fabric, oneccl_library; print(fabric.refusal(oneccl_library.folder()))"
    said = {}
    for provider in ("tcp", "nowhere"):
        environment = os.environ | {"FI_PROVIDER": provider}
        said[provider] = subprocess.run(
            [sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
    assert said["tcp"] == "" and said["nowhere"].startswith(
        "FI_PROVIDER must name a provider of libfabric that works here. None of 'nowhere' does"
    )
