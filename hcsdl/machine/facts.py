"""What this host is like besides its cores: shared memory, limits, pages, clocks, compilers, network. Read, not judged; `verdicts` judges.

In: nothing. Out: plain numbers and names; None where the kernel does not tell.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

COMPILERS = {"C": ("CC", ("gcc", "cc", "clang")), "C++": ("CXX", ("g++", "c++", "clang++"))}


@dataclass(frozen=True)
class Interface:
    """A network interface: whether it is up, and its speed in Mbit/s where its driver tells."""

    name: str
    up: bool
    speed_mbit: int | None


def interfaces() -> list[Interface]:
    """Return the network interfaces, without the loopback."""
    found = []
    for folder in sorted(Path("/sys/class/net").iterdir()):
        if folder.name != "lo" and folder.is_dir():
            speed = _read(folder / "speed")  # reading it fails while the interface is down
            up = int(_read(folder / "flags") or "0", 16) & 1  # IFF_UP: operstate is "unknown" for many that are
            carrier = _read(folder / "carrier") != "0"
            found.append(Interface(folder.name, bool(up and carrier), int(speed) if speed and speed.isdigit() else None))
    return found


def fabric_devices() -> list[str]:
    """Return the InfiniBand, Omni-Path and RoCE devices the kernel has drivers for."""
    folder = Path("/sys/class/infiniband")
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def shared_memory_bytes() -> tuple[int, int] | None:
    """Return size and free bytes of /dev/shm; None where there is none."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def stale_segments(folder: Path = Path("/dev/shm")) -> dict[Path, int]:
    """Return the bytes of oneCCL's shared memory (`<process id>:<n>:<n>`) whose process is gone: it was killed, so nobody has removed them."""
    found = {}
    for path in sorted(folder.glob("[0-9]*:*")):
        try:
            if not Path(f"/proc/{path.name.partition(':')[0]}").exists():
                found[path] = path.stat().st_size
        except FileNotFoundError:  # removed meanwhile
            continue
    return found


def locked_memory_limit() -> float:
    """Return how many bytes this process may lock in memory; infinity without a limit."""
    return _limit(resource.RLIMIT_MEMLOCK)


def open_files_limit() -> float:
    """Return how many files and sockets this process may hold open; infinity without a limit."""
    return _limit(resource.RLIMIT_NOFILE)


def _limit(which: int) -> float:
    soft, _ = resource.getrlimit(which)
    return float("inf") if soft == resource.RLIM_INFINITY else soft


def huge_pages() -> str | None:
    """Return the mode of transparent huge pages: always, madvise or never."""
    found = re.search(r"\[(\w+)\]", _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")) or "")
    return found[1] if found else None


def governor() -> tuple[str, str] | None:
    """Return the driver and the governor that set the clock of CPU 0."""
    folder = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    driver, name = _read(folder / "scaling_driver"), _read(folder / "scaling_governor")
    return (driver, name) if driver and name else None


def online_cores() -> int:
    """Return how many physical cores are switched on, usable by this process or not."""
    found = {path.read_text() for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")}
    return len(found) or os.cpu_count() or 1


def load_average() -> float:
    """Return how many processes ran or waited for a core, on average over the last minute."""
    return os.getloadavg()[0]


def compiler(language: str = "C") -> str | None:
    """Return the path of the first compiler of C or C++ on PATH, or of the one CC or CXX names."""
    variable, names = COMPILERS[language]
    names = (os.environ[variable], *names) if os.environ.get(variable) else names
    return next((path for path in map(shutil.which, names) if path), None)


def cache_folder() -> Path:
    """Return the folder for what this user need not make twice: `$XDG_CACHE_HOME/hcsdl`, else `~/.cache/hcsdl`. It may not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path(os.path.expanduser("~")) / ".cache") / "hcsdl"


def addresses_of(host: str) -> list[str]:
    """Return the IP addresses of a host's name; none where it has none."""
    try:
        return sorted({str(answer[4][0]) for answer in socket.getaddrinfo(host, None)})
    except OSError:
        return []


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
