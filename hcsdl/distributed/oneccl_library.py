"""Find oneCCL's shared libraries in this Python's own folders and load them, without LD_LIBRARY_PATH. No torch.

In: the installed `oneccl` package, or `$CCL_ROOT`. Out: the C API as a `ctypes.CDLL`, loaded once a process. Promised: what the user has set
in the environment is left as it is; nothing is loaded before the first communicator needs it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

PLUGIN = "libccl_legacy_cpu.so"  # what oneCCL loads for CCL_PLUGIN=ONECCL_LEGACY_CPU; the C API is a front to it
BESIDE = ("libfabric.so", "libmpi.so")  # both come with impi-rt; the transports ofi and mpi
MISSING_FILE = re.compile(r"^(\S+): cannot open shared object file")


def folder() -> Path | None:
    """Return the folder with oneCCL's libraries, None where there is none: `$CCL_ROOT/lib`, the `oneccl` package's, this Python's `lib`.

    The first one that has all it needs; where none has, the first with oneCCL itself.
    """
    candidates = [Path(os.environ["CCL_ROOT"]) / "lib"] if os.environ.get("CCL_ROOT") else []
    with suppress(metadata.PackageNotFoundError):
        candidates += [Path(str(file.locate())).parent for file in metadata.files("oneccl") or () if file.name == PLUGIN]
    candidates.append(Path(sys.prefix) / "lib")
    found = [path.resolve() for path in candidates if (path / PLUGIN).exists() and _front(path)]
    return next((path for path in found if not _lacking(path)), found[0] if found else None)


def _lacking(path: Path) -> list[str]:
    """Return which of the libraries are not in a folder that oneCCL needs beside it. oneAPI's modules put them elsewhere, on LD_LIBRARY_PATH."""
    return [name for name in BESIDE if not any(path.glob(f"{name}*"))]


def _front(path: Path) -> Path | None:
    """Return the library with the C API: of libccl.so.1, libccl.so.2, … the one with the highest number, from 2."""
    found = {int(p.suffix[1:]): p for p in path.glob("libccl.so.*") if p.suffix[1:].isdigit()}
    newest = max(found, default=0)
    return found[newest] if newest >= 2 else None


def missing() -> str:
    """Return why oneCCL cannot be loaded here, in a sentence; empty if all files it needs are there. Loads nothing."""
    path = folder()
    if path is None:
        return f"oneCCL's libraries must be installed (pip install 'oneccl>=2021.17'). {PLUGIN} was found neither in $CCL_ROOT/lib nor with a package of {sys.prefix}."
    lacking = _lacking(path)
    return f"oneCCL needs {' and '.join(lacking)} beside it (pip install impi-rt). Not found in {path}." if lacking else ""


def set_defaults(values: Mapping[str, str]) -> None:
    """Put `values` into the environment where the user has set nothing."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


@functools.cache
def load() -> ctypes.CDLL:
    """Load oneCCL (once) and return its C API. Raises OSError with the loader's text where a library is missing or does not fit."""
    path = folder()
    if path is None or missing():
        raise OSError(missing())
    fabric = next(p for p in sorted(path.glob("libfabric.so*"), key=lambda p: -len(p.name)))
    set_defaults({"FI_PROVIDER_PATH": str(path), "CCL_OFI_LIBRARY_PATH": str(fabric)})
    front = _load_with_needed(path, _front(path) or path)
    _load_with_needed(path, path / PLUGIN)
    return front


def _load_with_needed(path: Path, library: Path) -> ctypes.CDLL:
    """Load `library`; what the loader does not find, and lies in `path`, is loaded first. Sonames move between releases, so none is written down here."""
    for _ in range(100):
        try:
            return _opened(library)
        except OSError as error:
            needed = MISSING_FILE.match(str(error))
            if needed is None or needed[1] == str(library) or not (path / needed[1]).exists():
                raise
            _load_with_needed(path, path / needed[1])
    raise OSError(f"{library} does not load, though everything it needs is in {path}.")


def _opened(library: Path) -> ctypes.CDLL:
    """Return `ctypes.CDLL(library)`, which would hold Python's lock meanwhile: from a slow disk for so long that the other ranks miss our heartbeat."""
    loader = ctypes.CDLL(None)
    loader.dlopen.argtypes, loader.dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    loader.dlerror.argtypes, loader.dlerror.restype = [], ctypes.c_char_p
    handle = loader.dlopen(os.fsencode(library), os.RTLD_NOW | os.RTLD_GLOBAL)
    if not handle:
        raise OSError((loader.dlerror() or b"").decode(errors="replace"))
    return ctypes.CDLL(str(library), handle=handle)
