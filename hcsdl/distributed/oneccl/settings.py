"""oneCCL's environment variables: what is set, and why; what the user has set there stays.

In: who the ranks are. Out: variables in `os.environ`, which the library reads when it is loaded and when the first communicator is made.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hcsdl.distributed.interfaces import interface_towards
from hcsdl.distributed.oneccl.library import set_defaults

DEFAULTS = {
    "CCL_PLUGIN": "ONECCL_LEGACY_CPU",  # else the C API looks for a GPU and fails
    "CCL_ATL_TRANSPORT": "ofi",  # libfabric; the other, mpi, needs mpirun
    "CCL_PROCESS_LAUNCHER": "none",  # ranks on this host are counted by CCL_LOCAL_RANK and CCL_LOCAL_SIZE, set below
    "CCL_ATL_SHM": "1",  # ranks of a host talk through shared memory: 100 MB in 30 ms instead of 82, measured here
    "CCL_WORKER_OFFLOAD": "0",  # whoever calls does the work; a worker thread that spins beside each caller costs 8 ms a call on few cores, measured here
    "CCL_YIELD": "sched_yield",  # while it waits for a peer it lets compute threads go first
    "CCL_LOG_LEVEL": "error",
}


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its host's name, and what must be equal for two ranks to share memory."""

    host: str
    memory: str

    @classmethod
    def here(cls) -> Place:
        """Return this process's place: shared memory needs one kernel, one /dev/shm, and process ids that mean the same to both."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        shm = os.stat("/dev/shm").st_dev if Path("/dev/shm").is_dir() else 0
        return cls(socket.gethostname(), f"{boot} {shm} {os.readlink('/proc/self/ns/pid')}")


def before_first_communicator(rank: int, places: Sequence[Place]) -> None:
    """Tell oneCCL who is on this host and what the ranks may talk over.

    oneCCL takes ranks with one host name for neighbours, so shared memory is given up where two of one name cannot share it (containers).
    """
    neighbours = [other for other, place in enumerate(places) if place.host == places[rank].host]
    set_defaults({"CCL_LOCAL_RANK": str(neighbours.index(rank)), "CCL_LOCAL_SIZE": str(len(neighbours))})
    memories = {(place.host, place.memory) for place in places}
    if len(memories) > len({place.host for place in places}):
        os.environ["CCL_ATL_SHM"] = "0"  # not a matter of taste: with shared memory they would wait for each other for ever
    interface = os.environ.get("HCSDL_INTERFACE") or interface_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    if interface and (interface != "lo" or len(neighbours) == len(places)):
        set_defaults({"FI_TCP_IFACE": interface, "CCL_KVS_IFACE": interface})
