"""Which network interface the ranks talk over.

In: the configured name, or the address of the first rank's host. Out: the environment variables in which gloo, oneCCL and libfabric look it up;
what the user has set there stays. No torch.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from hcsdl.config import ConfigError

VARIABLES = ("HCSDL_INTERFACE", "GLOO_SOCKET_IFNAME", "FI_TCP_IFACE", "CCL_KVS_IFACE")
SIOCGIFADDR = 0x8915  # linux/sockios.h


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


def use_interface(name: str | None, host: str) -> None:
    """Let gloo, oneCCL and libfabric use interface `name`, or where it is None the one towards `host`. Raises ConfigError where it has no address."""
    known = interface_addresses()
    if name is not None and name not in known:
        raise ConfigError(
            f"distributed.interface must be an interface of {socket.gethostname()} with an IPv4 address: {', '.join(known)}. Got {name!r} instead."
        )
    chosen = name or interface_towards(host)
    if chosen:
        for variable in VARIABLES:
            os.environ.setdefault(variable, chosen)
