"""Where ranks meet: rank 0's host, and a port that is free there, or that all of them work out alike (srun, mpirun). No torch.

In: the launcher's environment. Out: host and port for torch's `env://` rendezvous.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import subprocess
import zlib
from collections.abc import Mapping

from hcsdl.config import ConfigError

FIRST_PORT, PORTS = 15000, 10000  # below what Linux (from 32768) and others give to outgoing connections; a guess that nobody listens there


def whole_number(env: Mapping[str, str], name: str, high: int = 2**31 - 1) -> int:
    """Return an environment variable's number. Raises ConfigError where it is none from 0 to `high`."""
    if not env[name].isdecimal() or int(env[name]) > high:
        raise ConfigError(f"{name} must be a whole number from 0 to {high}. Got {env[name]!r} in the environment instead.")
    return int(env[name])


def first_host(env: Mapping[str, str], launcher: str, num_nodes: int) -> str:
    """Return the address of rank 0's host: this one for one node, else the first of the step's (mpirun: the job's) node list.

    Raises ConfigError where mpirun runs without Slurm on several hosts, since it does not say, or the host's name has no address.
    """
    if num_nodes == 1:
        return "127.0.0.1"
    nodes = env.get("SLURM_STEP_NODELIST" if launcher == "srun" else "SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError(
            "the ranks must know the host of rank 0, which mpirun does not tell. MASTER_ADDR is missing: hand it to all ranks (Open MPI: -x, Intel MPI and MPICH: -genv)."
        )
    host = expand_nodes(nodes)[0]
    address = host if _resolves(host) else _node_address(host)
    if not address:
        raise ConfigError(
            f"the name of the first node must have an address. {host} of {nodes} has none here: set MASTER_ADDR to its address for all ranks."
        )
    return address


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _node_address(host: str) -> str:
    """Return the address Slurm itself reaches a node by; node names need not be host names. Empty where it cannot be asked."""
    try:
        shown = subprocess.run(["scontrol", "-o", "show", "node", host], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    return found[1] if found and _resolves(found[1]) else ""


def numbered_port(env: Mapping[str, str], launcher: str) -> int:
    """Return a port from 15000 to 24999 by the number of the job and step, or the name mpirun gave the start; steps of a job differ.

    Raises ConfigError where the launcher gives the start no name of its own (MPICH).
    """
    if launcher == "srun":
        return FIRST_PORT + (whole_number(env, "SLURM_JOB_ID") * 31 + whole_number(env, "SLURM_STEP_ID")) % PORTS
    name = env.get("I_MPI_HYDRA_UUID") or env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid")
    if not name:
        raise ConfigError(
            "the ranks must know the port of rank 0, which this mpirun does not tell. MASTER_PORT is missing: hand a free one to all ranks."
        )
    return FIRST_PORT + zlib.crc32(name.encode()) % PORTS


def free_port() -> int:
    """Return a port for ranks to meet at that nobody listens at on this host, where rank 0 will run.

    Not one that the kernel would name: before rank 0 listens there, it could be given to an outgoing connection. Nor one worked out from a job's
    number, where there is a choice: it may be another cluster's job's here, or any program's. Raises OSError where none of 100 ports is free.
    """
    for port in random.SystemRandom().sample(range(FIRST_PORT, FIRST_PORT + PORTS), 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does: a port just left is free
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                return port
    raise OSError(f"none of 100 ports from {FIRST_PORT} on is free on {socket.gethostname()}")


def expand_nodes(text: str) -> list[str]:
    """Return the hosts of Slurm's short form, in its order: `n[1-3,07],m2` is n1, n2, n3, n07, m2; several brackets and zeros ahead are kept."""
    hosts = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        expanded = [""]
        for literal, listed in re.findall(r"([^\[]+)|\[([^\]]*)\]", name):
            choices = [literal] if literal else [n for part in listed.split(",") for n in _range(part)]
            expanded = [head + choice for head in expanded for choice in choices]
        hosts += expanded
    return hosts


def _range(part: str) -> list[str]:
    low, _, high = part.partition("-")
    return [f"{n:0{len(low)}d}" for n in range(int(low), int(high or low) + 1)]
