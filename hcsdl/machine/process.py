"""Processes: environment of a rank, dying with whoever started us, and libraries that talk too much."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def rank_environment(threads: int) -> dict[str, str]:
    """Return this process's environment with the settings a rank needs before any import: its compute threads."""
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    return quiet | os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, and exit at once if `parent` (a process id) has already gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def held_back_output() -> Iterator[None]:
    """Hold back what native libraries print (file descriptors 1 and 2) inside the context; it is shown only if the context raises."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 1)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            _restore(kept)
            held.seek(0)
            os.write(2, held.read())
            raise
        _restore(kept)


def _restore(kept: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number, copy in zip((1, 2), kept, strict=True):
        os.dup2(copy, number)
        os.close(copy)
