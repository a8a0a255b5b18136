"""Augmentation: a pure function of seed, epoch and field, within its limits."""

from __future__ import annotations

import numpy as np
import pytest

from hcsdl.config import ConfigError, DataConfig
from hcsdl.data.augmentation import Augmentation, draw_augmentation, window_size

GOLDEN = (True, True, 3, 1.0516371025133964, -0.11771296596029726)


def draws(config: DataConfig, shape=(2, 64, 64), count: int = 400) -> list[Augmentation]:
    return [draw_augmentation(config, 1, epoch, "Week1_1/B02/1", shape) for epoch in range(count)]


def test_the_same_arguments_give_the_same_change_and_any_other_another():
    config = DataConfig(crop_px=[16, 16])
    one = draw_augmentation(config, 3, 5, "p/B02/1", (3, 64, 64))
    draw_augmentation(config, 3, 6, "p/B02/1", (3, 64, 64))
    np.random.seed(0)
    assert draw_augmentation(config, 3, 5, "p/B02/1", (3, 64, 64)) == one
    others = [(4, 5, "p/B02/1"), (3, 6, "p/B02/1"), (3, 5, "p/B02/2")]
    assert all(draw_augmentation(config, *other, (3, 64, 64)) != one for other in others)


def test_a_known_draw_stays_what_it_is():
    """A change of the stream would silently change every resumed run."""
    drawn = draw_augmentation(DataConfig(), 0, 0, "Week1_22123/B02/1", (1, 8, 8))
    assert (drawn.flip_rows, drawn.flip_columns, drawn.quarter_turns) == GOLDEN[:3]
    assert (*drawn.gain, *drawn.offset) == pytest.approx(GOLDEN[3:], rel=1e-6)


def test_every_orientation_occurs_about_equally_often():
    turned = [(a.flip_rows, a.flip_columns, a.quarter_turns) for a in draws(DataConfig(), count=1600)]
    counts = [turned.count(one) for one in set(turned)]
    assert len(counts) == 16
    assert min(counts) > 60  # expected 100, sd 10


def test_fields_that_are_not_square_get_half_turns_only():
    assert {a.quarter_turns for a in draws(DataConfig(), (1, 48, 64))} == {0, 2}
    assert {a.quarter_turns for a in draws(DataConfig(crop_px=[32, 32]), (1, 48, 64))} == {0, 1, 2, 3}


def test_switches_switch_off_and_shift_no_other_draw():
    full, still = draws(DataConfig()), draws(DataConfig(flips=False, quarter_turns=False))
    assert {(a.flip_rows, a.flip_columns, a.quarter_turns) for a in still} == {(False, False, 0)}
    assert [a.gain for a in still] == [a.gain for a in full]
    off = draws(DataConfig(intensity_jitter=0.0))
    assert {(*a.gain, *a.offset) for a in off} == {(1.0, 1.0, 0.0, 0.0)}


def test_jitter_has_the_sd_asked_for_in_each_channel():
    found = draws(DataConfig(intensity_jitter=0.2), count=2000)
    for values in (np.log([a.gain for a in found]), np.array([a.offset for a in found])):
        assert values.std(axis=0) == pytest.approx(0.2, rel=0.1)
        assert np.abs(values.mean(axis=0)).max() < 0.02
        assert abs(np.corrcoef(values.T)[0, 1]) < 0.1


def test_crops_reach_every_place_and_stay_inside():
    origins = {a.origin_px for a in draws(DataConfig(crop_px=[61, 62]), (1, 64, 64))}
    assert origins == {(top, left) for top in range(4) for left in range(3)}


def test_orientation_is_what_numpy_does():
    """Transpose and flips, as `Preprocessing.apply` does them, are the turn of `numpy.rot90` followed by the flips."""
    image = np.arange(12).reshape(3, 4)
    for turns in range(4):
        for rows in (False, True):
            for columns in (False, True):
                expected = np.rot90(image, turns)[:: -1 if rows else 1, :: -1 if columns else 1]
                transpose, down, across = Augmentation(rows, columns, turns, (1.0,), (0.0,), (0, 0)).orientation()
                found = (image.T if transpose else image)[:: -1 if down else 1, :: -1 if across else 1]
                np.testing.assert_array_equal(found, expected)


def test_window_is_the_crop_less_what_fills_no_pixel():
    assert window_size((3, 101, 203), None, 4) == (100, 200)
    assert window_size((3, 101, 203), [50, 51], 2) == (50, 50)


@pytest.mark.parametrize(
    ("crop", "downsample", "text"),
    [([65, 32], 1, "fit into a field of 64 × 64 px"), ([32], 1, r"\[rows, columns\]"), ([8, 8], 9, "data.downsample must be at most")],
)
def test_impossible_windows_are_explained(crop, downsample, text):
    with pytest.raises(ConfigError, match=text):
        window_size((1, 64, 64), crop, downsample)
