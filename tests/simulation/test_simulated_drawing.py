"""What is drawn: nothing of the treatment at effect 0, phenotypes at effect 1, nuisance between plates, shading, sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hcsdl.simulation.compounds import COMPOUNDS, Treatment
from hcsdl.simulation.fields import PAD_PX, conditions, draw_field, positions, shading_field
from hcsdl.simulation.layout import Field
from hcsdl.simulation.textures import KINDS, TURNS, tile

DMSO = Treatment("DMSO", 0.0, "DMSO")
FIELD = Field(batch=1, plate=0, plate_name="Week1_22123", well="C05", site=1, replicate=1, treatment=DMSO, file_names=())


def strongest(moa: str) -> Treatment:
    """Return a MoA's first compound at its first concentration."""
    compound, values = next(iter(COMPOUNDS[moa].items()))
    return Treatment(compound, float(values[0]), moa)


@pytest.mark.parametrize("moa", COMPOUNDS)
def test_effect_zero_draws_the_same_pixels_whatever_the_treatment(moa: str) -> None:
    """With effect 0 a well's pixels do not change when its treatment is swapped; with effect 1 they do in every channel or in some."""
    treated = replace(FIELD, treatment=strongest(moa), replicate=4)
    untreated = draw_field(0, FIELD, 0.0, 200, 240)
    np.testing.assert_array_equal(draw_field(0, treated, 0.0, 200, 240), untreated)
    assert (draw_field(0, treated, 1.0, 200, 240) != untreated).mean() > 0.05


def test_untreated_wells_do_not_depend_on_the_effect() -> None:
    """DMSO looks the same at effect 0 and 1."""
    np.testing.assert_array_equal(draw_field(0, FIELD, 1.0, 96, 96), draw_field(0, FIELD, 0.0, 96, 96))


def test_more_of_a_compound_changes_more_of_a_field() -> None:
    """Pixels that differ from the untreated field grow in number with the concentration."""
    untreated = draw_field(1, FIELD, 1.0, 512, 640)
    changed = [
        (draw_field(1, replace(FIELD, treatment=Treatment("AZ138", value, "Eg5 inhibitors")), 1.0, 512, 640) != untreated).mean()
        for value in (0.03, 0.3, 3.0)
    ]
    assert changed[0] < changed[1] < changed[2]


@pytest.mark.parametrize("moa", COMPOUNDS)
def test_compounds_of_a_moa_are_not_equal(moa: str) -> None:
    """Two compounds of one MoA, at the concentration that changes the same share of cells, are drawn apart."""
    first, second = [Treatment(name, float(values[0]), moa) for name, values in list(COMPOUNDS[moa].items())[:2]]
    one, other = (draw_field(2, replace(FIELD, treatment=treatment), 1.0, 200, 240) for treatment in (first, second))
    assert (one != other).any()


def test_fields_wells_and_seeds_are_all_different() -> None:
    """Another site, well, plate or seed is another image, noise included; the same is the same."""
    base = draw_field(0, FIELD, 1.0, 64, 64)
    np.testing.assert_array_equal(draw_field(0, FIELD, 1.0, 64, 64), base)
    others = [draw_field(0, replace(FIELD, **change), 1.0, 64, 64) for change in ({"site": 2}, {"well": "C06"}, {"plate": 1})]
    for other in (*others, draw_field(1, FIELD, 1.0, 64, 64)):
        assert (other != base).mean() > 0.9


def test_a_full_field_has_sixty_to_a_hundred_and_fifty_cells() -> None:
    """Over many wells the cells centred in a full-resolution field number about 60 to 150, and the numbers vary; none is on another."""
    counts = []
    for seed in range(60):
        density = conditions(seed, FIELD).density
        centres = np.array(positions(density, 1024, 1280, np.random.default_rng(seed))) - PAD_PX
        inside = ((centres >= 0) & (centres < (1024, 1280))).all(axis=1)
        counts.append(inside.sum())
        apart = np.hypot(*(centres[:, None] - centres[None]).transpose(2, 0, 1)) + 1000 * np.eye(len(centres))
        assert apart.min() > 45
    assert min(counts) >= 55 and max(counts) <= 160 and np.ptp(counts) > 40


def test_plates_and_batches_differ_in_brightness() -> None:
    """The mean grey level of untreated wells differs between plates by more than a tenth (sd of its logarithm), in each channel."""
    means = np.array(
        [
            [
                draw_field(0, replace(FIELD, plate=plate, batch=1 + plate // 3, well=well), 1.0, 160, 200).mean(axis=(1, 2))
                for well in ("C05", "D07", "E04")
            ]
            for plate in range(6)
        ]
    ).mean(axis=1)
    assert (np.log(means).std(axis=0) > 0.1).all()


def test_conditions_have_a_part_of_each_level() -> None:
    """Batch, plate, well and site each alter the gain, and wells at the plate's edge are thinner on average."""
    gains = [conditions(0, replace(FIELD, **change)).gain for change in ({}, {"batch": 2}, {"plate": 1}, {"well": "D05"}, {"site": 2})]
    assert len({tuple(gain) for gain in gains}) == 5
    density = {well: np.mean([conditions(seed, replace(FIELD, well=well)).density for seed in range(200)]) for well in ("B05", "D05")}
    assert density["B05"] < 0.95 * density["D05"]


def test_shading_belongs_to_the_plate() -> None:
    """All wells of a plate share the shading of each channel; it is smooth, positive and has mean 1."""
    same = [conditions(0, replace(FIELD, well=well, site=site)).shading for well, site in (("B02", 1), ("G11", 2))]
    np.testing.assert_array_equal(*same)
    assert (conditions(0, replace(FIELD, plate=1)).shading != same[0]).all()
    shading = shading_field(same[0][1], 128, 160)
    assert shading.dtype == np.float32 and shading.shape == (128, 160)
    assert abs(shading.mean() - 1) < 1e-5 and shading.min() > 0 and np.ptp(shading) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_textures_share_one_histogram(kind: str) -> None:
    """Every texture, in every direction, has the same sorted values, so that no texture is brighter than another."""
    expected = np.sort(tile("smooth").ravel())
    for turn in (0, TURNS // 2 + 1):
        np.testing.assert_array_equal(np.sort(tile(kind, turn).ravel()), expected)


def test_nothing_saturates() -> None:
    """No pixel of a field reaches the largest 16-bit value, and none is zero."""
    image = draw_field(0, FIELD, 1.0, 256, 320)
    assert image.dtype == np.uint16 and image.min() > 0 and image.max() < 65535
