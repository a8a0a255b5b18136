"""oneCCL's C API (`oneapi/ccl.h`), as much of it as runs on CPUs.

In: addresses of contiguous host buffers. Out: the same buffers, filled. Every call blocks until this rank's part is done, and lets go of Python's lock
meanwhile. A code other than success becomes `CclError` with oneCCL's own text. Not used, because release 2022.1 has them for GPUs alone or not at all:
Send, Recv and GroupStart (the first two end the process with host buffers, tried), CommAbort, CommFinalize, CommGetAsyncError.
"""

from __future__ import annotations

import ctypes
import functools
from enum import IntEnum

from hcsdl.distributed import oneccl_library as library

UNIQUE_ID_BYTES = 4096  # ONECCL_UNIQUE_ID_BYTES


class CclError(RuntimeError):
    """A collective that oneCCL refused, that took too long, or whose peers are gone."""


class DataType(IntEnum):
    """onecclDataType_t."""

    INT8 = 0
    UINT8 = 1
    INT32 = 2
    INT64 = 4
    FLOAT16 = 6
    FLOAT32 = 7
    FLOAT64 = 8
    BFLOAT16 = 9


class Reduction(IntEnum):
    """onecclRedOp_t."""

    SUM = 0
    PRODUCT = 1
    MAX = 2
    MIN = 3


class _UniqueId(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char * UNIQUE_ID_BYTES)]


_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_SIGNATURES = {
    "onecclGetUniqueId": [ctypes.POINTER(_UniqueId)],
    "onecclCommInitRank": [ctypes.POINTER(_POINTER), _SIZE, _UniqueId, _INT],
    "onecclCommDestroy": [_POINTER],
    "onecclAllReduce": [_POINTER, _POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER],
    "onecclReduce": [_POINTER, _POINTER, _SIZE, _INT, _INT, _INT, _POINTER, _POINTER],
    "onecclReduceScatter": [_POINTER, _POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER],
    "onecclBroadcast": [_POINTER, _POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER],
    "onecclAllGather": [_POINTER, _POINTER, _SIZE, _INT, _POINTER, _POINTER],
    "onecclAllToAll": [_POINTER, _POINTER, _SIZE, _INT, _POINTER, _POINTER],
}


@functools.cache
def _c() -> ctypes.CDLL:
    """Return the library with its signatures declared."""
    lib = library.load()
    for name, arguments in _SIGNATURES.items():
        getattr(lib, name).argtypes = arguments
    lib.onecclGetLastError.argtypes, lib.onecclGetLastError.restype = [_POINTER], ctypes.c_char_p
    lib.onecclGetErrorString.argtypes, lib.onecclGetErrorString.restype = [_INT], ctypes.c_char_p
    return lib


def _check(code: int, communicator: ctypes.c_void_p | None = None) -> None:
    if code == 0:
        return
    texts = [_c().onecclGetErrorString(code), _c().onecclGetLastError(communicator)]
    said = [" ".join(text.decode(errors="replace").split()) for text in texts if text]
    raise CclError(f"oneCCL says {': '.join(dict.fromkeys(said)) or 'nothing'} (code {code})")


def unique_id() -> bytes:
    """Return what all ranks of a new communicator must share, 4096 bytes; starts the server in this process where they meet."""
    made = _UniqueId()
    _check(_c().onecclGetUniqueId(ctypes.byref(made)))
    return bytes(made)


class Communicator:
    """`size` ranks that act together; made by all of them at once. Counts are elements of `dtype` a rank; buffers may be the same (in place)."""

    def __init__(self, shared_id: bytes, rank: int, size: int) -> None:
        self._handle = _POINTER()
        _check(_c().onecclCommInitRank(ctypes.byref(self._handle), size, _UniqueId.from_buffer_copy(shared_id), rank))
        self._lib = _c()

    def all_reduce(self, send: int, receive: int, count: int, dtype: DataType, reduction: Reduction) -> None:
        """Every rank receives the reduction of all ranks' `count` elements."""
        _check(self._lib.onecclAllReduce(send, receive, count, dtype, reduction, self._handle, None), self._handle)

    def reduce(self, send: int, receive: int, count: int, dtype: DataType, reduction: Reduction, root: int) -> None:
        """Rank `root` receives the reduction; the other ranks' `receive` is scratch of the same size."""
        _check(self._lib.onecclReduce(send, receive, count, dtype, reduction, root, self._handle, None), self._handle)

    def reduce_scatter(self, send: int, receive: int, count: int, dtype: DataType, reduction: Reduction) -> None:
        """Rank i receives the reduction of all ranks' i-th `count` elements."""
        _check(self._lib.onecclReduceScatter(send, receive, count, dtype, reduction, self._handle, None), self._handle)

    def broadcast(self, buffer: int, num_bytes: int, root: int) -> None:
        """Every rank's buffer becomes `root`'s."""
        _check(self._lib.onecclBroadcast(buffer, buffer, num_bytes, DataType.UINT8, root, self._handle, None), self._handle)

    def all_gather(self, send: int, receive: int, num_bytes: int) -> None:
        """Every rank receives all ranks' `num_bytes`, in rank order."""
        _check(self._lib.onecclAllGather(send, receive, num_bytes, DataType.UINT8, self._handle, None), self._handle)

    def all_to_all(self, send: int, receive: int, num_bytes: int) -> None:
        """Rank i receives every rank's i-th `num_bytes`, in rank order."""
        _check(self._lib.onecclAllToAll(send, receive, num_bytes, DataType.UINT8, self._handle, None), self._handle)

    def destroy(self) -> None:
        """Free what oneCCL holds for this communicator."""
        _check(self._lib.onecclCommDestroy(self._handle))
