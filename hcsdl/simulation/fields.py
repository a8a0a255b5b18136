"""Draws one field of view: cells, and everything that differs between plates, wells and fields without any compound's doing.

In: a seed, a `Field`, an effect, a size. Out: uint16 (3, rows, columns): DAPI, Tubulin, Actin.
Promised: the pixels depend on the arguments alone; with effect 0 they do not depend on the treatment at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter

from hcsdl.simulation.cells import MARGIN_PX, draw_cell
from hcsdl.simulation.compounds import active_fraction
from hcsdl.simulation.drift import LARGEST_BLUR_PX, Drift, drift
from hcsdl.simulation.layout import COLUMNS, ROWS, Field
from hcsdl.simulation.phenotypes import UNTREATED, Look, looks

CELLS_PER_PX = 118 / (1024 * 1280)  # 60 to 150 cells in a full-resolution field
BRIGHTNESS = np.array([900.0, 700.0, 650.0], np.float32)  # mean over an untreated cell's area, in grey levels
AROUND_PX = 45  # cells centred this far outside the field are drawn too, in part
PAD_PX = MARGIN_PX + AROUND_PX
OFFSET = 30.0  # of the camera, in grey levels
_EDGE, _LEVELS = 0.05, np.linspace(0, 1, 65)
_BATCH, _PLATE, _WELL, _FIELD = 3, 4, 5, 6  # first words of the seeds of what is random here


@dataclass(frozen=True)
class Conditions:
    """How a field was stained and imaged: what no compound changes.

    `gain` and `background` (grey levels) have one number a channel, `shading` (3, 5) the parameters of `shading_field`; `noise` is the
    sd of the noise in square roots of grey levels, `blur_px` the sd of the blur, `density` the cells over those of a usual field.
    """

    gain: np.ndarray
    background: np.ndarray
    shading: np.ndarray
    noise: float
    blur_px: float
    density: float


def conditions(seed: int, field: Field) -> Conditions:
    """Return the conditions of a field: those of its batch, plate, well and site, one on top of the other."""
    batch = np.random.default_rng([seed, _BATCH, field.batch])
    plate = np.random.default_rng([seed, _PLATE, field.plate])
    well = np.random.default_rng([seed, _WELL, field.plate, *field.well.encode()])
    site = np.random.default_rng([seed, _WELL, field.plate, *field.well.encode(), field.site])
    edge = field.well[0] in (ROWS[0], ROWS[-1]) or int(field.well[1:]) in (COLUMNS[0], COLUMNS[-1])
    gain = np.exp(batch.normal(0, 0.25, 3) + plate.normal(0, 0.25, 3) + well.normal(0.08 * edge, 0.09, 3) + site.normal(0, 0.04, 3))
    background = 220 * np.exp(batch.normal(0, 0.25, 3) + plate.normal(0, 0.25, 3) + well.normal(0.1 * edge, 0.08, 3))
    density = np.exp(batch.normal(0, 0.08) + plate.normal(0, 0.08) + well.normal(-0.15 * edge, 0.13))
    blur = 0.5 + 0.2 * abs(plate.normal()) + 0.2 * abs(well.normal()) + 0.1 * abs(site.normal())
    return Conditions(
        gain,
        background,
        plate.normal(0, (0.12, 0.12, 0.05, 0.05, 0.05), (3, 5)),
        noise=float(plate.uniform(0.6, 1.6)),
        blur_px=float(min(blur, 1.5)),
        density=float(np.clip(density, 0.6, 1.25)),
    )


def shading_field(parameters: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the illumination of one channel, float32 (height, width), mean 1: a slope and a bend, the same on a whole plate."""
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    a, b, c, d, e = (np.float32(value) for value in parameters)
    shade = 1 + a * x + b * y - (np.float32(0.12) + abs(c)) * x * x - (np.float32(0.12) + abs(d)) * y * y + e * x * y
    shade = np.maximum(shade, np.float32(0.3))
    return shade / shade.mean()


def draw_field(seed: int, field: Field, effect: float, height: int, width: int, batch_effect: float = 0.0) -> np.ndarray:
    """Return the images of a field.

    Parameters
    ----------
    seed : int
        Seed of the simulation.
    field : Field
        Where the field is and what was done to it; its file names play no part.
    effect : float
        Multiplies the fraction of cells that a treatment changes (at most 0.98).
    height, width : int
        Size in pixels. Cells keep theirs: a smaller field has fewer of them.
    batch_effect : float
        Strength of the drift from batch to batch, beside the conditions every simulation has.

    Returns
    -------
    numpy.ndarray
        uint16 (3, height, width): DAPI, Tubulin, Actin, in grey levels.
    """
    about, batch = conditions(seed, field), None
    if batch_effect:
        batch = drift(seed, field.batch, field.plate, field.well, batch_effect)
        about = _drifted(about, batch)
    base = np.random.SeedSequence([seed, _FIELD, field.plate, *field.well.encode(), field.site])
    places, kinds, cells, noise = base.spawn(4)
    canvases = np.zeros((3, height + 2 * PAD_PX, width + 2 * PAD_PX), np.float32)
    centres = positions(about.density, height, width, np.random.default_rng(places))
    chosen = _choose(field, effect, len(centres), np.random.default_rng(kinds), batch)
    for (y, x), look, one in zip(centres, chosen, cells.spawn(len(centres)), strict=True):
        draw_cell(canvases, y, x, look, np.random.default_rng(one))
    rng = np.random.default_rng(noise)
    images = np.empty((3, height, width), np.uint16)
    for channel in range(3):
        signal = gaussian_filter(canvases[channel, PAD_PX:-PAD_PX, PAD_PX:-PAD_PX], about.blur_px, truncate=2.5)
        light = _even_out(signal) * np.float32(BRIGHTNESS[channel] * about.gain[channel]) + np.float32(about.background[channel])
        light *= shading_field(about.shading[channel], height, width)
        light += np.sqrt(light) * np.float32(about.noise) * rng.standard_normal(light.shape, np.float32) + np.float32(OFFSET)
        images[channel] = np.clip(np.rint(light), 0, 65535)
    return images


def _even_out(signal: np.ndarray) -> np.ndarray:
    """Give the pixels that belong to cells the same histogram in every field, so that a class shows in shapes, not in brightness.

    `signal` is float32 (rows, columns), changed in place; the order of its values stays, background stays.
    """
    inside = signal > _EDGE
    values = signal[inside]
    if values.size:
        signal[inside] = np.interp(values, np.quantile(values[::7], _LEVELS), _EDGE + 3.2 * _LEVELS**2)
    return signal


def positions(density: float, height: int, width: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return the centres (row, column, on the padded canvas) of the cells, kept apart, some of them just outside the field."""
    rows, columns = height + 2 * AROUND_PX, width + 2 * AROUND_PX
    count = max(1, round(CELLS_PER_PX * density * rows * columns))
    found = np.empty((0, 2))
    for _ in range(8 * count):
        if len(found) == count:
            break
        if len(found) and rng.random() < 0.5:  # beside another cell: they grow in islands
            direction = rng.uniform(0, 2 * np.pi)
            point = found[rng.integers(len(found))] + rng.uniform(60, 90) * np.array([np.sin(direction), np.cos(direction)])
        else:
            point = rng.random(2) * (rows, columns)
        if (point >= 0).all() and (point < (rows, columns)).all() and np.hypot(*(found - point).T).min(initial=np.inf) > 52:
            found = np.vstack([found, point])
    return [(int(y) + MARGIN_PX, int(x) + MARGIN_PX) for y, x in found]


def _drifted(about: Conditions, batch: Drift) -> Conditions:
    return replace(
        about,
        gain=about.gain * batch.gain,
        background=about.background * batch.background,
        blur_px=min(about.blur_px + batch.blur_px, LARGEST_BLUR_PX),
        density=float(np.clip(about.density * batch.density, 0.6, 1.25)),
    )


def _choose(field: Field, effect: float, count: int, rng: np.random.Generator, batch: Drift | None) -> list[Look]:
    """Return the look of each of `count` cells: a fraction of them changed by the treatment, the others untreated."""
    treatment = field.treatment
    draws = rng.random((count, 2))
    fraction, changed = 0.0, UNTREATED
    if treatment.concentration > 0 and effect > 0:
        share = active_fraction(treatment.compound, treatment.moa, treatment.concentration) if field.share is None else field.share
        fraction = min(0.98, effect * (batch.share(share) if batch else share))
        changed = looks(treatment.moa, treatment.compound)
    chosen = [_pick(changed if first < fraction else UNTREATED, second) for first, second in draws]
    return [batch.of(look) for look in chosen] if batch else chosen


def _pick(mixture: tuple[tuple[float, Look], ...], draw: float) -> Look:
    for share, look in mixture:
        if draw < share:
            return look
        draw -= share
    return mixture[-1][1]
