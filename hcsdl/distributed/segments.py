"""The shared memory of oneCCL's ranks: files `/dev/shm/<process id>:<n>:<n>` of libfabric, 64 MiB each, which outlive a process that is killed.

In: nothing. Out: none of them is left for long. A process that ends its communicators leaves none, one that has lost a peer removes its own, and
what killed ones leave, the next run on that host removes.

A process holds a lock on its files while it lives: where containers share /dev/shm but number their processes each for themselves, a process id
from another one says nothing. Programs that do not go through this package hold none; theirs are judged by the process id alone.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from hcsdl.machine.facts import stale_segments

FOLDER = Path("/dev/shm")
_held: dict[Path, int] = {}  # file descriptors with our lock


def hold_own(folder: Path = FOLDER) -> None:
    """Lock this process's files for as long as it lives."""
    for path in folder.glob(f"{os.getpid()}:*"):
        if path not in _held:
            with suppress(OSError):
                _held[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                fcntl.flock(_held[path], fcntl.LOCK_SH)


def remove_own(folder: Path = FOLDER) -> None:
    """Remove the names of this process's files. Who has them mapped keeps the memory; nobody new can map it."""
    for path in folder.glob(f"{os.getpid()}:*"):
        with suppress(OSError):
            path.unlink()


def remove_stale(folder: Path = FOLDER) -> None:
    """Remove this user's files of processes that have ended."""
    for path in stale_segments(folder):
        with suppress(OSError):  # removed meanwhile, or somebody lives who holds it
            if path.stat().st_uid == os.getuid():
                _remove_unless_held(path)


def _remove_unless_held(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(file)
