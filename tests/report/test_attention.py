"""Attention over fields: a map's point lies on its pixels, and the title tells cells from ground."""

from __future__ import annotations

import numpy as np
import pytest

from hcsdl.report.attention import attention_picture, share_on_cells, spread_heat
from hcsdl.report.fields import FieldView

pytestmark = pytest.mark.xeon_only


def field_with_cells() -> np.ndarray:
    """Return a field (2, 128, 160) whose left half is bright."""
    image = np.random.default_rng(0).random((2, 128, 160))
    image[:, :, :80] += 10
    return image


def heat_on(columns: slice) -> np.ndarray:
    heat = np.zeros((4, 5))
    heat[:, columns] = 1
    return heat


def test_a_point_is_spread_around_the_middle_of_its_pixels():
    heat = np.zeros((4, 5))
    heat[1, 3] = 1
    large = spread_heat(heat, (128, 160))
    assert large.shape == (128, 160) and large.sum() == pytest.approx(32 * 32, rel=1e-3)
    rows, columns = np.indices(large.shape)
    assert (large * rows).sum() / large.sum() == pytest.approx(1.5 * 32 - 0.5) and (large * columns).sum() / large.sum() == pytest.approx(
        3.5 * 32 - 0.5
    )
    assert np.allclose(spread_heat(np.full((4, 5), 0.7), (130, 165)), 0.7)


def test_the_share_on_cells_is_counted_in_pixels():
    on, cells = share_on_cells(field_with_cells(), np.ones((4, 5)))
    assert on == pytest.approx(0.5, abs=0.01) and cells == pytest.approx(0.5, abs=0.01)
    assert share_on_cells(field_with_cells(), heat_on(slice(0, 2)))[0] > 0.95
    assert np.isnan(share_on_cells(field_with_cells(), np.zeros((4, 5)))[0])


@pytest.mark.parametrize(
    ("heat", "start"),
    [
        (heat_on(slice(0, 2)), "The network looks at cells: "),
        (heat_on(slice(3, 5)), "The network looks beside the cells: "),
        (np.ones((4, 5)), "The network looks at cells and ground alike: "),
        (np.zeros((4, 5)), "Nothing in these fields speaks for the class"),
    ],
)
def test_titles_say_where_it_looks(heat, start):
    picture = attention_picture([FieldView(field_with_cells(), "one", heat)], pixel_size_um=0.5)
    assert picture.title.startswith(start) and "32 pixels a side" in picture.reading and picture.photographic
