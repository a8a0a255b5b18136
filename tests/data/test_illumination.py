"""Shading correction: simulated shading is recovered, on any grid, and impossible requests are explained."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from hcsdl.config import ConfigError, DataError
from hcsdl.data.illumination import MIN_FIELDS, coarse_grid, fit_shading, smooth, upsample

SHAPE = (192, 240)


def shading_function(shape: tuple[int, int]) -> np.ndarray:
    """Return a quadratic fall towards the corners times a linear gradient, with mean 1, max / min about 2."""
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    shading = (1 - 0.15 * x**2 - 0.15 * y**2) * (1 + 0.15 * x - 0.1 * y)
    return shading / shading.mean()


def sparse_cells(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return a field of about a hundred bright round cells on a dim background, float64 (H, W); some are cut by the border."""
    field = np.full(shape, 400.0)
    y, x = np.ogrid[: shape[0], : shape[1]]
    for _ in range(random.integers(60, 150)):
        radius = random.uniform(4, 9)
        cy, cx = (random.uniform(-9, side + 9) for side in shape)
        rows, columns = (slice(max(0, int(c - radius)), max(0, int(c + radius) + 1)) for c in (cy, cx))
        field[rows, columns] += random.uniform(500, 3000) * ((y[rows] - cy) ** 2 + (x[:, columns] - cx) ** 2 < radius**2)
    return field


def confluent_layer(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return a field covered with cells: blobs of cell size, sd 15 % of the mean, float64 (H, W)."""
    blobs = gaussian_filter(random.standard_normal(shape), 5, mode="wrap")
    return 1000 * (1 + 0.15 * blobs / blobs.std()).clip(0)


def full(grid: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return upsample(grid, np.arange(shape[0], dtype=np.float32), np.arange(shape[1], dtype=np.float32), shape)


def error_of(fields: list[np.ndarray], how: str, truth: np.ndarray) -> tuple[float, float]:
    """Return the largest relative error of the shading fitted on `fields`, each (H, W), corners included, and the offset found."""
    [grid], [dark] = fit_shading(np.array([coarse_grid(field[None]) for field in fields]), how, "plate", SHAPE)
    error = np.abs(full(grid, SHAPE) / truth - 1)
    print(f"largest relative error {error.max():.4f}, mean {error.mean():.4f}, offset {dark:.1f}")
    return float(error.max()), float(dark)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("draw", [sparse_cells, confluent_layer])
@pytest.mark.parametrize("how", ["median", "mean"])
def test_simulated_shading_is_recovered_to_five_percent(how, draw, seed):
    """From the least number of fields, with photon noise."""
    random = np.random.default_rng(seed)
    truth = shading_function(SHAPE)
    fields = [random.poisson(draw(random, SHAPE) * truth).astype(np.uint16) for _ in range(MIN_FIELDS)]
    assert error_of(fields, how, truth)[0] < 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_camera_offset_is_told_from_light_where_the_background_varies(seed):
    """Taking the offset for light would make the shading look too flat by far more than 5 %."""
    random = np.random.default_rng(seed)
    truth = shading_function(SHAPE)
    draw = [sparse_cells(random, SHAPE) * random.normal(1, 0.15) * truth for _ in range(MIN_FIELDS)]
    error, dark = error_of([random.poisson(field + 100).astype(np.uint16) for field in draw], "median", truth)
    assert error < 0.05
    assert dark == pytest.approx(100, abs=25)
    error, dark = error_of([random.poisson(field).astype(np.uint16) for field in draw], "median", truth)
    assert error < 0.05
    assert dark < 25


def test_result_has_mean_one_in_each_channel_whatever_the_brightness():
    random = np.random.default_rng(0)
    grids = random.uniform(1, 2, (MIN_FIELDS, 2, 13, 17)).astype(np.float32) * np.array([1, 500], np.float32)[:, None, None]
    shading, dark = fit_shading(grids, "median", "plate", (100, 131))
    assert dark.dtype == np.float32
    assert shading.shape == (2, 13, 17)
    assert shading.dtype == np.float32
    for grid in shading:
        assert full(grid, (100, 131)).mean() == pytest.approx(1, abs=1e-5)


def test_smoothing_leaves_a_parabola_as_it_is():
    """Unlike a plain Gaussian filter, the window has no bias at the border."""
    y, x = np.mgrid[:20, :25]
    parabola = (30 + 0.5 * y - 0.2 * x + 0.03 * y**2 - 0.02 * x * y - 0.01 * x**2).astype(np.float32)
    np.testing.assert_allclose(smooth(parabola), parabola, rtol=1e-5)
    weight = np.random.default_rng(0).integers(0, 3, parabola.shape).astype(float)
    holes = np.where(weight > 0, parabola, 1e9)
    np.testing.assert_allclose(smooth(holes, weight), parabola, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 3), (3, 4)])
def test_smoothing_of_tiny_grids_keeps_a_constant(shape):
    np.testing.assert_allclose(smooth(np.full(shape, 7, np.float32)), 7, rtol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (130, 200), (1024, 1280), (3, 5)])
def test_coarse_grid_is_the_mean_of_blocks(shape):
    """Against a loop, also where blocks do not divide the field; the extremes of 16 bit survive the sums."""
    image = np.random.default_rng(0).integers(0, 65536, (1, *shape), dtype=np.uint16)
    image[0, :2, :2] = 65535
    grid = coarse_grid(image)[0]
    rows, columns = (np.linspace(0, size, cells + 1).astype(int) for size, cells in zip(shape, grid.shape, strict=True))
    for i, j in [(0, 0), (0, grid.shape[1] - 1), (grid.shape[0] // 2, grid.shape[1] // 3), (grid.shape[0] - 1, 0)]:
        assert grid[i, j] == pytest.approx(image[0, rows[i] : rows[i + 1], columns[j] : columns[j + 1]].mean(), rel=1e-6)


def test_upsampling_a_plane_gives_the_plane_at_every_pixel():
    cells, shape = (8, 10), (64, 120)
    y, x = ((np.arange(count) + 0.5) * size / count - 0.5 for count, size in zip(cells, shape, strict=True))
    grid = (2 + 0.01 * y[:, None] + 0.02 * x[None, :]).astype(np.float32)
    expected = 2 + 0.01 * np.arange(shape[0])[:, None] + 0.02 * np.arange(shape[1])[None, :]
    np.testing.assert_allclose(full(grid, shape), expected, rtol=1e-5)


def test_a_corner_that_is_always_bright_is_bridged():
    """Something that lights up the same corner in every field is no shading; elsewhere the fit is as good as without it."""
    random = np.random.default_rng(0)
    truth = shading_function(SHAPE)
    fields = [random.poisson(sparse_cells(random, SHAPE) * truth).astype(np.uint16) for _ in range(MIN_FIELDS)]
    for field in fields:
        field[:40, :50] += 20000
    [grid], _ = fit_shading(np.array([coarse_grid(field[None]) for field in fields]), "median", "plate", SHAPE)
    ratio = (full(grid, SHAPE) / truth)[60:, 80:]
    assert ratio.max() / ratio.min() < 1.05


def test_too_few_fields_say_how_many_and_what_to_do():
    """Black fields do not count."""
    grids = np.ones((MIN_FIELDS, 1, 4, 4), np.float32)
    fit_shading(grids, "mean", "Week1_1", (8, 8))
    grids[0] = 0
    with pytest.raises(ConfigError, match=r"at least 50 fields .*Got 49 on plate Week1_1: set data.illumination=none"):
        fit_shading(grids, "mean", "Week1_1", (8, 8))


def test_black_channel_is_named():
    grids = np.ones((MIN_FIELDS, 3, 4, 4), np.float32)
    grids[:, 2] = 0
    with pytest.raises(DataError, match="Channel 2 .* of plate Week1_1 is black"):
        fit_shading(grids, "median", "Week1_1", (8, 8))
