"""Processes as PyTorch's and Intel's CPU launchers start them: another allocator preloaded, threads pinned.

In: the machine. Out: paths and environment variables. Source: `torch.backends.xeon.run_cpu` (2.8, 2.13: where it looks, MALLOC_CONF, KMP_*) and
IPEX 2.8's `ipexrun` (GOMP_CPU_AFFINITY, OMP_PROC_BIND, OMP_SCHEDULE for GNU's OpenMP).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hcsdl.config import ConfigError
from hcsdl.machine.placement import Place

ALLOCATORS = ("libtcmalloc.so", "libtcmalloc_minimal.so", "libjemalloc.so")
HOW_TO_GET = (
    "no tcmalloc and no jemalloc found. apt-get install libtcmalloc-minimal4 (or libjemalloc2), conda install -c conda-forge gperftools, or name a "
    "library in bench.preload."
)
TUNING = ("OMP_", "KMP_", "GOMP_", "MKL_", "MALLOC_", "TCMALLOC_", "LD_PRELOAD", "TORCHINDUCTOR_", "ONEDNN_", "DNNL_")
"""Beginnings of the variables by which a user may have tuned the shell; processes that are compared start without them."""


def find_allocator(named: str | None) -> Path | None:
    """Return the library to preload: `named`, else the system's tcmalloc, else its jemalloc; None without any. ConfigError where `named` is no file."""
    if named is not None:
        if not Path(named).is_file():
            raise ConfigError(f"bench.preload must be a shared library. {named} is no file.")
        return Path(named).absolute()
    return _find(ALLOCATORS)


def launcher_environment(place: Place, allocator: Path) -> dict[str, str]:
    """Return the variables those launchers set for a process at `place`: allocator, threads, and where OpenMP puts them."""
    found = {"LD_PRELOAD": str(allocator), "OMP_NUM_THREADS": str(place.threads)}
    if "jemalloc" in allocator.name:
        found["MALLOC_CONF"] = "oversize_threshold:1,background_thread:true,metadata_thp:auto"
    intel = _find(("libiomp5.so",))
    if intel is not None:
        found["LD_PRELOAD"] = f"{intel}:{allocator}"
        return found | {"KMP_AFFINITY": "granularity=fine,compact,1,0", "KMP_BLOCKTIME": "1"}
    cpus = " ".join(str(core.cpus[0]) for core in place.cores)
    pinned = {"GOMP_CPU_AFFINITY": cpus} if place.bound and place.threads == len(place.cores) else {}
    return found | pinned | {"OMP_PROC_BIND": "CLOSE", "OMP_SCHEDULE": "STATIC"}


def _find(names: tuple[str, ...]) -> Path | None:
    folders = [Path(sys.prefix) / "lib", Path.home() / ".local/lib", Path("/usr/local/lib"), Path("/usr/local/lib64"), Path("/usr/lib64")]
    folders += [Path(os.environ["CONDA_PREFIX"]) / "lib"] if "CONDA_PREFIX" in os.environ else []
    folders += [*sorted(Path("/usr/lib").glob("*-linux-gnu")), Path("/usr/lib")]
    return next((path for name in names for folder in folders for path in sorted(folder.glob(f"{name}*"))), None)
