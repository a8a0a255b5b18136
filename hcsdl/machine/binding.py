"""Keep a rank where its `Place` is: environment, affinity mask, memory policy. To be done before torch is imported.

In: a `Place`. Out: what the kernel and the OpenMP runtime (GNU's, which torch's packages bring along, or Intel's) were told. Promised: where the
user has said in the environment where OpenMP puts its threads, or by numactl where memory comes from, that is left alone. Not so OMP_NUM_THREADS,
which torchrun and many clusters' profiles set to 1 unasked: machine.threads_per_rank is the number of threads.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hcsdl.config import MachineConfig
from hcsdl.machine.placement import Place, plan_places
from hcsdl.machine.topology import parse_list, read_machine

SYSCALLS = {"x86_64": (238, 239), "aarch64": (237, 236)}  # set_mempolicy, get_mempolicy: linux/unistd.h
MPOL_DEFAULT, MPOL_PREFERRED = 0, 1  # linux/mempolicy.h
MAX_NODES = 1024  # what the kernel can be built for at most
PLACING = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
SHELLS = ("sh", "bash", "dash", "ksh", "zsh", "env")


def place_environment(place: Place) -> dict[str, str]:
    """Return the variables a rank at `place` needs: its threads, and where OpenMP puts them.

    Each compute thread is kept on one core, but only where the rank has exactly a core for each: two runs that share a machine would
    otherwise both sit on the first of them.
    """
    found = {"OMP_NUM_THREADS": str(place.threads), "MKL_NUM_THREADS": str(place.threads)}
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        found["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    if not place.bound:
        return found
    if place.threads == len(place.cores) and not any(name in os.environ for name in PLACING):
        found |= {"OMP_PLACES": ",".join("{" + ",".join(map(str, core.cpus)) + "}" for core in place.cores), "OMP_PROC_BIND": "close"}
    return found


@contextmanager
def placed(place: Place) -> Iterator[None]:
    """Put the calling thread where `place` is, for the processes it starts inside the context; they inherit mask and memory policy."""
    before = os.sched_getaffinity(0)
    took = _bind(place)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        if took:
            _prefer(None)


def take_place(place: Place) -> set[int]:
    """Put this process where `place` is for good, before torch is imported; return the CPUs it had before."""
    before = os.sched_getaffinity(0)
    os.environ |= place_environment(place)
    _bind(place)
    return before


@contextmanager
def on_cpus(cpus: set[int]) -> Iterator[None]:
    """Let the calling thread, and what it starts inside the context, use `cpus`: for work that one rank does while the others wait."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def own_place(local_rank: int, local_ranks: int, config: MachineConfig, launcher: str) -> Place:
    """Return the place of a rank that torchrun, srun or mpirun has started; where these have bound it to a part of the machine, within that."""
    if bound_by_launcher(local_ranks, launcher):
        return plan_places(read_machine(), 1, config)[0]
    return plan_places(read_machine(), local_ranks, config)[local_rank]


def bound_by_launcher(local_ranks: int, launcher: str) -> bool:
    """Return whether this process's CPUs are its own and not shared by all ranks of the host.

    srun says so: by a mask for each task, or (rank, ldoms, rank_ldom) by the kind of binding alone, and then a task may still have a NUMA node in
    common with others. Of other launchers we look whether the launcher, the first of our ancestors that is no shell, has more CPUs.
    """
    if launcher == "srun":
        listed = os.environ.get("SLURM_CPU_BIND_LIST", "").split(",")
        masks = [mask for mask in listed if mask[:1].isdigit()]  # with ldoms it is the word "ldoms"
        if masks:
            return len(set(masks)) == local_ranks
        kind = os.environ.get("SLURM_CPU_BIND_TYPE", "")
        return bool(kind) and "none" not in kind and len(os.sched_getaffinity(0)) * local_ranks <= (os.cpu_count() or 1)
    status = Path("/proc/self/status").read_text()
    own = _allowed(status)
    while True:
        parent = int(_value(status, "PPid"))
        if parent == 0:
            return False
        status = Path(f"/proc/{parent}/status").read_text()
        if _value(status, "Name") not in SHELLS:
            return own < _allowed(status)


def _allowed(status: str) -> set[int]:
    return parse_list(_value(status, "Cpus_allowed_list"))


def _value(status: str, name: str) -> str:
    return next(line.partition(":")[2].strip() for line in status.splitlines() if line.startswith(name + ":"))


@contextmanager
def affinity_kept() -> Iterator[None]:
    """Undo what an OpenMP runtime does to the thread that loads it; for the import of torch.

    With OMP_PLACES set it binds that thread to its first place, and every thread started later (loader, gloo) would inherit that one core; its
    own workers stay on their places. The variables go, so that a second runtime (scikit-learn's) does not do it again.
    """
    before = os.sched_getaffinity(0)
    try:
        yield
    finally:
        for name in ("OMP_PLACES", "OMP_PROC_BIND"):
            os.environ.pop(name, None)
        os.sched_setaffinity(0, before)


def _bind(place: Place) -> bool:
    """Bind the calling thread, and what it starts; return whether the memory policy was set."""
    if not place.bound:
        return False
    os.sched_setaffinity(0, place.cpus)
    return place.node is not None and _policy() == MPOL_DEFAULT and _prefer(place.node)


def _prefer(node: int | None) -> bool:
    """Take memory from `node` while it has some, or with None by the kernel's default; return whether the kernel agreed (containers may not)."""
    mask = (ctypes.c_ulong * (MAX_NODES // 64))()
    if node is not None:
        mask[node // 64] = 1 << node % 64
    return (
        _syscall(0, MPOL_DEFAULT if node is None else MPOL_PREFERRED, None if node is None else mask, MAX_NODES if node is not None else 0)
        == 0
    )


def _policy() -> int | None:
    """Return the calling thread's memory policy; None where the kernel does not tell."""
    mode = ctypes.c_int()
    return mode.value if _syscall(1, ctypes.byref(mode), None, 0, None, 0) == 0 else None


def _syscall(which: int, *arguments: object) -> int:
    numbers = SYSCALLS.get(platform.machine())
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    return ctypes.CDLL(None).syscall(ctypes.c_long(numbers[which]), *words) if numbers else -1
