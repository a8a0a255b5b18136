"""Intensity scaling: offsets and scales from histograms against numpy on the pixels themselves."""

from __future__ import annotations

import numpy as np
import pytest

from hcsdl.config import DataError
from hcsdl.data.intensity import BINS, histogram, scaling


def images(count: int = 3) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [(random.gamma(2, 300, (2, 40, 50)) + [[[100]], [[900]]]).astype(np.uint16) for _ in range(count)]


def summed(fields: list[np.ndarray]) -> np.ndarray:
    return sum(histogram(field.astype(np.float32)) for field in fields)


def test_mean_and_sd_are_those_of_all_pixels():
    fields = images()
    offset, scale = scaling(summed(fields), "dmso_meansd", "plate", ["a", "b"])
    pixels = np.stack(fields, axis=1).reshape(2, -1).astype(np.float64)
    np.testing.assert_allclose(offset, pixels.mean(1), rtol=1e-6)
    np.testing.assert_allclose(scale, 1 / pixels.std(1), rtol=1e-6)
    assert offset.dtype == scale.dtype == np.float32


def test_percentiles_are_those_of_all_pixels():
    fields = images()
    offset, scale = scaling(summed(fields), "dmso_percentiles", "plate", ["a", "b"])
    ordered = np.sort(np.stack(fields, axis=1).reshape(2, -1).astype(np.int64))
    assert ordered.shape == (2, 6000)
    low, high = ordered[:, 60 - 1], ordered[:, 5994 - 1]
    np.testing.assert_array_equal(offset, low)
    np.testing.assert_allclose(scale, 1 / (high - low), rtol=1e-6)


def test_the_order_of_the_fields_does_not_matter():
    fields = images()
    forward, backward = (scaling(summed(some), "dmso_meansd", "plate", ["a", "b"]) for some in (fields, fields[::-1]))
    assert all((one == other).all() for one, other in zip(forward, backward, strict=True))


def test_histogram_keeps_every_pixel_and_both_extremes():
    counts = histogram(np.array([[[0, 65535, 65535.4, 1e9, -3]]], np.float32))[0]
    assert counts.sum() == 5
    assert (counts[0], counts[65535], counts[BINS - 1]) == (2, 2, 1)


@pytest.mark.parametrize("how", ["dmso_meansd", "dmso_percentiles"])
def test_constant_channel_is_an_error_that_names_plate_and_channel(how):
    fields = images()
    for field in fields:
        field[1] = 0
    with pytest.raises(DataError, match="Channel Tubulin of plate Week1_1 is constant"):
        scaling(summed(fields), how, "Week1_1", ["DAPI", "Tubulin"])
