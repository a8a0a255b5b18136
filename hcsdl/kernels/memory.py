"""Where large tensors live: in huge pages that are kept when freed and never fall to pieces (`native/tensor_memory.cpp`).

In: nothing. Out: torch takes CPU tensors of 4 MiB or more from there (of 8 where the machine has more than 64 GiB, and so on). Promised: their numbers are
the same; no more is held than was needed at the same time, to 2 MiB a tensor for each 64 GiB of the machine; where it cannot be had (no C++ compiler, no
headers of torch, a limit on addresses), everything stays as it was and the reason is told.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from hcsdl.kernels.native.build import NoLibrary, library

SOURCE = Path(__file__).parent / "native" / "tensor_memory.cpp"
RESERVED_BYTES = 2**42  # addresses alone: many times a server's memory, a thirty-second of what a process has


def keep_tensors_in_huge_pages() -> str:
    """Let torch's large CPU tensors come from huge pages from now on, for good; return why not, empty where they do."""
    try:
        taken = _functions().install(RESERVED_BYTES)
    except NoLibrary as error:
        return f"{error}"
    return "" if taken else "the addresses could not be reserved"


def release_freed_tensors() -> None:
    """Give the pages of freed large tensors back to the kernel, if there are such."""
    if _functions.cache_info().currsize:
        _functions().release()


@cache
def _functions() -> ctypes.CDLL:
    made = library(SOURCE)
    made.install.argtypes = (ctypes.c_size_t,)
    return made
