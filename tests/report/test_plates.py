"""Plates: values stand in their wells, all plates share one scale, titles state what is there."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import ConfigError, DataError
from hcsdl.report.plates import plate_format, plate_picture, well_places
from tests.report.tables import profile_table

pytestmark = pytest.mark.xeon_only


def full_plates(number: int = 2) -> pd.DataFrame:
    """Return whole 96-well plates of one field a well, all values 10, DMSO in the first column."""
    wells = [f"{row}{column:02d}" for row in "ABCDEFGH" for column in range(1, 13)]
    plates = [pd.DataFrame({"Metadata_Plate": f"P{n}", "Metadata_Well": wells, "Value": 10.0}) for n in range(number)]
    table = pd.concat(plates, ignore_index=True)
    table["Metadata_Compound"] = np.where(table["Metadata_Well"].str.endswith("01"), "DMSO", "drug")
    table["Metadata_Treatment"] = table["Metadata_Compound"]
    return table


def images(picture) -> list[np.ndarray]:
    """Return what the plates' images hold; the colour bar has none."""
    return [np.ma.filled(axes.images[0].get_array(), np.nan) for axes in picture.figure.axes if axes.images]


def test_wells_are_where_their_names_say():
    assert well_places(["A01", "B2", "h12", "P24", "AF48"]).tolist() == [[0, 0], [1, 1], [7, 11], [15, 23], [31, 47]]
    for bad in ("7", "B", "B00", "1A", "well 3"):
        with pytest.raises(DataError, match="such as B02"):
            well_places(["A01", bad])


def test_the_smallest_plate_that_has_all_wells():
    assert plate_format(well_places(["A01", "H12"])) == (8, 12)
    assert plate_format(well_places(["A01", "I01"])) == plate_format(well_places(["P24", "A13"])) == (16, 24)
    assert plate_format(well_places(["AF48"])) == (32, 48)
    with pytest.raises(DataError, match="1536"):
        plate_format(well_places(["AG01"]))


def test_a_square_is_the_mean_of_its_wells_fields_and_the_rest_is_empty():
    table = profile_table()
    table.loc[:1, "Count_Nuclei"] = [10.0, 20.0]  # two fields of the first well
    picture = plate_picture(table, "Count_Nuclei")
    row, column = well_places([table["Metadata_Well"][0]])[0]
    first = images(picture)[0]
    assert first.shape == (8, 12) and first[row, column] == 15.0
    assert np.isfinite(first).sum() == 19, "19 wells were imaged"
    assert "nuclei a field" in picture.figure.axes[-1].get_xlabel()


def test_all_plates_share_one_colour_scale_and_show_their_controls():
    table = full_plates()
    table.loc[table["Metadata_Plate"] == "P1", "Value"] = 30.0
    picture = plate_picture(table, "Value")
    drawn = [axes for axes in picture.figure.axes if axes.images]
    assert {axes.images[0].get_clim() for axes in drawn} == {(10.0, 30.0)}
    for axes in drawn:
        assert sorted(map(tuple, axes.collections[0].get_offsets().tolist())) == [(0.0, float(row)) for row in range(8)]


@pytest.mark.parametrize("wells", [96, 384])
def test_plates_of_both_sizes_are_drawn_whole(wells):
    rows, columns = {96: ("ABCDEFGH", 12), 384: ("ABCDEFGHIJKLMNOP", 24)}[wells]
    names = [f"{row}{column:02d}" for row in rows for column in range(1, columns + 1)]
    picture = plate_picture(pd.DataFrame({"Metadata_Plate": "P", "Metadata_Well": names, "Value": np.arange(wells, dtype=float)}), "Value")
    assert np.array_equal(images(picture)[0].ravel(), np.arange(wells))


def test_titles_state_what_stands_out():
    rng = np.random.default_rng(0)
    noise = full_plates(3).assign(Value=lambda t: rng.normal(10, 1, len(t)))
    dim = noise.assign(Value=np.where(noise["Metadata_Plate"] == "P1", noise["Value"] - 8, noise["Value"]))
    assert "mostly between plates" in (title := plate_picture(dim, "Value").title) and "P1 stands furthest out" in title
    assert "e+0" not in plate_picture(dim.assign(Value=1000 * dim["Value"]), "Value").title
    rim = noise["Metadata_Well"].str.match("[AH]|.*(01|12)$")
    dried = plate_picture(noise.assign(Value=np.where(rim, noise["Value"] - 3, noise["Value"])), "Value").title
    assert "wells at the edge are lower" in dried and "evaporation" in dried
    assert "edge" not in plate_picture(noise, "Value").title
    alone = noise.assign(Metadata_Treatment=np.where(rim, "DMSO", "drug"), Value=np.where(rim, noise["Value"] - 3, noise["Value"]))
    assert "edge" not in plate_picture(alone, "Value").title, "what stands at the edge alone may differ for other reasons"
    toxic = noise.assign(Metadata_Treatment=np.where(noise["Metadata_Well"] == "D05", "poison 3", noise["Metadata_Treatment"]))
    toxic = toxic.assign(Metadata_Compound=np.where(noise["Metadata_Well"] == "D05", "poison", noise["Metadata_Compound"]))
    toxic = toxic.assign(Value=np.where(noise["Metadata_Well"] == "D05", 1.0, noise["Value"]))
    assert "poison 3 is furthest from DMSO, 1 against" in plate_picture(toxic, "Value").title
    assert plate_picture(full_plates(), "Value").title == "Value is the same, 10, in every well"


def test_names_are_markers_and_fixed_places_are_told():
    mixed, fixed = profile_table(), full_plates(3)
    picture = plate_picture(mixed, "Metadata_MoA")
    assert "other places on other plates" in picture.title
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == ["Actin", "DMSO", "Kinase"]
    assert "stand in the same wells on several plates (DMSO, drug)" in plate_picture(fixed, "Metadata_Treatment").title


def test_of_many_plates_those_furthest_out_are_shown_and_the_rest_counted():
    table = full_plates(20)
    table.loc[table["Metadata_Plate"] == "P17", "Value"] = 99.0
    picture = plate_picture(table, "Value", most=3)
    assert len(images(picture)) == 3 and "P17" in [axes.get_title() for axes in picture.figure.axes]
    assert "of 20 plates the 3 furthest" in picture.reading


def test_what_cannot_be_drawn_is_an_error():
    with pytest.raises(ConfigError, match="Nothing does not"):
        plate_picture(full_plates(), "Nothing")
    torn = full_plates().assign(Metadata_Site=1)
    torn = pd.concat([torn, torn.head(1).assign(Metadata_Compound="other")])
    with pytest.raises(DataError, match="P0/A01 has several"):
        plate_picture(torn, "Metadata_Compound")
