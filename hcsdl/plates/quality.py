"""A field of view → numbers on its quality and its intensities.

In: an array (C, H, W). Out: a dict of `QC_*`, `Intensity_*` and `Count_*` numbers; from a table of them, the fields nobody should train on.
Promised: pure functions; percentiles, means and shares are exact (from the histogram of all values), not sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy import fft, ndimage

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
CEILINGS = {1: (255,), 2: (4095, 16383, 65535)}  # by bytes a pixel; 12- and 14-bit cameras store into 16 bits
SATURATED_SHARE = 0.05  # more pixels than this at the ceiling make a field "saturated"; a guess
NUCLEAR = ("dapi", "dna", "hoechst")
NUCLEUS_PX = 8  # smallest nucleus, in pixels of the image as it is labelled; a guess: smoothed noise is smaller, debris often is not
BIN_ABOVE_PX = 512  # from this many rows and columns on, nuclei are counted on pixels averaged 2 x 2


def measure_field(image: np.ndarray, channels: Sequence[str]) -> dict[str, float]:
    """Measure a field of view.

    Parameters
    ----------
    image : (C, H, W), uint8 or uint16.
    channels : C names.

    Returns
    -------
    For every channel: `QC_Focus` (slope, see `focus_slope`), `QC_Saturated` (share of pixels at the camera's ceiling), `QC_Foreground`
    (share above Otsu's threshold), `Intensity_Mean`, `Intensity_Sd` and `Intensity_P01` … `P99` (all in the image's own units), each
    followed by `_<channel>`; and `Count_Nuclei`, on the first channel whose name says DAPI, DNA or Hoechst, or else on the first.
    """
    measured: dict[str, float] = {}
    for channel, plane in zip(channels, image, strict=True):
        counts = histogram(plane)
        mean, sd = _moments(counts)
        measured[f"QC_Focus_{channel}"] = focus_slope(plane)
        measured[f"QC_Saturated_{channel}"] = saturated_share(counts, plane.dtype)
        measured[f"QC_Foreground_{channel}"] = float(counts[otsu_threshold(counts) + 1 :].sum() / plane.size)
        measured[f"Intensity_Mean_{channel}"] = mean
        measured[f"Intensity_Sd_{channel}"] = sd
        for percent, value in zip(PERCENTILES, percentiles(counts, PERCENTILES), strict=True):
            measured[f"Intensity_P{percent:02d}_{channel}"] = value
    nuclear = next((number for number, name in enumerate(channels) if any(word in name.lower() for word in NUCLEAR)), 0)
    measured["Count_Nuclei"] = float(count_nuclei(image[nuclear]))
    return measured


def histogram(plane: np.ndarray) -> np.ndarray:
    """Return how often each value occurs in an image of uint8 or uint16: (largest value + 1,), int64."""
    return np.bincount(plane.ravel())


def _moments(counts: np.ndarray) -> tuple[float, float]:
    values, total = np.arange(len(counts), dtype=np.float64), counts.sum()
    mean = float(counts @ values / total)
    return mean, float(np.sqrt(counts @ (values - mean) ** 2 / total))


def percentiles(counts: np.ndarray, percents: Sequence[float]) -> list[float]:
    """Return exact percentiles from a histogram, linear between neighbours as `numpy.percentile` has them."""
    cumulated = np.cumsum(counts)
    places = np.asarray(percents) / 100 * (cumulated[-1] - 1)
    below = np.searchsorted(cumulated, np.floor(places), side="right")
    above = np.searchsorted(cumulated, np.ceil(places), side="right")
    return [float(value) for value in below + (places - np.floor(places)) * (above - below)]


def saturated_share(counts: np.ndarray, dtype: np.dtype) -> float:
    """Return the share of pixels at the camera's ceiling.

    A file does not say how many bits its camera had: the ceiling is taken to be the lowest of 255 (uint8), or 4095, 16383 and 65535
    (uint16), that no pixel exceeds.
    """
    ceiling = min(limit for limit in CEILINGS[dtype.itemsize] if limit >= len(counts) - 1)
    return float(counts[ceiling] / counts.sum()) if len(counts) > ceiling else 0.0


def otsu_threshold(counts: np.ndarray) -> int:
    """Return the value that parts a histogram into two classes of largest between-class variance (Otsu 1979, eq. 18).

    Values above it are the upper class; of a constant image it is the image's value, so nothing is above.
    """
    values = np.arange(len(counts), dtype=np.float64)
    weight = np.cumsum(counts) / counts.sum()
    moment = np.cumsum(counts * values) / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (moment[-1] * weight - moment) ** 2 / (weight * (1 - weight))
    between[~np.isfinite(between)] = -1
    return int(np.argmax(between)) if between.max() > 0 else len(counts) - 1


def focus_slope(plane: np.ndarray) -> float:
    """Return the slope of log power against log spatial frequency: about −2 to −3 for sharp cells, steeper out of focus.

    Field 1987 (J Opt Soc Am A 4:2379); `PowerLogLogSlope` of CellProfiler's MeasureImageQuality, which Bray et al. 2012 (J Biomol
    Screen 17:266) recommend as the sign of poor focus. As there, frequencies up to an eighth of the image's smaller side (waves of 8 px and
    more) enter the fit. Departures: the centred square is used, not the whole field; power is averaged over each ring of equal frequency,
    not summed (a sum is flatter by about 1); a Hann window keeps the image's edges from adding a cross to the spectrum, and for it the
    fit starts at frequency 2, not 1. 0 for a constant image, or one of fewer than 16 px a side.
    """
    side = min(plane.shape)
    if side < 16:  # no frequencies to fit a line to
        return 0.0
    top, left = (plane.shape[0] - side) // 2, (plane.shape[1] - side) // 2
    square = plane[top : top + side, left : left + side].astype(np.float32)
    square -= square.mean()
    if not square.any():
        return 0.0
    window, rings, sizes = _rings(side)
    square *= window[:, None]
    square *= window
    limit = len(sizes)
    rows = fft.rfft(square, axis=1)[:, :limit]  # only low frequencies are used: the second transform skips the rest
    spectrum = fft.fft(rows, axis=0)
    low = np.concatenate([spectrum[:limit], spectrum[-limit + 1 :]])
    power = np.bincount(rings.ravel(), (low.real**2 + low.imag**2).ravel(), minlength=limit)[2:limit] / sizes[2:]
    frequency = np.arange(2, limit)
    valid = power > 0
    if valid.sum() < 2:
        return 0.0
    return float(np.polyfit(np.log(frequency[valid]), np.log(power[valid]), 1)[0])


@lru_cache(maxsize=4)
def _rings(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a Hann window (side,), the ring of every low frequency (2·limit−1, limit), and the rings' sizes (limit,)."""
    limit = max(side // 8, 3) + 1
    rows = np.concatenate([np.arange(limit), np.arange(-limit + 1, 0)])
    rings = np.rint(np.hypot(rows[:, None], np.arange(limit))).astype(np.int64)
    return np.hanning(side).astype(np.float32), rings, np.bincount(rings.ravel(), minlength=limit)[:limit]


def count_nuclei(plane: np.ndarray) -> int:
    """Return the number of bright objects in a nuclear channel: Gaussian smoothing, Otsu's threshold, connected components.

    A rough count: touching nuclei are one. Fields of 512 px and more are averaged 2 x 2 first.
    """
    if min(plane.shape) >= BIN_ABOVE_PX:
        height, width = plane.shape[0] // 2 * 2, plane.shape[1] // 2 * 2
        plane = plane[:height, :width]
        work = plane[::2, ::2].astype(np.float32) + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2]
        work /= 4
    else:
        work = plane.astype(np.float32)
    smooth = np.rint(ndimage.gaussian_filter(work, 1.0, truncate=3.0)).astype(np.uint16)
    objects, number = ndimage.label(smooth > otsu_threshold(histogram(smooth)))
    return int((np.bincount(objects.ravel(), minlength=number + 1)[1:] >= NUCLEUS_PX).sum())


def judge(measured: pd.DataFrame, channels: Sequence[str]) -> pd.Series:
    """Return a sentence for every field that is constant or saturated, None for the others.

    Parameters
    ----------
    measured : a row per field, with the columns of `measure_field`; rows of NaN are left alone.

    Returns
    -------
    Series of texts that start with "constant:" (a channel has one value everywhere: nothing can be learnt from it) or "saturated:"
    (more than 5 % of a channel's pixels at the camera's ceiling: a warning), or None.
    """
    problems = pd.Series([None] * len(measured), index=measured.index, dtype=object)
    for channel in channels:
        share = measured[f"QC_Saturated_{channel}"]
        for row in measured.index[share > SATURATED_SHARE]:
            problems[row] = f"saturated: {share[row]:.0%} of {channel}'s pixels are at the camera's ceiling."
    for channel in channels:
        for row in measured.index[measured[f"Intensity_Sd_{channel}"] == 0]:
            problems[row] = f"constant: every pixel of {channel} is {measured.at[row, f'Intensity_Mean_{channel}']:g}."
    return problems
