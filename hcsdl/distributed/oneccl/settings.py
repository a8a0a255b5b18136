"""oneCCL's environment variables: what is set, and why; what the user has set there stays.

In: who the ranks are. Out: variables in `os.environ`, which the library reads when it is loaded and when the first communicator is made.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hcsdl.distributed.interfaces import use_interface
from hcsdl.distributed.oneccl_library import set_defaults
from hcsdl.machine.facts import shared_memory_bytes
from hcsdl.machine.verdicts import SHARED_MEMORY_MIB

log = logging.getLogger(__name__)

DEFAULTS = {
    "CCL_PLUGIN": "ONECCL_LEGACY_CPU",  # else the C API looks for a GPU and fails
    "CCL_ATL_TRANSPORT": "ofi",  # libfabric; the other, mpi, needs mpirun
    "CCL_PROCESS_LAUNCHER": "none",  # ranks on this host are counted by CCL_LOCAL_RANK and CCL_LOCAL_SIZE, set below
    "CCL_WORKER_OFFLOAD": "0",  # whoever calls does the work; a worker thread that spins beside each caller costs 8 ms a call on few cores, measured here
    "CCL_YIELD": "sched_yield",  # while it waits for a peer it lets compute threads go first
    "CCL_LOG_LEVEL": "error",
}


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank runs: its host's name, what must be equal for two ranks to share memory, and how much is free of it (-1: there is none)."""

    host: str
    memory: str
    free_mib: int

    @classmethod
    def here(cls) -> Whereabouts:
        """Return this process's whereabouts: shared memory needs one kernel, one /dev/shm, and process ids that mean the same to both."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found = shared_memory_bytes()
        shm, free_mib = (0, -1) if found is None else (os.stat("/dev/shm").st_dev, found[1] >> 20)
        return cls(socket.gethostname(), f"{boot} {shm} {os.readlink('/proc/self/ns/pid')}", free_mib)


def before_first_communicator(rank: int, places: Sequence[Whereabouts], whole: bool = True) -> None:
    """Tell oneCCL who is on this host and what the ranks may talk over. The library reads it once, so the first group speaks for later ones.

    `whole` says that the group has all ranks of the run; where it has not, ranks are counted as the launcher does, if it does.
    """
    neighbours = [other for other, place in enumerate(places) if place.host == places[rank].host]
    local = {"CCL_LOCAL_RANK": str(neighbours.index(rank)), "CCL_LOCAL_SIZE": str(len(neighbours))}
    if not whole and os.environ.get("LOCAL_RANK") and os.environ.get("LOCAL_WORLD_SIZE"):
        local = {"CCL_LOCAL_RANK": os.environ["LOCAL_RANK"], "CCL_LOCAL_SIZE": os.environ["LOCAL_WORLD_SIZE"]}
    set_defaults(local)
    _choose_memory(rank, places)
    use_interface(None, os.environ.get("MASTER_ADDR", "127.0.0.1"), one_host=len(neighbours) == len(places))


def _choose_memory(rank: int, places: Sequence[Whereabouts]) -> None:
    """Let the ranks of a host talk through shared memory: 100 MB in 30 ms instead of 82, measured here. All ranks must do alike.

    oneCCL takes ranks with one host name for neighbours, so it is given up where two of one name cannot share it (containers). That, and that there
    is no /dev/shm, is no matter of taste: they would wait for each other for ever, or crash (tried). How much room is enough is the user's to say.
    """
    ranks = Counter(place.host for place in places)
    apart = len({(place.host, place.memory) for place in places}) > len(ranks)
    if apart or any(place.free_mib < 0 for place in places):
        os.environ["CCL_ATL_SHM"] = "0"
        return
    tight = sorted({place.host for place in places if place.free_mib < SHARED_MEMORY_MIB * ranks[place.host]})
    if tight and rank == 0 and "CCL_ATL_SHM" not in os.environ:
        log.warning(
            "hcsdl: oneCCL goes over TCP within hosts, too: %s has less than %d MiB a rank free in /dev/shm. Containers: --shm-size=2g.",
            ", ".join(tight[:8]),
            SHARED_MEMORY_MIB,
        )
    set_defaults({"CCL_ATL_SHM": "0" if tight else "1"})
