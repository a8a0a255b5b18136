"""`hcsdl check machine`: the ranks that would be started on this host, and whether it is fit to train on.

In: a `CheckMachineCommand`. Out: lines on standard output; exit code 1 where something would hang, crash or crawl, with the remedy, else 0.
Needs no plates. Started by srun or mpirun on many nodes, one process of each speaks.
"""

from __future__ import annotations

import importlib.metadata
import socket

from hcsdl.config import CheckMachineCommand
from hcsdl.distributed import oneccl_library as library
from hcsdl.distributed.fabric import providers
from hcsdl.distributed.identity import Identity, who_am_i
from hcsdl.distributed.interfaces import interface_addresses
from hcsdl.machine import facts, verdicts
from hcsdl.machine.binding import bound_by_launcher, own_place
from hcsdl.machine.cores import bf16_flags, processor
from hcsdl.machine.placement import Place, default_ranks, plan_places
from hcsdl.machine.topology import Machine, read_machine
from hcsdl.machine.verdicts import Verdict


def run(config: CheckMachineCommand) -> int:
    """Print plan and verdicts; return 1 where there is a problem, else 0."""
    identity, machine = who_am_i(), read_machine()
    if identity.local_rank > 0:
        return 0
    if identity.launcher in ("alone", "own"):
        ranks = config.distributed.ranks or default_ranks(machine, config.machine.spare_cores)
        places = plan_places(machine, ranks, config.machine)
        how = counted(ranks, "rank")
    elif bound_by_launcher(identity.local_world_size, identity.launcher):
        places = (own_place(0, identity.local_world_size, config.machine, identity.launcher),)
        how = f"{counted(identity.local_world_size, 'rank')} of {identity.launcher}, which has bound the first"
    else:
        places = plan_places(machine, identity.local_world_size, config.machine)
        how = f"{counted(identity.local_world_size, 'rank')} of {identity.launcher}"
    print(f"host    {identity.host}, {processor()}")
    print(f"plan    {how} on {counted(machine.usable_cores, 'core')}, {machine.memory_bytes / 2**30:.1f} GiB")
    for number, place in enumerate(places):
        print(f"rank {number}  {place}")
    found = judge(config, machine, places, identity)
    print("\n".join(map(str, found)))
    problems = sum(one.level == "PROBLEM" for one in found)
    print(f"verdict {counted(problems, 'problem') + ': see above' if problems else 'fit to train on'}", flush=True)
    return 1 if problems else 0


def judge(config: CheckMachineCommand, machine: Machine, places: tuple[Place, ...], identity: Identity) -> list[Verdict]:
    """Return a verdict on everything that is known to make training hang, crash or crawl.

    `places` are those of all the host's ranks, or the first one's alone where a launcher has bound each to a part of the host; `machine` is that part.
    """
    backend, ranks = config.distributed.backend, max(len(places), identity.local_world_size)
    online = facts.online_cores()
    count = machine.usable_cores if len(places) == ranks or machine.limited else min(online, machine.usable_cores * ranks)
    return [
        verdicts.bf16(bf16_flags()),
        verdicts.cores(machine, online),
        verdicts.numa(machine, places),
        verdicts.threads(places[0].threads * ranks, count),
        verdicts.load(facts.load_average(), machine, places),
        verdicts.memory(machine.memory_bytes, ranks),
        verdicts.pages(facts.huge_pages()),
        verdicts.clock(facts.governor()),
        verdicts.compiler(facts.compiler()),
        verdicts.ipex(importlib.metadata.version("torch"), _version("intel-extension-for-pytorch"), config.kernels.name),
        *_network(config, identity.num_nodes),
        verdicts.shared_memory(facts.shared_memory_bytes(), ranks, backend),
        verdicts.stale_segments(facts.stale_segments()),
        verdicts.open_files(facts.open_files_limit()),
    ]


def counted(number: int, what: str) -> str:
    """Return a number and a noun, in the plural where it must be."""
    return f"{number} {what}{'s' * (number != 1)}"


def _network(config: CheckMachineCommand, num_nodes: int) -> list[Verdict]:
    found = [] if config.distributed.backend == "gloo" else _oneccl(config.distributed.backend)
    found += verdicts.network(facts.interfaces(), interface_addresses(), config.distributed)
    host = socket.gethostname()
    return [*found, verdicts.host_name(host, facts.addresses_of(host), config.distributed.interface, num_nodes)]


def _oneccl(backend: str) -> list[Verdict]:
    missing, folder = library.missing(), library.folder()
    if missing or folder is None:
        return [verdicts.oneccl(missing, backend)]
    try:
        working = providers(folder)
    except OSError as error:
        return [Verdict("PROBLEM", "fabric", f"{error}. Reinstall oneccl and impi-rt, or take distributed.backend=gloo.")]
    return [
        verdicts.oneccl("", backend),
        verdicts.fabric(working, facts.fabric_devices()),
        verdicts.locked_memory(facts.locked_memory_limit(), working),
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
