"""Shading: how unevenly a microscope lights and sees a field, estimated for each plate and channel from many fields.

In: fields of one plate. Out: a coarse grid whose bilinear up-sampling is the shading function, mean 1; images are divided by it.
Promised: with 50 fields or more, a smooth multiplicative shading is recovered to 5 %.

Method: the fields' median or mean at each place, smoothed: the retrospective multi-image correction of Singh et al. 2014
(J. Microsc. 256:231, doi:10.1111/jmi.12178) and of CellProfiler's CorrectIlluminationCalculate ("Regular", all images).
Departures: each field is first averaged into a coarse grid, since the result is smooth anyway (a plate's stack then takes megabytes,
not gigabytes); the Gaussian window fits a local line, not a local constant, and so has no bias at the border, where shading is strongest.
An additive camera offset is not estimated: a large one makes the shading look flatter than it is.
"""

from __future__ import annotations

import numpy as np

from hcsdl.config import ConfigError, DataError

MIN_FIELDS = 50
GRID_CELLS = 64
"""Cells along the shorter side of a field: 16 × 16 px each at 1024 × 1280."""
SMOOTHING = 0.12
"""Standard deviation of the Gaussian window, in units of the field's shorter side; a compromise found on simulated shading."""
FLOOR = 0.05
"""Least value of a shading function, against division by nothing in dark corners; a guess."""


def coarse_grid(image: np.ndarray) -> np.ndarray:
    """Return the means of the blocks of an image: (C, H, W) unsigned integers → (C, h, w) float32, h or w about `GRID_CELLS`."""
    height, width = image.shape[1:]
    block = max(1, min(height, width) // GRID_CELLS)
    row_edges = np.linspace(0, height, max(1, height // block) + 1).astype(int)
    column_edges = np.linspace(0, width, max(1, width // block) + 1).astype(int)
    sums = np.add.reduceat(np.add.reduceat(image, row_edges[:-1], axis=1, dtype=np.uint64), column_edges[:-1], axis=2)
    return (sums / np.outer(np.diff(row_edges), np.diff(column_edges))).astype(np.float32)


def _local_line(cells: int, sigma: float) -> np.ndarray:
    """Return the (cells, cells) matrix that replaces each value by a Gaussian-weighted straight-line fit around it.

    Local linear regression (Fan & Gijbels 1996, Local Polynomial Modelling, section 2.3): row i holds the weights
    ``w_j (S2 - S1 d_j) / (S0 S2 - S1²)``, with d_j = j - i, w_j = exp(-d_j² / 2 sigma²) and S_k = sum_j w_j d_j^k.
    """
    if cells == 1:
        return np.ones((1, 1))
    distance = np.arange(cells)[None, :] - np.arange(cells)[:, None]
    weight = np.exp(-0.5 * (distance / sigma) ** 2)
    s0, s1, s2 = ((weight * distance**k).sum(1, keepdims=True) for k in range(3))
    return weight * (s2 - s1 * distance) / (s0 * s2 - s1**2)


def smooth(grid: np.ndarray) -> np.ndarray:
    """Return (C, h, w) float32 values smoothed along rows and columns with a Gaussian window of `SMOOTHING` × the shorter side."""
    sigma = max(SMOOTHING * min(grid.shape[1:]), 0.5)
    rows, columns = (_local_line(cells, sigma) for cells in grid.shape[1:])
    return np.einsum("ij,cjk,lk->cil", rows, grid.astype(np.float64), columns, optimize=True).astype(np.float32)


def fit_shading(grids: np.ndarray, how: str, plate: str, shape: tuple[int, int]) -> np.ndarray:
    """Return the shading functions of one plate.

    Parameters
    ----------
    grids
        (fields, C, h, w) float32, `coarse_grid` of each field. All-black fields are left out.
    how
        ``median`` or ``mean`` over the fields.
    plate
        For the messages.
    shape
        (H, W) of a field, px, at which the mean is made 1.

    Returns
    -------
    numpy.ndarray
        (C, h, w) float32 with mean 1 when up-sampled to `shape`, at least `FLOOR` before that.

    Raises
    ------
    ConfigError
        Fewer than `MIN_FIELDS` fields that are not black.
    DataError
        A channel is black in most fields.
    """
    lit = grids[grids.max(axis=(1, 2, 3)) > 0] if len(grids) else grids
    if len(lit) < MIN_FIELDS:
        raise ConfigError(f"data.illumination={how} needs at least {MIN_FIELDS} fields that are not black on every plate. Got {len(lit)} "
                          f"on plate {plate}: set data.illumination=none, or index all fields of the plate (plates.query).")
    middle = np.median(lit, axis=0) if how == "median" else lit.mean(axis=0, dtype=np.float64)
    grid = smooth(middle)
    level = grid.mean(axis=(1, 2), keepdims=True)
    if (level <= 0).any():
        raise DataError(f"data.illumination={how} needs light in every channel. Channel {int(np.argmin(level))} (from 0) of plate {plate} "
                        "is black in most fields: leave the plate out (plates.query), or set data.illumination=none.")
    grid = np.maximum(grid / level, FLOOR)
    rows, columns = np.arange(shape[0], dtype=np.float32), np.arange(shape[1], dtype=np.float32)
    means = np.array([upsample(one, rows, columns, shape).mean(dtype=np.float64) for one in grid])
    return (grid / means[:, None, None]).astype(np.float32)


def interpolation(places_px: np.ndarray, size_px: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, for places along one side of a field, the grid cell before each, int64, and the weight of the next one, float32.

    `places_px` counts from 0 at the centre of the first pixel. A cell's value belongs to its centre; beyond the outermost centres the
    line goes on.
    """
    at = (places_px + 0.5) * (cells / size_px) - 0.5
    lower = np.clip(np.floor(at), 0, max(cells - 2, 0)).astype(np.int64)
    return lower, (at - lower).astype(np.float32)


def upsample(grid: np.ndarray, rows_px: np.ndarray, columns_px: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a grid (h, w) at the given places of a field of `shape`, px: (rows, columns) float32, bilinear.

    The plain form of what `Preprocessing.apply` does block by block.
    """
    across = upsample_columns(grid, columns_px, shape[1])
    lower, weight = interpolation(rows_px, shape[0], grid.shape[0])
    return across[lower] + weight[:, None] * slopes(across)[lower]


def upsample_columns(grid: np.ndarray, columns_px: np.ndarray, width_px: int) -> np.ndarray:
    """Return a grid (h, w) up-sampled along its columns only: (h, columns) float32."""
    lower, weight = interpolation(columns_px, width_px, grid.shape[1])
    before, after = (np.take(grid, at, axis=1) for at in (lower, np.minimum(lower + 1, grid.shape[1] - 1)))  # take: in C order
    return before + weight * (after - before)


def slopes(across: np.ndarray) -> np.ndarray:
    """Return the difference between each row and the next, (h, columns); 0 for the last."""
    return np.diff(across, axis=0, append=across[-1:])
