"""Shading: how unevenly a microscope lights and sees a field, estimated for each plate and channel from many fields.

In: fields of one plate. Out: a coarse grid whose bilinear up-sampling is the shading function, mean 1, and the camera's offset;
``(image - offset) / shading`` is even. Promised: from 50 fields, sparse or confluent, a smooth multiplicative shading is recovered to
5 %; so it is with a camera offset, if the background's brightness differs from field to field, else the offset is taken as 0.

Method: the retrospective multi-image correction of Singh et al. 2014 (J. Microsc. 256:231, doi:10.1111/jmi.12178) and of
CellProfiler's CorrectIlluminationCalculate, which smooth the fields' median or mean at each place. Departures: each field is first
averaged into a coarse grid (a plate's stack then takes megabytes, not gigabytes); fields are made equally bright; only their darker
part counts, since where cells cover half of a field the median is background here and cell there (plain median and mean were wrong by
10 to 50 % in corners of simulated plates); the Gaussian window fits a parabola, not a constant, and so has no bias at the border;
and the offset.
"""

from __future__ import annotations

import numpy as np

from hcsdl.config import ConfigError, DataError

MIN_FIELDS = 50
GRID_CELLS = 64
"""Cells along the shorter side of a field: 16 × 16 px each at 1024 × 1280."""
SMOOTHING = 0.2
"""Standard deviation of the Gaussian window, in units of the field's shorter side. Tried from 0.1 to 1 on simulated shading, with local
planes, parabolas and cubics: wider windows miss strong vignetting, narrower ones follow the cells in the corners."""
DARKER = 1.7
"""Blocks up to this many times a field's `LOW` quantile are its darker part; chosen, with `LOW`, on simulated plates."""
LOW = 0.1
ROUNDS = 4
OFFSET_ERROR = 0.03
"""An estimated offset counts only if the standard error of `_stretch` is at most this."""
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


def smooth(grid: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Return (h, w) float64 values, each replaced by that of a parabola fitted around it, under a Gaussian window times `weight` (h, w).

    Local quadratic regression in two dimensions (Fan & Gijbels 1996, Local Polynomial Modelling, chapter 3): with window weights w and
    monomials m of the distance, the coefficients solve ``(sum w m mᵀ) b = sum w m value``; b₀ is the fit at the centre. Window and
    monomials are products of a function of the row and one of the column, so all sums are matrix products.
    """
    height, width = grid.shape
    weight = np.ones(grid.shape) if weight is None else weight
    sigma = SMOOTHING * min(height, width)
    degrees = [(p, q) for p in range(3) for q in range(3 - p) if height > 2 * p and width > 2 * q]
    rows, columns = (
        [np.exp(-0.5 * d**2) * d**p for p in range(5)]
        for d in ((np.arange(n)[None, :] - np.arange(n)[:, None]) / sigma for n in (height, width))
    )
    normal = np.array([[rows[p + r] @ weight @ columns[q + s].T for r, s in degrees] for p, q in degrees])
    sides = np.array([rows[p] @ (weight * grid) @ columns[q].T for p, q in degrees])
    return np.linalg.solve(normal.transpose(2, 3, 0, 1), sides.transpose(1, 2, 0)[..., None])[..., 0, 0]


def _fit_channel(values: np.ndarray, how: str) -> tuple[np.ndarray, float]:
    """Return the shading (h, w), mean 1, and the camera's offset from one channel's grids (fields, h, w)."""
    shading = np.ones(values.shape[1:])
    middle = np.nanmedian if how == "median" else np.nanmean
    for _ in range(ROUNDS):
        flat = values / shading
        level = np.maximum(np.quantile(flat, LOW, axis=(1, 2), keepdims=True), 1e-6)
        dark = flat < DARKER * level
        count = dark.sum(axis=0)
        part = np.where(dark, values / level, np.nan)
        part[0, count == 0] = shading[count == 0]  # where it is never dark the last estimate stands, with little weight
        shading = _even(smooth(middle(part, axis=0), count + 0.01))
    stretch, level = _stretch(values, shading, dark)
    return np.maximum(1 + stretch * (shading - 1), FLOOR), level * (1 - 1 / stretch)


def _even(shading: np.ndarray) -> np.ndarray:
    return np.maximum(shading / shading.mean(), FLOOR)


def _stretch(values: np.ndarray, shading: np.ndarray, dark: np.ndarray) -> tuple[float, float]:
    """Return how much more uneven the true shading is than it looks because of a camera offset, at least 1, and the fields' mean level.

    Background is ``offset + s B`` with the true shading s, mean 1, and the field's brightness B. Over the fields its mean looks like the
    shading ``S = (offset + s mean(B)) / level``, with ``level = offset + mean(B)``, flatter than s; but where B is brighter by d, it is
    brighter by ``s d``. So ``value - S level - d = k (S - 1) d`` with ``k = level / mean(B)`` and ``s = 1 + k (S - 1)``: k is the slope of
    a regression through the origin. Its standard error takes each field as one observation (Cameron & Miller 2015, J. Hum. Resour. 50:317).
    """
    flat = np.where(dark, values / shading, np.nan)
    levels = np.array([np.nanmedian(one) if (~np.isnan(one)).any() else 0 for one in flat])[:, None, None]
    level = float(levels.mean())
    brighter = levels - level
    background = np.abs(flat - levels) < 0.1 * levels
    x = np.where(background, (shading - 1) * brighter, 0)
    y = np.where(background, values - shading * level - brighter, 0)
    products, squares = (x * y).sum(axis=(1, 2)), (x * x).sum(axis=(1, 2))
    if squares.sum() <= 0:
        return 1.0, level
    stretch = float(products.sum() / squares.sum())
    error = np.sqrt(((products - stretch * squares) ** 2).sum()) / squares.sum()
    return (max(stretch, 1.0), level) if error <= OFFSET_ERROR else (1.0, level)


def fit_shading(grids: np.ndarray, how: str, plate: str, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the shading functions of one plate, and the camera's offsets.

    Parameters
    ----------
    grids
        (fields, C, h, w) float32, `coarse_grid` of each field. All-black fields are left out.
    how
        ``median`` or ``mean`` over the darker parts of the fields.
    plate
        For the messages.
    shape
        (H, W) of a field, px, at which the mean is made 1.

    Returns
    -------
    shading
        (C, h, w) float32 with mean 1 when up-sampled to `shape`, at least `FLOOR` before that.
    dark
        (C,) float32, what the camera adds to every pixel, in stored units; 0 where it cannot be told.

    Raises
    ------
    ConfigError
        Fewer than `MIN_FIELDS` fields that are not black.
    DataError
        A channel is black in most fields.
    """
    lit = grids[grids.max(axis=(1, 2, 3)) > 0] if len(grids) else grids
    if len(lit) < MIN_FIELDS:
        raise ConfigError(
            f"data.illumination={how} needs at least {MIN_FIELDS} fields that are not black on every plate. Got {len(lit)} "
            f"on plate {plate}: set data.illumination=none, or index all fields of the plate (plates.query)."
        )
    black = np.flatnonzero(np.median(lit.max(axis=(2, 3)), axis=0) <= 0)
    if len(black):
        raise DataError(
            f"data.illumination={how} needs light in every channel. Channel {black[0]} (from 0) of plate {plate} "
            "is black in most fields: leave the plate out (plates.query), or set data.illumination=none."
        )
    rows, columns = np.arange(shape[0], dtype=np.float32), np.arange(shape[1], dtype=np.float32)
    shading, dark = np.empty(lit.shape[1:], np.float32), np.empty(lit.shape[1], np.float32)
    for channel in range(lit.shape[1]):
        values = lit[:, channel].astype(np.float64)
        grid, dark[channel] = _fit_channel(values[values.max(axis=(1, 2)) > 0], how)
        shading[channel] = grid / upsample(grid, rows, columns, shape).mean()
    return shading, dark


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
