"""Who am I among the ranks, and where do we meet. In: the environment a launcher set. Out: an `Identity`. No torch.

Known launchers: our own and torchrun (RANK, WORLD_SIZE, …), srun (the variables of a job *step*: a batch script or an salloc shell has SLURM_NTASKS
and SLURM_PROCID=0 too, but no other ranks), mpirun of Open MPI, and of MPICH and Intel MPI. The innermost wins: torchrun inside an srun step,
mpirun inside a job. A launcher that started one process only has started no ranks: that process is alone.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hcsdl.config import ConfigError
from hcsdl.distributed.rendezvous import first_host, numbered_port, whole_number

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAST_PORT = 65535
OWN_LAUNCHER = "HCSDL_LAUNCHER_PID"
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH, Intel MPI
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_STEP_NODELIST")


@dataclass(frozen=True)
class Identity:
    """One rank of `world_size`, the `local_rank`-th of `local_world_size` on `host`, one of `num_nodes`; started by `launcher`.

    `launcher` is own, torchrun, srun, mpirun or alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "alone"
    num_nodes: int = 1
    host: str = field(default_factory=socket.gethostname)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self.host}"


def who_am_i(environment: Mapping[str, str] | None = None) -> Identity:
    """Return this process's identity. Raises ConfigError naming what is missing where only a part of a launcher's variables is set."""
    env = os.environ if environment is None else environment
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_torch(env)
    if any(name in env for name in OPEN_MPI):
        found = _numbers(env, OPEN_MPI, "mpirun of Open MPI")
        return _started_by("mpirun", *found, env)
    if "MPI_LOCALRANKID" in env or "PMI_RANK" in env and not _in_step(env):
        return _started_by("mpirun", *_numbers(env, HYDRA, "mpirun of MPICH or Intel MPI"), env)
    if _in_step(env):
        return _from_slurm(env)
    if "PMIX_RANK" in env:
        raise ConfigError(
            f"a rank needs {', '.join(OPEN_MPI)} in its environment. PMIX_RANK is set, {OPEN_MPI[1]} is missing: start the ranks with mpirun, srun or torchrun."
        )
    return Identity()


def _from_torch(env: Mapping[str, str]) -> Identity:
    launcher = "own" if OWN_LAUNCHER in env else "torchrun"
    missing = [name for name in NEEDED if not env.get(name)]
    if missing:
        raise ConfigError(f"a rank needs {', '.join(NEEDED)} in its environment. {_missing(missing)}; torchrun sets them all.")
    rank, size, local = (whole_number(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = whole_number(env, "LOCAL_WORLD_SIZE") if env.get("LOCAL_WORLD_SIZE") else size
    _below("RANK", rank, "WORLD_SIZE", size)
    _below("LOCAL_RANK", local, "LOCAL_WORLD_SIZE", local_size)
    whole_number(env, "MASTER_PORT", LAST_PORT)
    return Identity(rank, size, local, local_size, launcher, -(-size // max(1, local_size)))


def _from_slurm(env: Mapping[str, str]) -> Identity:
    if _one_task(env):
        return Identity()
    missing = [name for name in SLURM if not env.get(name)]
    if missing:
        raise ConfigError(f"a task of srun has {', '.join(SLURM)} in its environment. {_missing(missing)}; srun sets them all.")
    rank, size, local, node = (whole_number(env, name) for name in (SLURM[0], SLURM[1], SLURM[2], SLURM[4]))
    counts = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    _below("SLURM_PROCID", rank, "SLURM_STEP_NUM_TASKS", size)
    _below("SLURM_NODEID", node, "the nodes of SLURM_STEP_TASKS_PER_NODE", len(counts))
    _below("SLURM_LOCALID", local, "the tasks of its node in SLURM_STEP_TASKS_PER_NODE", counts[node])
    host = env.get("SLURMD_NODENAME") or socket.gethostname()
    return Identity(rank, size, local, counts[node], "srun", len(counts), host)


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node from Slurm's short form: `2(x3),1` is [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE must look like 2(x3),1. Got {text!r} in the environment instead.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _in_step(env: Mapping[str, str]) -> bool:
    """Return whether this process is a task of a job step.

    sbatch hands its own environment on, so a batch script submitted from within a step has that step's variables: of real processes the
    slurmstepd they come from is asked, whose title is `slurmstepd: [<job>.<step>]`, with `batch` as the step of a batch script.
    """
    if not env.get("SLURM_STEP_ID"):
        return False
    step = _slurmstepd() if env is os.environ else None
    return step is None or step == env["SLURM_STEP_ID"]


def _slurmstepd() -> str | None:
    """Return the step whose slurmstepd is our ancestor; None where none is seen."""
    pid = os.getppid()
    while pid > 1:
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return None
        found = re.match(r"slurmstepd: \[[^\]]*\.(\w+)\]", title)
        if found:
            return found[1]
        pid = int(re.search(r"^PPid:\s*(\d+)", status, re.M)[1])  # type: ignore[index]
    return None


def _started_by(launcher: str, rank: int, size: int, local: int, local_size: int, env: Mapping[str, str]) -> Identity:
    if size == 1:
        return Identity()
    host = env.get("SLURMD_NODENAME") or socket.gethostname()
    return Identity(rank, size, local, local_size, launcher, -(-size // max(1, local_size)), host)


def _missing(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing"


def _numbers(env: Mapping[str, str], names: tuple[str, ...], launcher: str) -> list[int]:
    missing = [name for name in names if not env.get(name)]
    if missing:
        raise ConfigError(f"a rank of {launcher} has {', '.join(names)} in its environment. {_missing(missing)}.")
    found = [whole_number(env, name) for name in names]
    _below(names[0], found[0], names[1], found[1])
    _below(names[2], found[2], names[3], found[3])
    return found


def _below(name: str, value: int, other: str, limit: int) -> None:
    if value >= limit:
        raise ConfigError(f"{name} must be below {other}. Got {value} of {limit} in the environment instead.")


def export_identity(identity: Identity) -> None:
    """Put a rank of srun or mpirun into the variables torch's `env://` rendezvous reads; what the user has set of MASTER_ADDR and MASTER_PORT stays.

    Raises ConfigError where nobody says which host has rank 0.
    """
    if identity.launcher not in ("srun", "mpirun"):
        return
    os.environ |= {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or first_host(os.environ, identity.launcher, identity.num_nodes),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(numbered_port(os.environ, identity.launcher)),
        "RANK": str(identity.rank),
        "WORLD_SIZE": str(identity.world_size),
        "LOCAL_RANK": str(identity.local_rank),
        "LOCAL_WORLD_SIZE": str(identity.local_world_size),
    }
    whole_number(os.environ, "MASTER_PORT", LAST_PORT)


def alone_in_step(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether this process belongs to the only task of an srun step, to which Slurm has given cores for one rank.

    A batch script and an salloc shell are no tasks of srun: there our own launcher has the node to itself.
    """
    env = os.environ if environment is None else environment
    return _in_step(env) and _one_task(env)


def _one_task(env: Mapping[str, str]) -> bool:
    return env.get("SLURM_STEP_NUM_TASKS") == "1"


def unused_nodes() -> int:
    """Return how many nodes of a Slurm job a process that is alone in its batch script or salloc shell leaves idle."""
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    return int(nodes) - 1 if nodes.isdigit() and not _in_step(os.environ) else 0


def launcher_process() -> int:
    """Return the process id of whoever started this rank: our launcher, else our parent (torchrun's agent, slurmstepd, mpirun's proxy)."""
    return int(os.environ.get(OWN_LAUNCHER, os.getppid()))
