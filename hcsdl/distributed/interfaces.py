"""Which network interface the ranks talk over.

In: the configured name, or the address of the first rank's host. Out: the environment variables in which gloo, NCCL, oneCCL and libfabric look it up;
what the user has set there stays. Promised: the loopback is taken only where all ranks were given a loopback address, not because this host's own
name leads to it (Debian's /etc/hosts says `127.0.1.1 <name>`): other hosts would not reach this one there. No torch.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from hcsdl.config import ConfigError
from hcsdl.distributed.rendezvous import expand_nodes

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "FI_TCP_IFACE", "CCL_KVS_IFACE")
SIOCGIFADDR = 0x8915  # linux/sockios.h
LOOPBACK = "lo"
ELSEWHERE = "192.0.2.1"  # an address nobody has (RFC 5737): the way to it is the default route


def interface_addresses() -> dict[str, str]:
    """Return the IPv4 address of every interface of this host that has one, by name."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def interface_towards(host: str) -> str | None:
    """Return the interface by which packets to `host` leave, on that host itself the one with its address; None where nobody can tell."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # of a datagram socket: no packet is sent, the kernel only looks its route up
            address = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for name, own in interface_addresses().items() if own == address), None)


def common_interface(host: str) -> str | None:
    """Return the interface over which the ranks that meet on `host` reach this one, and it them; None where nobody can tell.

    It is the one towards `host`. Where that name is this host's own and leads to the loopback: the one towards another node of the job step, where
    Slurm names them, else that of the default route.
    """
    found = interface_towards(host)
    if found != LOOPBACK or host.partition(".")[0] in ("localhost", "127"):
        return found
    nodes = expand_nodes(os.environ.get("SLURM_STEP_NODELIST", ""))[:2]  # one of two is another one
    towards = (interface_towards(node) for node in (*nodes, ELSEWHERE))
    return next((name for name in towards if name not in (None, LOOPBACK)), None)


def use_interface(name: str | None, host: str, one_host: bool = True) -> None:
    """Let gloo, NCCL, oneCCL and libfabric use interface `name`, or where it is None `common_interface(host)`, `host` being where the ranks meet.

    Not the loopback where they are known not to be on `one_host`. Raises ConfigError where `name` has no address, or the user has named an interface in
    a variable that this host has not: the libraries would crash.
    """
    known = interface_addresses()
    for variable in VARIABLES:
        named, present = os.environ.get(variable, ""), [one for _, one in socket.if_nameindex()]
        if not set(filter(None, named.split(","))) <= set(present):
            raise ConfigError(
                f"{variable} must name interfaces of {socket.gethostname()}: {', '.join(present)}. Got {named!r} in the environment instead."
            )
    if name is not None and name not in known:
        raise ConfigError(
            f"distributed.interface must be an interface of {socket.gethostname()} with an IPv4 address: {', '.join(known)}. Got {name!r} instead."
        )
    chosen = name or common_interface(host)
    if chosen and (one_host or chosen != LOOPBACK):
        for variable in VARIABLES:
            os.environ.setdefault(variable, chosen)
