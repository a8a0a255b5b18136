"""Maps of wells: their titles count among the profiles, their points do not depend on the order of rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hcsdl.config import DataError
from hcsdl.profiles.tables import Profiles
from hcsdl.report.maps import map_pictures, map_wells
from tests.report.tables import profile_table, wells_of

pytestmark = pytest.mark.xeon_only


def by_name(wells: Profiles) -> dict:
    return {picture.name: picture for picture in map_pictures(wells)}


def with_meta(wells: Profiles, **columns: object) -> Profiles:
    return replace(wells, meta=wells.meta.assign(**columns))


def test_titles_say_whether_mechanism_batch_and_dose_show():
    found = by_name(wells_of(profile_table()))
    assert list(found) == ["map_moa", "map_batch", "map_concentration"]
    assert found["map_moa"].title.startswith("Mechanisms show") and found["map_batch"].title.startswith("Batches hardly show")
    assert found["map_concentration"].title.startswith("5 of 5 compounds move away from DMSO")
    assert all("PCA" in picture.reading for picture in found.values())


def test_titles_change_when_the_wells_do():
    wells = wells_of(profile_table())
    rng = np.random.default_rng(1)
    shuffled = replace(wells, values=wells.values[rng.permutation(len(wells))])
    assert by_name(shuffled)["map_moa"].title.startswith("Mechanisms hardly show")
    assert not by_name(shuffled)["map_concentration"].title.startswith("5 of 5")
    shift = 40 * (wells.meta["Metadata_Batch"] == "Week2").to_numpy()[:, None] * rng.normal(size=8)
    assert by_name(replace(wells, values=wells.values + shift))["map_batch"].title.startswith("Batches show")


def test_what_the_wells_do_not_know_is_left_out():
    wells = wells_of(profile_table())
    assert list(by_name(with_meta(wells, Metadata_Batch="Week1"))) == ["map_moa", "map_concentration"]
    bare = replace(wells, meta=wells.meta[["Metadata_Plate", "Metadata_Well", "Metadata_Compound"]])
    assert map_pictures(bare) == []


def test_wells_of_no_known_mechanism_are_drawn_apart():
    legend = by_name(wells_of(profile_table()))["map_moa"].figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["no mechanism known (12)", "DMSO (16)", "Actin (24)", "Kinase (24)"]


def test_points_belong_to_their_wells_and_controls_lie_in_the_middle():
    wells = wells_of(profile_table())
    points = map_wells(wells).points
    order = np.random.default_rng(2).permutation(len(wells))
    again = map_wells(wells.take(order)).points
    np.testing.assert_allclose(np.abs(again), np.abs(points[order]), atol=1e-9)  # a component's sign is free
    control = (wells.meta["Metadata_Compound"] == "DMSO").to_numpy()
    strong = (wells.meta["Metadata_Concentration"] == 10).to_numpy()
    middle = points[control].mean(axis=0)
    assert np.linalg.norm(points[strong] - middle, axis=1).min() > np.linalg.norm(points[control].mean(axis=0) - middle)
    assert 0.3 < sum(map_wells(wells).shares) <= 1


def test_a_map_of_missing_values_is_refused():
    wells = wells_of(profile_table())
    values = wells.values.copy()
    values[3, 2] = np.nan
    with pytest.raises(DataError, match="1 values missing"):
        map_wells(replace(wells, values=values))
