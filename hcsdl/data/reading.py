"""Image files → arrays.

In: the paths of a field's channels, one single-channel TIFF file each. Out: the field, (C, H, W), uint8 or uint16 as stored.
Promised: a file that is missing, truncated, no TIFF, of another type or of another shape than its sister channels raises
`DataError` naming it, and never comes back as pixels; an uncompressed file costs little more than one copy of its bytes.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile

from hcsdl.config import DataError

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would log of a bad file is raised here

DTYPES = (np.dtype("uint8"), np.dtype("uint16"))


def read_field(paths: Sequence[Path]) -> np.ndarray:
    """Read one field of view.

    Parameters
    ----------
    paths : one file per channel, in channel order; the first page of each is read.

    Returns
    -------
    Array (C, H, W), uint8 or uint16, C-contiguous, native byte order, the stored values.

    Raises
    ------
    DataError : a file is missing, truncated, not a TIFF, not a 2-D image of uint8 or uint16, or unlike the field's first channel.
    """
    if not paths:
        raise DataError("A field must have at least one channel. Got no image path instead: check the channels of the index.")
    field: np.ndarray | None = None
    for channel, path in enumerate(paths):
        with _Opened(path) as page:
            shape, dtype = _checked(page, path)
            if field is None:
                field = np.empty((len(paths), *shape), dtype)
            if (shape, dtype) != (field.shape[1:], field.dtype):
                raise DataError(
                    f"The channels of a field must be alike: {paths[0]} is {_words(field.shape[1:], field.dtype)}, but {path} "
                    f"is {_words(shape, dtype)}. Replace the file or leave the field out with plates.query."
                )
            _read_page(page, field[channel])
    assert field is not None
    return field


def read_header(path: Path) -> tuple[tuple[int, int], np.dtype]:
    """Read what a TIFF file says about itself, not its pixels, and check that all of them are there.

    Returns
    -------
    (rows, columns) in px, and the dtype, uint8 or uint16.

    Raises
    ------
    DataError : as `read_field`; truncation shows as pixel data that would end behind the end of the file.
    """
    with _Opened(path) as page:
        return _checked(page, path)


class _Opened:
    """The first page of a TIFF file, as a context; whatever goes wrong inside leaves as a `DataError` that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> tifffile.TiffPage:
        try:
            if self.path.exists() and not self.path.is_file():
                raise OSError("not a regular file")  # opening a FIFO would wait for ever
            self.tiff = tifffile.TiffFile(self.path)
        except Exception as error:  # tifffile's parser lets many types through on garbage
            raise _explained(error, self.path) from error
        try:
            page = self.tiff.pages[0]
            assert isinstance(page, tifffile.TiffPage)
            return page
        except Exception as error:
            self.tiff.close()
            raise _explained(error, self.path) from error

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.tiff.close()
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise _explained(error, self.path) from error


def _explained(error: Exception, path: Path) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"An image is missing: {path}. Put it there, or correct its name in the image CSV file.")
    if isinstance(error, OSError):
        return DataError(f"An image cannot be opened: {path} ({error.strerror or error}). Check the disk and the permissions.")
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"An image must be a whole TIFF file: {path} cannot be read ({reason}). Copy it again from its source.")


def _checked(page: tifffile.TiffPage, path: Path) -> tuple[tuple[int, int], np.dtype]:
    """Return the page's shape and dtype once it is known to be a plain image with all of its data inside the file."""
    if page.dtype not in DTYPES or len(page.shape) != 2 or 0 in page.shape:
        raise DataError(
            f"An image must be one channel (rows, columns) of uint8 or uint16: {path} is {_words(page.shape, page.dtype)}. "
            "Convert it, or leave the field out with plates.query."
        )
    size = page.parent.filehandle.size
    end = max((start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0)
    if page.is_contiguous:
        end = page.dataoffsets[0] + page.nbytes
    elif not len(page.dataoffsets) == len(page.databytecounts) == math.prod(page.chunked):
        raise DataError(
            f"An image must be a whole TIFF file: {path} lists {len(page.dataoffsets)} of {math.prod(page.chunked)} pieces. "
            "Copy it again from its source."
        )
    if end > size:
        raise DataError(
            f"An image must be a whole TIFF file: {path} is truncated, it has {size} bytes and its pixels end at byte {end}. "
            "Copy it again from its source."
        )
    return (page.shape[0], page.shape[1]), np.dtype(page.dtype)


def _read_page(page: tifffile.TiffPage, out: np.ndarray) -> None:
    """Fill `out` (H, W) with the page's pixels; plain uncompressed ones go from the file into it without a detour."""
    native = out.dtype.itemsize == 1 or page.parent.byteorder == ("<" if sys.byteorder == "little" else ">")
    if page.is_final and native:
        stream = page.parent.filehandle
        stream.seek(page.dataoffsets[0])
        if stream.readinto(memoryview(out).cast("B")) != out.nbytes:
            raise ValueError("the file ends before its pixels do")
    else:
        out[...] = page.asarray()


def _words(shape: Sequence[int], dtype: np.dtype | None) -> str:
    return f"{' x '.join(map(str, shape)) or 'empty'} {dtype or 'of no known type'}"
