"""Is this host fit to train on? Facts in, one `Verdict` each out; nothing is looked up here.

`ok`, `note` (works, and may be better), or `PROBLEM`: what would hang, crash or crawl; notes and problems say what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hcsdl.config import DistributedConfig
from hcsdl.machine.facts import Interface
from hcsdl.machine.placement import Place
from hcsdl.machine.topology import Machine

GIB = 2**30
SHARED_MEMORY_MIB = 128  # a rank; 24 – 52 were taken for 20 MB all_reduces, measured here, 162 MiB of gradients take more: a guess
LOCKED_MEMORY_MIB = 1024  # a rank's registered buffers; a guess, 8 MiB is what systems give
OPEN_FILES = (256, 1024)  # below the first nothing of several ranks starts; systems give the second; guesses
MEMORY_GIB = (1, 4)  # a rank: torch alone takes 0.5; ResNet-18 on two full-resolution fields 2.9 (measured, BENCHMARKS.md)
SLOW_MBIT = 1000


@dataclass(frozen=True)
class Verdict:
    """One line of judgement: `level` is ok, note or PROBLEM."""

    level: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:8s}{self.subject}: {self.text}"


def bf16(flags: Sequence[str]) -> Verdict:
    """Judge the bf16 instruction sets."""
    if flags:
        return Verdict("ok", "bf16", " and ".join(flag.upper() for flag in flags))
    return Verdict(
        "note",
        "bf16",
        "neither AVX512_BF16 nor AMX: training runs in fp32, about half as fast. Xeons from the fourth generation and EPYCs from the fourth have one.",
    )


def cores(machine: Machine, online: int) -> Verdict:
    """Judge what this process may use of `online` physical cores."""
    count = machine.usable_cores
    if machine.limited:
        fraction = "" if float(machine.quota).is_integer() else ", a fraction: all threads pause for a part of every period"
        return Verdict("note", "cores", f"a CPU quota of {machine.quota:g} of {len(machine.cores)} cores{fraction}; threads are not bound")
    if count == 1 and online >= 4:
        return Verdict(
            "PROBLEM",
            "cores",
            f"this process may use 1 of {online} cores. Ask for more: srun --cpus-per-task, mpirun --bind-to none, taskset.",
        )
    if count < online:
        return Verdict("note", "cores", f"this process may use {count} of {online} cores; whoever started it has kept it to these")
    siblings = sum(len(core.cpus) for core in machine.cores) > count
    return Verdict("ok", "cores", f"{count} physical cores{', their SMT siblings left to loader threads' if siblings else ''}")


def load(average: float, machine: Machine, places: Sequence[Place]) -> Verdict:
    """Judge how many processes ran in the last minute; ranks that are bound to cores cannot step aside for others."""
    text = f"{average:.1f} processes ran in the last minute"
    if average > machine.usable_cores / 4 and places[0].bound:
        return Verdict("note", "load", f"{text}: others are at work here; with machine.pin=false the ranks make room for them")
    return Verdict("ok", "load", text)


def numa(machine: Machine, places: Sequence[Place]) -> Verdict:
    """Judge how the ranks lie in the NUMA nodes."""
    nodes = len(machine.nodes)
    if nodes == 1 or machine.limited:
        return Verdict("ok", "NUMA", "one node" if nodes == 1 else "not used under a CPU quota")
    if not places[0].bound:
        return Verdict(
            "note", "NUMA", f"{nodes} nodes, and machine.pin=false: threads may run far from their memory. Set machine.pin=true."
        )
    if any(place.node is None for place in places):
        return Verdict("note", "NUMA", f"a rank spans several of {nodes} nodes. Set distributed.ranks={nodes}, or null.")
    return Verdict("ok", "NUMA", f"{nodes} nodes, every rank within one")


def threads(total: int, count: int) -> Verdict:
    """Judge whether `count` cores are one for each of the `total` compute threads of this host's ranks."""
    text = f"{total} compute threads on {count} cores"
    if total > count:
        return Verdict("PROBLEM", "threads", f"{text}: they wait for each other. Lower distributed.ranks or machine.threads_per_rank.")
    return Verdict("ok", "threads", text)


def memory(memory_bytes: int, ranks: int) -> Verdict:
    """Judge the memory, or the control group's limit on it."""
    each = memory_bytes / GIB / ranks
    text = f"{memory_bytes / GIB:.1f} GiB, {each:.1f} for each of {ranks} rank{'s' * (ranks > 1)}"
    if each < MEMORY_GIB[0]:
        return Verdict("PROBLEM", "memory", f"{text}: a rank would be killed. Give the container or job more, or start fewer ranks.")
    if each < MEMORY_GIB[1]:
        return Verdict(
            "note", "memory", f"{text}: little for full-resolution fields; data.crop_px and training.mini_batch_size lower the need"
        )
    return Verdict("ok", "memory", text)


def shared_memory(found: tuple[int, int] | None, ranks: int, backend: str) -> Verdict:
    """Judge /dev/shm (size and free bytes), over which ranks of one node talk by oneCCL."""
    need_mib = SHARED_MEMORY_MIB * ranks
    text = "missing" if found is None else f"{found[0] / 2**20:,.0f} MiB, {found[1] / 2**20:,.0f} free"
    if ranks > 1 and backend in ("auto", "ccl") and (found is None or found[1] < need_mib * 2**20):
        return Verdict(
            "PROBLEM",
            "/dev/shm",
            f"{text}; {ranks} ranks over oneCCL want {need_mib} MiB. Containers: --shm-size=2g; others: remount it; or distributed.backend=gloo.",
        )
    return Verdict("ok", "/dev/shm", text)


def stale_segments(found: Mapping[Path, int]) -> Verdict:
    """Judge the shared memory that killed ranks have left in /dev/shm: files and their bytes."""
    if not found:
        return Verdict("ok", "left behind", "no shared memory of killed ranks")
    remove = " ".join([*map(str, list(found)[:3]), *["…"][: len(found) > 3]])
    return Verdict("note", "left behind", f"shared memory of killed ranks, {sum(found.values()) / 2**20:,.0f} MiB. rm {remove}")


def locked_memory(limit: float, providers: Sequence[str]) -> Verdict:
    """Judge the limit on locked memory (bytes), which fabrics that write into memory directly need."""
    direct = [name for name in providers if name.startswith(("verbs", "psm", "mlx", "efa"))]
    text = "unlimited" if limit == math.inf else f"{limit / 2**20:,.0f} MiB"
    if direct and limit < LOCKED_MEMORY_MIB * 2**20:
        return Verdict(
            "PROBLEM",
            "locked memory",
            f"{text}, and {direct[0]} registers its buffers. Raise memlock in limits.conf; Slurm: PropagateResourceLimitsExcept=MEMLOCK.",
        )
    return Verdict("ok", "locked memory", text if direct else f"{text}; tcp needs none")


def open_files(limit: float) -> Verdict:
    """Judge the limit on open files; every rank holds sockets to the others."""
    if limit < OPEN_FILES[0]:
        return Verdict("PROBLEM", "open files", f"{limit:g}: ranks cannot connect to each other. Raise it: ulimit -n 4096.")
    if limit < OPEN_FILES[1]:
        return Verdict("note", "open files", f"{limit:g}: few for many ranks; ulimit -n 4096")
    return Verdict("ok", "open files", "unlimited" if limit == math.inf else f"{limit:g}")


def pages(mode: str | None) -> Verdict:
    """Judge the mode of transparent huge pages."""
    if mode == "never" or mode is None:
        return Verdict(
            "note",
            "huge pages",
            "off: more page faults and TLB misses on large tensors. echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return Verdict("ok", "huge pages", mode)


def clock(found: tuple[str, str] | None) -> Verdict:
    """Judge the driver and governor of the clock. intel_pstate's and amd-pstate-epp's powersave are dynamic, others' stay at the lowest clock."""
    if found is None:
        return Verdict("ok", "clock", "set by the host, not by this system")
    driver, governor = found
    if governor == "powersave" and driver not in ("intel_pstate", "amd-pstate-epp"):
        return Verdict("PROBLEM", "clock", f"{driver} keeps to the lowest frequency (powersave). cpupower frequency-set -g performance")
    return Verdict("ok", "clock", f"{driver}, {governor}")


def compiler(path: str | None) -> Verdict:
    """Judge the C compiler, for kernels compiled at their first use."""
    if path is None:
        return Verdict(
            "note",
            "compiler",
            "none found: training runs on PyTorch's or IPEX's operators, slower than hcsdl's own. Install gcc, or name one in CC.",
        )
    return Verdict("ok", "compiler", path)


def ipex(torch: str, version: str | None, kernels: str) -> Verdict:
    """Judge whether torch and IPEX (None: not installed) fit each other; IPEX ends a process that has another torch."""
    wanted = kernels == "ipex"
    if version is None:
        text = f"torch {torch}, no IPEX"
        return (
            Verdict("PROBLEM", "IPEX", f"{text}, and kernels=ipex. Install it, or take kernels=native.")
            if wanted
            else Verdict("ok", "IPEX", text)
        )
    text = f"torch {torch}, IPEX {version}"
    if torch.split(".")[:2] != version.split(".")[:2]:
        remedy = f"Install torch {'.'.join(version.split('.')[:2])}, or take kernels=native."
        return Verdict(
            "PROBLEM" if wanted else "note", "IPEX", f"{text}: they do not fit. {remedy if wanted else 'kernels=auto takes native.'}"
        )
    return Verdict("ok", "IPEX", text)


def oneccl(missing: str, backend: str) -> Verdict:
    """Judge oneCCL; `missing` says why it cannot be loaded, empty where it can."""
    if not missing:
        return Verdict("ok", "oneCCL", "found")
    return Verdict(
        "PROBLEM" if backend == "ccl" else "note", "oneCCL", f"{missing}{' Or take distributed.backend=gloo.' if backend == 'ccl' else ''}"
    )


def network(found: Sequence[Interface], addresses: dict[str, str], config: DistributedConfig) -> list[Verdict]:
    """Judge the interfaces (without the loopback); `addresses` holds their IPv4 addresses by name."""
    usable = [one for one in found if one.up and one.name in addresses]
    if config.interface and config.interface not in addresses:
        known = ", ".join(addresses) or "none"
        return [Verdict("PROBLEM", "interface", f"distributed.interface={config.interface} is none that is up with an address: {known}.")]
    if not usable:
        return [Verdict("note", "interface", "only the loopback is up with an address: this host can train alone, not with others")]
    verdicts = []
    for one in usable:
        speed = "speed unknown" if one.speed_mbit is None else f"{one.speed_mbit / 1000:g} Gbit/s"
        slow = one.speed_mbit is not None and one.speed_mbit <= SLOW_MBIT and config.interface in (None, one.name)
        text = f"{one.name} {addresses[one.name]}, {speed}"
        if slow:
            text += ": 100 MB of gradients take a second or more. Train over a faster one (distributed.interface), or distributed.gradient_dtype=bf16."
        verdicts.append(Verdict("note" if slow else "ok", "interface", text))
    return verdicts


def fabric(providers: Sequence[str], devices: Sequence[str]) -> Verdict:
    """Judge libfabric's working providers against the fast network devices the kernel knows."""
    text = f"oneCCL sends over {providers[0]}" if providers else "libfabric has no working provider"
    if not providers:
        return Verdict(
            "PROBLEM", "fabric", f"{text}: oneCCL cannot start. Reinstall impi-rt, unset FI_PROVIDER, or take distributed.backend=gloo."
        )
    if devices and all(name.startswith(("tcp", "udp", "shm", "sockets")) for name in providers):
        return Verdict(
            "note",
            "fabric",
            f"{text}, though there is {', '.join(devices)}. Install rdma-core (verbs) or the vendor's libfabric and name it in FI_PROVIDER_PATH.",
        )
    return Verdict("ok", "fabric", text)


def host_name(host: str, addresses: Sequence[str], interface: str | None, num_nodes: int) -> Verdict:
    """Judge what the host's own name resolves to, for ranks on `num_nodes` hosts."""
    if not addresses:
        text = f"{host} has no address: other nodes do not find this one, and gloo does not start."
        return Verdict(
            "PROBLEM",
            "host name",
            f"{text} Add it to /etc/hosts or the name service, or give addresses: MASTER_ADDR, distributed.interface.",
        )
    if all(address.startswith("127.") or address == "::1" for address in addresses) and interface is None:
        return Verdict(
            "PROBLEM" if num_nodes > 1 else "note",
            "host name",
            f"{host} is {', '.join(addresses)}, the loopback: across nodes correct /etc/hosts, or set distributed.interface and MASTER_ADDR",
        )
    return Verdict("ok", "host name", f"{host} is {', '.join(addresses)}")
