"""Intensity statistics must not give the classes away: a logistic regression on them stays poor on plates it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, label
from sklearn.linear_model import LogisticRegression

from hcsdl.simulation.fields import draw_field
from hcsdl.simulation.layout import Field, fields_of_view
from hcsdl.simulation.presets import Preset

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LIMIT = 0.60  # accuracy; chance is 1/13


def features(image: np.ndarray) -> np.ndarray:
    """Return mean, sd and percentiles of each channel, and the number of nuclei: float64 (28,), from an image (3, rows, columns)."""
    numbers = [np.r_[channel.mean(), channel.std(), np.percentile(channel, PERCENTILES)] for channel in image]
    dapi = gaussian_filter(image[0].astype(np.float32), 2)
    return np.r_[np.concatenate(numbers), label(dapi > _otsu(dapi))[1]]


def _otsu(values: np.ndarray) -> float:
    """Return the threshold that parts `values` into two classes with the largest variance between them (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[1:] + edges[:-1]) / 2
    below = counts.cumsum()[:-1]
    above = counts.sum() - below
    sums = (counts * centres).cumsum()
    between = below * above * (sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)) ** 2
    return float(centres[between.argmax()])


def accuracy(fields: list[Field], table: np.ndarray) -> float:
    """Return the accuracy of LogisticRegression(C=1) on the other half of the plates, averaged over which half is learned from."""
    moas, plates = np.array([f.treatment.moa for f in fields]), np.array([f.plate for f in fields])
    scaled = np.empty_like(table)
    for plate in set(plates):
        control = table[(plates == plate) & (moas == "DMSO")]
        scaled[plates == plate] = (table[plates == plate] - control.mean(0)) / (control.std(0) + 1e-9)
    scores = []
    for first in (0, 1):
        train = plates % 2 == first
        model = LogisticRegression(C=1, max_iter=3000).fit(scaled[train], moas[train])
        scores.append(model.score(scaled[~train], moas[~train]))
    return float(np.mean(scores))


def draw_features(preset: Preset, seed: int) -> tuple[list[Field], np.ndarray]:
    """Return the fields of a simulation and their features, (fields, 28)."""
    fields = fields_of_view(preset, seed, "DMSO")
    return fields, np.array([features(draw_field(seed, field, 1.0, preset.height_px, preset.width_px)) for field in fields])


def test_intensity_statistics_give_little_away_small() -> None:
    """13 classes of 12 fields at 256 × 320: below the limit; with a tell-tale of one sd added to each class, the same baseline is above."""
    preset = Preset(
        height_px=256,
        width_px=320,
        moas=12,
        compounds_per_moa=2,
        concentrations=1,
        replicates=6,
        sites=1,
        batches=2,
        plates_per_batch=3,
        control_wells=4,
    )
    fields, table = draw_features(preset, 1)
    assert accuracy(fields, table) < LIMIT
    classes = sorted({f.treatment.moa for f in fields})
    tell_tale = np.random.default_rng(0).normal(0, 1, (13, 28))[[classes.index(f.treatment.moa) for f in fields]]
    assert accuracy(fields, table + table.std(0) * tell_tale) > LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_intensity_statistics_give_little_away(seed: int) -> None:
    """13 classes of at least 24 fields at 512 × 640, half of six plates held out: below 0.60."""
    preset = Preset(
        height_px=512,
        width_px=640,
        moas=12,
        compounds_per_moa=2,
        concentrations=1,
        replicates=6,
        sites=2,
        batches=2,
        plates_per_batch=3,
        control_wells=6,
    )
    found = accuracy(*draw_features(preset, seed))
    print(f"baseline accuracy, seed {seed}: {found:.3f}")
    assert found < LIMIT
