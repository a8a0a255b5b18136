"""Two hosts on one machine: two network namespaces with host names of their own, joined by a link that can be shaped and cut.

In: root's rights. Out: processes that run "on" host a or b. The namespaces live as long as two `cat`s that wait for us, so they go when we go,
however we end; nothing is left in /run/netns or among this machine's interfaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

INTERFACE = "link0"
CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000  # linux/sched.h


@dataclass
class Host:
    """One of the two: its name, its address on the link, and what runs there."""

    name: str
    address: str
    holder: subprocess.Popen
    processes: list = field(default_factory=list)

    def start(self, words: Sequence[str | Path], environment: Mapping[str, str], **options: object) -> subprocess.Popen:
        """Start a process here; its process id is the program's own."""
        words = [*_inside(self.holder), *map(str, words)]
        self.processes.append(subprocess.Popen(words, env=dict(environment), start_new_session=True, **options))
        return self.processes[-1]

    def run(self, *words: str) -> None:
        """Run a command here. Raises CalledProcessError."""
        subprocess.run([*_inside(self.holder), *words], check=True, capture_output=True, text=True)

    def shape(self, rate: str) -> None:
        """Limit what leaves over the link to `rate`, in tc's words (`2gbit`); a later call replaces it."""
        self.run("tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")

    def cut(self) -> None:
        """Take the link down: packets vanish, nobody is told."""
        self.run("ip", "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        """Take the link up again."""
        self.run("ip", "link", "set", INTERFACE, "up")

    def vanish(self) -> None:
        """Be switched off: no packet leaves any more, and every process is gone."""
        self.cut()
        self.kill()

    def kill(self) -> None:
        """Kill what runs here, with all descendants."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def enter(holder: int) -> None:
    """Let this process, which must have no other threads, be on the host that process `holder` keeps. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, flag in (("net", CLONE_NEWNET), ("uts", CLONE_NEWUTS)):
        space = os.open(f"/proc/{holder}/ns/{kind}", os.O_RDONLY)
        if libc.setns(space, flag):
            raise OSError(ctypes.get_errno(), f"setns {kind}")
        os.close(space)


def _inside(holder: subprocess.Popen) -> list[str]:
    return ["nsenter", f"--net=/proc/{holder.pid}/ns/net", f"--uts=/proc/{holder.pid}/ns/uts", "--"]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two joined hosts, node-a (10.77.0.1) and node-b (10.77.0.2), both with loopback; skips the test where this is not permitted."""
    hosts = []
    try:
        try:
            for number, name in enumerate(("node-a", "node-b"), 1):
                setup = f"hostname {name} && ip link set lo up && echo ready && exec cat"
                holder = subprocess.Popen(
                    ["unshare", "--net", "--uts", "sh", "-c", setup],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                hosts.append(Host(name, f"10.77.0.{number}", holder))
                if holder.stdout.readline() != "ready\n":
                    pytest.skip(f"network namespaces are not to be had here: {holder.stderr.read().strip()}")
            ends = [["name", INTERFACE, "netns", str(host.holder.pid)] for host in hosts]
            subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True, capture_output=True, text=True)
            for host in hosts:
                host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
                host.run("ip", "link", "set", INTERFACE, "up")
        except FileNotFoundError as error:
            pytest.skip(f"network namespaces need {error.filename}, of util-linux or iproute2")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not to be had here: {error.stderr.strip()}")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.kill()
            for process in [*host.processes, host.holder]:
                process.kill()
                process.wait(60)
