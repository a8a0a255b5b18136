"""Which libfabric providers work on this host: what oneCCL would send over. No torch.

In: oneCCL's folder. Out: names such as `psm3`, `verbs;ofi_rxm`, `tcp`, in libfabric's own order of preference, of those that FI_PROVIDER allows.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

VERSION = 1 << 16 | 10  # FI_VERSION(1, 10): rdma/fabric.h of 2020, older than any oneCCL with a C API
ANSWER_S = 60.0  # a provider may look for its hardware for a while; a guess


class _FabricAttributes(ctypes.Structure):
    """The beginning of `struct fi_fabric_attr`."""

    _fields_ = [("fabric", ctypes.c_void_p), ("name", ctypes.c_char_p), ("provider", ctypes.c_char_p)]


class _Info(ctypes.Structure):
    """`struct fi_info` up to `fabric_attr`; its layout is part of libfabric's stable binary interface."""


_Info._fields_ = [
    ("next", ctypes.POINTER(_Info)), ("caps", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("addr_format", ctypes.c_uint32),
    ("src_addrlen", ctypes.c_size_t), ("dest_addrlen", ctypes.c_size_t), ("src_addr", ctypes.c_void_p), ("dest_addr", ctypes.c_void_p),
    ("handle", ctypes.c_void_p), ("tx_attr", ctypes.c_void_p), ("rx_attr", ctypes.c_void_p), ("ep_attr", ctypes.c_void_p),
    ("domain_attr", ctypes.c_void_p), ("fabric_attr", ctypes.POINTER(_FabricAttributes)),
]  # fmt: skip


def providers(folder: Path) -> list[str]:
    """Return the providers that libfabric in `folder` finds working here, each once.

    Raises OSError with the loader's or libfabric's words. A process of its own is asked, so that no provider's threads stay in this one.
    """
    environment = {"FI_PROVIDER_PATH": str(folder)} | os.environ
    try:
        said = subprocess.run(
            [sys.executable, "-m", __name__, str(folder)], env=environment, capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"libfabric in {folder} did not answer within {ANSWER_S:g} s") from error
    if said.returncode:
        raise OSError((said.stderr.strip() or f"libfabric in {folder} ended with code {said.returncode}").splitlines()[-1])
    return json.loads(said.stdout.splitlines()[-1])


@functools.cache
def refusal(folder: Path) -> str:
    """Return a sentence where FI_PROVIDER, which clusters' modules set, allows no provider that works here: oneCCL would crash. Else empty."""
    asked = os.environ.get("FI_PROVIDER")
    try:
        if not asked or providers(folder):
            return ""
    except OSError as error:
        return f"libfabric must start. {error}; reinstall oneccl and impi-rt."
    return f"FI_PROVIDER must name a provider of libfabric that works here. None of {asked!r} does with {folder}: unset it, or set FI_PROVIDER=tcp."


def _ask(folder: Path) -> list[str]:
    library = ctypes.CDLL(str(next(iter(sorted(folder.glob("libfabric.so*"), key=lambda p: -len(p.name))))), mode=ctypes.RTLD_GLOBAL)
    found = ctypes.POINTER(_Info)()
    code = library.fi_getinfo(ctypes.c_uint32(VERSION), None, None, ctypes.c_uint64(0), None, ctypes.byref(found))
    if code == -errno.ENODATA:
        return []
    if code:
        library.fi_strerror.restype = ctypes.c_char_p
        raise OSError(library.fi_strerror(-code).decode())
    names = []
    while found:
        names.append(found.contents.fabric_attr.contents.provider.decode())
        found = found.contents.next
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    print(json.dumps(_ask(Path(sys.argv[1]))))
