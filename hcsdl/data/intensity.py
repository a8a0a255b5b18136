"""Intensity scaling: an offset and a scale for each plate and channel, from the plate's control wells.

In: histograms of the control fields' pixels, after the shading correction. Out: offset and scale, such that ``(x - offset) * scale`` makes
plates comparable. Promised: exact for integer pixels; the same whatever the order of the fields and the number of workers, since counts are
integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hcsdl.config import DataError

BINS = 1 << 17
"""Values 0 … 131,071: a 16-bit pixel divided by a shading of one half still fits; larger ones count as the largest."""
LOW_PERMILLE, HIGH_PERMILLE = 10, 999
"""The 1st and the 99.9th percentile, as whole numbers, so that no rounding moves the place of a pixel."""


def histogram(image: np.ndarray) -> np.ndarray:
    """Return how often each value occurs in each channel: (C, H, W) float32, rounded → (C, BINS) int64."""
    counts = np.empty((len(image), BINS), np.int64)
    for channel, values in enumerate(image):
        whole = np.rint(values).clip(0, BINS - 1).astype(np.int64)
        counts[channel] = np.bincount(whole.ravel(), minlength=BINS)
    return counts


def mean_sd(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation, float64 (C,), of histograms (C, BINS)."""
    values, total = np.arange(counts.shape[1], dtype=np.float64), counts.sum(axis=1)
    mean = (counts * values).sum(axis=1) / total
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / total
    return mean, np.sqrt(variance)


def quantile(counts: np.ndarray, permille: int) -> np.ndarray:
    """Return the least value at or below which at least `permille` ‰ of the pixels lie: histograms (C, BINS) → float64 (C,)."""
    reached = counts.cumsum(axis=1) * 1000 >= counts.sum(axis=1, keepdims=True) * permille
    return reached.argmax(axis=1).astype(np.float64)


def scaling(counts: np.ndarray, how: str, plate: str, channels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return offset and scale of one plate, both float32 (C,).

    Parameters
    ----------
    counts
        (C, BINS) int64, summed histograms of the plate's control fields.
    how
        ``dmso_meansd``: offset = mean, scale = 1 / sd. ``dmso_percentiles``: offset = 1st percentile, scale = 1 / (99.9th - 1st).
    plate, channels
        For the messages.

    Raises
    ------
    DataError
        A channel has the same value everywhere (sd, or the distance between the percentiles, is 0).
    """
    if how == "dmso_meansd":
        offset, spread = mean_sd(counts)
    else:
        offset = quantile(counts, LOW_PERMILLE)
        spread = quantile(counts, HIGH_PERMILLE) - offset
    for channel, value in zip(channels, spread, strict=True):
        if not value > 0:
            raise DataError(
                f"data.intensity={how} needs control pixels that differ. Channel {channel} of plate {plate} is constant "
                "in its control wells: run `hcsdl check check.level=pixels`, leave the plate out, or set data.intensity=none."
            )
    return offset.astype(np.float32), (1 / spread).astype(np.float32)
