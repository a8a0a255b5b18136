"""Stored pixels → scaled pixels: the inner loop of `Preprocessing.apply`.

In: a strided view (C, H, W) of unsigned integers, a coarse shading grid, a gain and a shift for each channel. Out: float32 in a
given array, or those rounded to bf16. Promised: rows are converted in blocks that stay in a core's cache, so main memory is read once
and written once; no threads. (`sending` does the same on a GPU.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hcsdl.data.illumination import interpolation, slopes, upsample_columns

BLOCK_PX = 32768
"""Pixels converted at once: 128 KiB of float32, which stays in a core's second-level cache. torch starts threads of its own for more."""


class ShadingView:
    """The shading function at the pixels of one output image, made block by block.

    Parameters
    ----------
    grid : float32 (C, h, w), turned as the image is.
    dark : float32 (C,), taken off before dividing.
    row_px, column_px : where the output's rows and columns lie in the field, px.
    sides : (H, W) of the field, px.
    """

    def __init__(self, grid: np.ndarray, dark: np.ndarray, row_px: np.ndarray, column_px: np.ndarray, sides: tuple[int, int]) -> None:
        self.dark = dark
        self.across = [upsample_columns(one, column_px, sides[1]) for one in grid]
        self.slopes = [slopes(one) for one in self.across]
        self.lower, self.weight = interpolation(row_px, sides[0], grid.shape[1])
        self.starts = [0, *(np.flatnonzero(np.diff(self.lower)) + 1)]
        """First rows of the runs of output rows that lie between the same two rows of the grid."""
        self.scratch = np.empty((int(np.diff(self.starts, append=len(row_px)).max()), len(column_px)), np.float32)

    def correct(self, block: np.ndarray, channel: int, rows: slice) -> None:
        """Take the offset off `block` (rows, columns), all rows of one run, and divide it by the function, in place."""
        block -= self.dark[channel]
        at, value = self.lower[rows.start], self.scratch[: len(block)]
        np.multiply(self.weight[rows, None], self.slopes[channel][at], out=value)
        value += self.across[channel][at]
        block /= value


@dataclass(frozen=True, eq=False)
class Conversion:
    """What is done to one field: `rows` and `columns` of it are taken, turned, averaged, shaded, scaled.

    Attributes
    ----------
    rows, columns : the window, px of the stored field.
    transpose, flip_rows, flip_columns : what is done to it, in this order.
    downsample : this many pixels a side are averaged into one.
    shading : the shading function at the pixels of the output; None without correction.
    gain, shift : float32 (C,).
    """

    rows: slice
    columns: slice
    transpose: bool
    flip_rows: bool
    flip_columns: bool
    downsample: int
    shading: ShadingView | None
    gain: np.ndarray
    shift: np.ndarray

    def window(self, image: np.ndarray) -> np.ndarray:
        """Return the part of a stored field (C, H, W) that is used, as a view."""
        return image[:, self.rows, self.columns]

    def turned(self, image: np.ndarray) -> np.ndarray:
        """Return that part as it lies in the output, as a view."""
        window = self.window(image)
        window = window.swapaxes(1, 2) if self.transpose else window
        return window[:, :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def convert(view: np.ndarray, downsample: int, shading: ShadingView | None, gain: np.ndarray, shift: np.ndarray, out: np.ndarray) -> None:
    """Write ``(view - dark) / shading * gain + shift`` into `out` (C, H', W'), float32, a block of rows at a time.

    Parameters
    ----------
    view : unsigned integers (C, H' downsample, W' downsample), any strides.
    downsample : this many pixels a side are averaged into one.
    gain, shift : float32 (C,).
    out : or the bits of bf16, as uint16, which numpy has no type for.
    """
    _, height, width = out.shape
    starts = list(range(0, height, max(1, BLOCK_PX // width))) if shading is None else shading.starts
    stops = [*starts[1:], height]
    scratch = np.empty((max(stop - start for start, stop in zip(starts, stops, strict=True)), width), np.float32)
    for start, stop in zip(starts, stops, strict=True):
        block, here = scratch[: stop - start], slice(start, stop)
        for channel, source in enumerate(view):
            if downsample == 1:
                block[...] = source[here]
            else:
                _average(source[start * downsample : stop * downsample], downsample, block)
            if shading is not None:
                shading.correct(block, channel, here)
            block *= gain[channel]
            block += shift[channel]
            _store(block, out[channel, here])


def _store(block: np.ndarray, out: np.ndarray) -> None:
    if out.dtype == np.float32:
        out[...] = block
        return
    rows = max(1, (BLOCK_PX - 1) // block.shape[1])
    for first in range(0, len(block), rows):
        part = torch.from_numpy(block[first : first + rows]).to(torch.bfloat16)
        out[first : first + rows] = part.view(torch.int16).numpy().view(np.uint16)


def _average(source: np.ndarray, downsample: int, block: np.ndarray) -> None:
    """Write the means of the `downsample` × `downsample` squares of `source` into `block`; exact, as long as sums stay below 2^24."""
    block[...] = 0
    for row in range(downsample):
        for column in range(downsample):
            block += source[row::downsample, column::downsample]
    block /= downsample**2
