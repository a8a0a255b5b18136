"""Ranks run where their places are; looked up in the kernel's own words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hcsdl.config import MachineConfig
from hcsdl.distributed.launcher import start_ranks, watch_ranks
from hcsdl.machine.binding import bound_by_launcher, on_cpus, own_place, place_environment
from hcsdl.machine.placement import Place, plan_places
from hcsdl.machine.topology import Core, read_machine
from tests.machine import trees

ALLOWED = sorted(os.sched_getaffinity(0))
two_cpus = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two CPUs")
LOOK = """
import json, os, sys, threading
from pathlib import Path
from hcsdl.machine.binding import _policy, affinity_kept
found = {"policy": _policy()}
if sys.argv[1] == "torch":
    with affinity_kept():
        import torch
    torch.rand(1000, 1000).relu_().sum()  # starts the compute threads
    compute = {int(p.name) for p in Path("/proc/self/task").iterdir()} - {os.getpid()}
    found |= {"threads": torch.get_num_threads(), "compute": sorted(sorted(os.sched_getaffinity(task)) for task in compute)}
found["main"] = sorted(os.sched_getaffinity(0))
def loader(): found["loader"] = sorted(os.sched_getaffinity(0))
thread = threading.Thread(target=loader)
thread.start()
thread.join()
print(json.dumps(found), flush=True)
"""


def look(places: tuple[Place, ...], folder: Path, capfd: pytest.CaptureFixture, what: str = "kernel") -> list[dict]:
    """Start a rank at each place and return what each finds, in rank order; with `what` "torch" also of torch's threads."""
    code, said = watch_ranks(start_ranks(["-c", LOOK, what], places, folder))
    assert code == 0, said
    texts = [capfd.readouterr().out, *((folder / f"rank{rank}.log").read_text() for rank in range(1, len(places)))]
    return [json.loads(text.splitlines()[-1]) for text in texts]


@two_cpus
def test_each_rank_has_its_own_cores_and_the_memory_next_to_them(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    places = plan_places(read_machine(), 2, MachineConfig())
    for place, found in zip(places, look(places, tmp_path, capfd), strict=True):
        assert found["main"] == found["loader"] == sorted(place.cpus)
        assert found["policy"] in (1, None), "memory is preferred from the rank's node, where the kernel lets us"
    assert not places[0].cpus & places[1].cpus
    assert os.sched_getaffinity(0) == set(ALLOWED), "the launcher itself stays free"


@two_cpus
def test_compute_threads_keep_to_their_cores_and_the_loader_may_use_all(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The OpenMP runtime binds the thread that loads it to one core, which later threads would inherit."""
    first, second = ALLOWED[:2]
    place = Place(2, (Core((first,), 0), Core((second,), 0)))
    found = look((place,), tmp_path, capfd, "torch")[0]
    assert found["threads"] == 2
    assert found["compute"] == [[second]], "the second compute thread is bound by OpenMP; the first is the main thread"
    assert found["main"] == found["loader"] == [first, second]


@two_cpus
def test_unbound_ranks_may_run_anywhere(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    found = look(plan_places(read_machine(), 2, MachineConfig(pin=False)), tmp_path, capfd)
    assert all(one["main"] == one["loader"] == ALLOWED and one["policy"] in (0, None) for one in found)


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"):
        monkeypatch.delenv(name, raising=False)
    machine = read_machine(trees.xeon(tmp_path))
    place = plan_places(machine, 4, MachineConfig())[1]
    whole = place_environment(place)
    assert whole["OMP_NUM_THREADS"] == whole["MKL_NUM_THREADS"] == "10" and whole["OMP_PROC_BIND"] == "close"
    assert whole["OMP_PLACES"].startswith("{10,50},{11,51}")
    few = place_environment(plan_places(machine, 4, MachineConfig(threads_per_rank=3))[0])
    assert few["OMP_NUM_THREADS"] == "3" and "OMP_PLACES" not in few, "another run's threads would sit on the same first cores"
    assert "OMP_PLACES" not in place_environment(plan_places(machine, 4, MachineConfig(pin=False))[0])
    monkeypatch.setenv("KMP_AFFINITY", "compact")
    assert not {"OMP_PLACES", "OMP_PROC_BIND"} & set(place_environment(place)), "what the user has set stays"


@two_cpus
def test_a_rank_takes_its_place_and_prepares_on_the_whole_machine() -> None:
    script = f"""
import os
from hcsdl.machine.binding import on_cpus, take_place
from hcsdl.machine.cores import usable_cores
from hcsdl.machine.placement import Place
from hcsdl.machine.topology import Core
before = take_place(Place(1, (Core(({ALLOWED[0]},), 0),)))
assert os.environ["OMP_NUM_THREADS"] == "1" and usable_cores() == 1
with on_cpus(before):
    assert os.sched_getaffinity(0) == before == set({ALLOWED})
assert os.sched_getaffinity(0) == {{{ALLOWED[0]}}}
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@two_cpus
def test_a_place_given_by_the_launcher_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that binds its ranks, here this process, gives each fewer CPUs than it has; a shell in between does not matter."""
    show = "from hcsdl.machine.binding import bound_by_launcher, own_place; from hcsdl.config import MachineConfig; "
    show += "print(bound_by_launcher(2, 'mpirun'), sorted(own_place(1, 2, MachineConfig(), 'mpirun').cpus))"
    command = [sys.executable, "-c", show]
    for words in (command, ["sh", "-c", '"$@"; exit $?', "sh", *command]):
        with on_cpus({ALLOWED[0]}):
            process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.communicate()[0].strip() == f"True [{ALLOWED[0]}]"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("False")


def test_srun_says_whether_it_has_bound_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPU_BIND_TYPE", raising=False)
    cpus = os.cpu_count() or 1
    for masks, bound in (("0x1,0x2", True), ("0x3,0x3", False), ("", False)):
        monkeypatch.setenv("SLURM_CPU_BIND_LIST", masks)
        assert bound_by_launcher(2, "srun") is bound
    for kind in ("rank", "ldoms", "rank_ldom", "none", ""):
        monkeypatch.setenv("SLURM_CPU_BIND_TYPE", kind)
        monkeypatch.setenv("SLURM_CPU_BIND_LIST", "ldoms" if kind == "ldoms" else "")  # as Slurm 22.05 does
        assert not bound_by_launcher(cpus // len(ALLOWED) + 1, "srun"), "tasks have this NUMA node in common"
        with on_cpus({ALLOWED[0]}):
            assert bound_by_launcher(cpus, "srun") is (kind not in ("none", ""))
    monkeypatch.setenv("SLURM_CPU_BIND_LIST", "")
    monkeypatch.setenv("SLURM_CPU_BIND_TYPE", "none")
    shares = [own_place(rank, 2, MachineConfig(), "srun") for rank in range(2)]
    assert shares == list(plan_places(read_machine(), 2, MachineConfig()))
