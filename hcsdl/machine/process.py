"""Processes: environment of a rank, and dying with whoever started us."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def rank_environment(threads: int) -> dict[str, str]:
    """Return this process's environment with the settings a rank needs before any import: its compute threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, and exit at once if `parent` (a process id) has already gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
