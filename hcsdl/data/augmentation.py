"""What is changed at random in a field when training: crop, flips, quarter turns, gain and offset of every channel.

In: the data settings, the seed, the epoch, the field's name and shape. Out: an `Augmentation`, plain numbers that
`Preprocessing.apply` carries out. Promised: a pure function of its arguments, so the same field in the same epoch is changed in
the same way whatever the number of workers and ranks, and whatever was drawn before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from hcsdl.config import ConfigError, DataConfig


@dataclass(frozen=True)
class Augmentation:
    """One drawn change of one field.

    Order: the window at `origin_px` is cut out, turned by `quarter_turns` (counter-clockwise, as `numpy.rot90` turns), then flipped;
    the scaled channel c becomes ``x * gain[c] + offset[c]``.
    """

    flip_rows: bool
    flip_columns: bool
    quarter_turns: int
    gain: tuple[float, ...]
    offset: tuple[float, ...]
    origin_px: tuple[int, int]

    def orientation(self) -> tuple[bool, bool, bool]:
        """Return turn and flips as (transpose, then flip rows, then flip columns), which strided views can do without a copy."""
        transpose = self.quarter_turns % 2 == 1
        rows, columns = ((False, False), (True, False), (True, True), (False, True))[self.quarter_turns]
        return transpose, rows != self.flip_rows, columns != self.flip_columns


def cropped_size(shape: tuple[int, ...], crop_px: list[int] | tuple[int, ...] | None) -> tuple[int, int]:
    """Return rows and columns that remain of a field of `shape` (…, H, W) after the crop, px.

    Raises
    ------
    ConfigError
        `crop_px` is not two numbers, or larger than the field.
    """
    height, width = shape[-2:]
    if crop_px is None:
        return height, width
    if len(crop_px) != 2:
        raise ConfigError(f"data.crop_px must be [rows, columns]. Got {list(crop_px)} instead.")
    if crop_px[0] > height or crop_px[1] > width:
        raise ConfigError(f"data.crop_px must fit into a field of {height} × {width} px. Got {list(crop_px)} instead: make it smaller.")
    return crop_px[0], crop_px[1]


def window_size(shape: tuple[int, ...], crop_px: list[int] | tuple[int, ...] | None, downsample: int) -> tuple[int, int]:
    """Return rows and columns, full-resolution px, of the window that is used: the crop, less what does not fill a down-sampled pixel.

    Raises
    ------
    ConfigError
        Nothing remains, or the crop does not fit.
    """
    rows, columns = cropped_size(shape, crop_px)
    if min(rows, columns) < downsample:
        raise ConfigError(f"data.downsample must be at most the window's shorter side, {min(rows, columns)} px. Got {downsample} instead.")
    return rows - rows % downsample, columns - columns % downsample


def draw_augmentation(config: DataConfig, seed: int, epoch: int, field_name: str, shape: tuple[int, int, int]) -> Augmentation:
    """Return the change of one field in one epoch.

    The random stream is Philox keyed with the SHA-256 of ``seed/epoch/field``. Gains are log-normal (exp of a normal with the sd
    `config.intensity_jitter`, so never negative), offsets normal with the same sd in units of the scaled image. Every draw is made,
    whatever is switched on, so one setting never shifts another's numbers. A window that is not square gets half turns only.

    Parameters
    ----------
    seed, epoch
        The run's seed, and the number of the visit to this field (`Sampler.global_batch`).
    field_name
        ``plate/well/site``.
    shape
        (C, H, W) of the field as read, before the crop.

    Raises
    ------
    ConfigError
        The crop does not fit into the field.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{field_name}".encode()).digest()
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    flip_rows, flip_columns, turn, top, left = (float(u) for u in random.random(5))
    normals = random.standard_normal((2, shape[0])) * config.intensity_jitter

    rows, columns = window_size(shape, config.crop_px, config.downsample)
    cropped_rows, cropped_columns = cropped_size(shape, config.crop_px)
    turns = int(turn * 4) if config.quarter_turns else 0
    return Augmentation(
        flip_rows=config.flips and flip_rows < 0.5,
        flip_columns=config.flips and flip_columns < 0.5,
        quarter_turns=turns if rows == columns else turns // 2 * 2,
        gain=tuple(np.exp(normals[0]).tolist()),
        offset=tuple(normals[1].tolist()),
        origin_px=(int(top * (shape[1] - cropped_rows + 1)), int(left * (shape[2] - cropped_columns + 1))),
    )
