"""Quality measurements against direct computation, and against what they are meant to notice."""

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from hcsdl.plates.quality import (
    PERCENTILES,
    count_nuclei,
    focus_slope,
    histogram,
    judge,
    measure_field,
    otsu_threshold,
    percentiles,
    saturated_share,
)

pytestmark = pytest.mark.xeon_only


def discs(shape: tuple[int, int], radius: float, step: int, height: float = 1000) -> tuple[np.ndarray, int]:
    """Return an image of discs on a grid, float, and how many there are."""
    image = np.zeros(shape)
    rows, columns = np.indices(shape)
    centres = [(row, column) for row in range(step, shape[0] - radius, step) for column in range(step, shape[1] - radius, step)]
    for row, column in centres:
        image[np.hypot(rows - row, columns - column) <= radius] = height
    return image, len(centres)


@pytest.mark.parametrize("ceiling", [2, 256, 65536])
@pytest.mark.parametrize("shape", [(7, 11), (40, 32)])
def test_histogram_numbers_are_exact(ceiling, shape):
    plane = np.random.default_rng(ceiling).integers(0, ceiling, shape).astype("uint16")
    assert percentiles(histogram(plane), PERCENTILES) == pytest.approx(np.percentile(plane, PERCENTILES), rel=1e-12)
    measured = measure_field(plane[None], ["x"])
    assert measured["Intensity_Mean_x"] == pytest.approx(plane.mean()) and measured["Intensity_Sd_x"] == pytest.approx(plane.std())
    assert measured["Intensity_P01_x"] == pytest.approx(np.percentile(plane, 1))


def test_otsu_is_the_best_threshold():
    """Every threshold tried: none parts the values with a larger variance between the two classes."""
    plane = np.random.default_rng(0).choice([3, 4, 9, 40, 44, 50], 500, p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.1])

    def between(threshold: int) -> float:
        low, high = plane[plane <= threshold], plane[plane > threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    best = max(range(3, 50), key=between)
    assert otsu_threshold(histogram(plane)) == best == 9
    assert measure_field(plane.astype("uint8").reshape(1, 20, 25), ["x"])["QC_Foreground_x"] == (plane > 9).mean()


def test_focus_falls_with_blur():
    """Each further blur makes the slope steeper, with any brightness; a constant image has 0."""
    sharp = discs((256, 320), 12, 40)[0] + np.random.default_rng(0).normal(300, 2, (256, 320))
    slopes = [focus_slope(ndimage.gaussian_filter(sharp, sigma)) for sigma in (0.5, 2, 4, 8)]
    assert slopes == sorted(slopes, reverse=True) and slopes[0] - slopes[-1] > 1
    assert focus_slope(3 * sharp + 100) == pytest.approx(focus_slope(sharp), abs=1e-3)
    assert focus_slope(np.full((64, 64), 9, "uint8")) == 0


def test_focus_is_the_exponent_of_the_spectrum():
    """An image whose power falls as frequency to the −2 has slope −2."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256), indexing="ij"))
    frequency[0, 0] = 1
    noise = np.random.default_rng(0).normal(size=(8, 256, 256))
    slopes = [focus_slope(np.fft.ifft2(np.fft.fft2(one) / frequency).real) for one in noise]
    assert np.mean(slopes) == pytest.approx(-2, abs=0.1)


@pytest.mark.parametrize(
    ("dtype", "ceiling", "share"),
    [
        ("uint8", 255, 0.25),
        ("uint16", 65535, 0.25),
        ("uint16", 4095, 0.25),
        ("uint16", 16383, 0.25),
        ("uint16", 4094, 0.0),
        ("uint16", 60000, 0.0),
    ],
)
def test_saturation(dtype, ceiling, share):
    plane = np.zeros((8, 8), dtype)
    plane[:2] = ceiling
    assert saturated_share(histogram(plane), plane.dtype) == share


@pytest.mark.parametrize(("shape", "radius", "step"), [((128, 160), 4, 16), ((544, 600), 12, 120)])
def test_nuclei_are_counted(shape, radius, step):
    """Discs on a noisy background, the larger image averaged 2 x 2 on the way; one hot pixel is no nucleus."""
    image, count = discs(shape, radius, step)
    image += np.random.default_rng(0).normal(200, 20, shape)
    image[1, 1] = 4000
    assert count_nuclei(image.clip(0).astype("uint16")) == count


def test_nuclear_channel():
    image = np.zeros((3, 128, 160), "uint16")
    image[2], count = discs((128, 160), 5, 32)
    assert measure_field(image, ["Tubulin", "Actin", "Hoechst 33342"])["Count_Nuclei"] == count
    assert measure_field(image, ["a", "b", "c"])["Count_Nuclei"] == 0


def test_measurements_have_a_column_per_channel():
    image = np.random.default_rng(0).integers(0, 255, (2, 32, 40)).astype("uint8")
    measured = measure_field(image, ["DAPI", "Actin"])
    assert len(measured) == 2 * 12 + 1 and all(np.isfinite(value) for value in measured.values())
    swapped = measure_field(image[::-1], ["Actin", "DAPI"])
    assert {name: swapped[name] for name in measured} == measured


def test_judge():
    """Constant outranks saturated; a row that could not be measured is left alone."""
    fields = [np.random.default_rng(0).integers(0, 200, (1, 32, 40)).astype("uint8") for _ in range(4)]
    fields[1][:, :8] = 255
    fields[2][:] = 0
    fields[3][:] = 255
    table = pd.DataFrame([measure_field(field, ["DNA"]) for field in fields] + [{}])
    problems = judge(table, ["DNA"])
    assert problems[0] is None and problems[4] is None
    assert problems[1] == "saturated: 25% of DNA's pixels are at the camera's ceiling."
    assert problems[2] == "constant: every pixel of DNA is 0." and problems[3].startswith("constant: ")
