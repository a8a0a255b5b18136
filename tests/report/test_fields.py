"""Sheets of fields: which are best and worst, one contrast for all, bars of a true length, real fields read back."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import DataError, PlatesConfig
from hcsdl.data.reading import read_field
from hcsdl.plates.index import read_index
from hcsdl.report import fields
from hcsdl.report.fields import (  # fmt: skip
    COLOURS,
    FieldView,
    best_and_worst,
    composite,
    contrast,
    fields_picture,
    predicted_fields,
    prediction_pictures,
    read_fields,
)
from tests.report.tables import meta_of, probabilities_of, profile_table
from tests.report.test_picture import BLINDNESS

pytestmark = pytest.mark.xeon_only


def predictions() -> pd.DataFrame:
    """Return five held-out fields: three right, two wrong, and one that was trained on."""
    rows = pd.DataFrame({"Metadata_Plate": "P", "Metadata_Well": list("abcdef"), "Metadata_Site": 1, "Metadata_Treatment": "t"})
    rows["Metadata_Split"], rows["Metadata_MoA"] = ["val"] * 5 + ["train"], ["x", "x", "y", "x", "y", "x"]
    x = [0.9, 0.8, 0.3, 0.05, 0.6, 1.0]
    return predicted_fields(rows, pd.DataFrame({"x": x, "y": [1 - one for one in x]}), "Metadata_MoA")


def test_the_surest_right_stand_first_and_the_surest_wrong_last():
    found = predictions()
    assert list(found["Metadata_Well"]) == ["a", "b", "c", "e", "d"], "f was trained on"
    assert list(found["Predicted"]) == ["x", "x", "y", "x", "y"] and found["Label_Probability"].iloc[-1] == pytest.approx(0.05)


def test_four_fields_tell_four_things():
    best, worst = best_and_worst(predictions(), 2)
    assert list(best["Metadata_Well"]) == ["a", "c"], "one of each class, though b is surer than c"
    assert list(worst["Metadata_Well"]) == ["d", "e"]
    right = predictions().query("Label == Predicted")
    assert list(best_and_worst(right, 1)[1]["Metadata_Well"]) == ["c"], "where none is wrong, the least sure"


def test_rows_without_class_or_probability_are_left_out():
    table = profile_table()
    probabilities = probabilities_of(table)
    probabilities.iloc[-1, 0] = np.nan
    found = predicted_fields(meta_of(table), probabilities, "Metadata_MoA", split=None)
    assert len(found) == len(table) - table["Metadata_MoA"].isna().sum() - int(pd.notna(table["Metadata_MoA"].iloc[-1]))


def test_contrast_is_one_for_all_fields_and_one_a_channel():
    dim, bright = np.full((2, 40, 40), 100.0), np.full((2, 40, 40), 100.0)
    bright[0, 20:] = 900
    limits = contrast([dim, bright])
    assert limits.shape == (2, 2) and tuple(limits[0]) == (100.0, 900.0) and limits[1, 1] > limits[1, 0] == 100.0
    assert composite(dim, limits).max() == 0 and np.allclose(composite(bright, limits)[30, 0], COLOURS[0])


def test_a_bar_is_as_long_as_it_says():
    picture = fields_picture([FieldView(np.random.default_rng(0).random((1, 512, 640)), "one")], ["DAPI"], name="one", title="t", pixel_size_um=0.65)  # fmt: skip
    whole = picture.figure.subfigs[0].subfigs[0] if picture.figure.subfigs[0].subfigs else picture.figure.subfigs[0]
    axes = whole.axes[0]
    (text,) = [t.get_text() for t in axes.texts if t.get_text().endswith("µm")]
    left, right = axes.lines[-1].get_xdata()
    assert text == "50 µm" and (right - left) * 0.65 == pytest.approx(50)
    unknown = fields_picture([FieldView(np.ones((1, 512, 640)), "one")], ["DAPI"], name="one", title="t")
    texts = [t.get_text() for part in unknown.figure.subfigs[0].subfigs for axes in part.axes for t in axes.texts]
    assert any(text.endswith(" px") for text in texts) and not any("µm" in text for text in texts)


@pytest.mark.parametrize(("length", "bar"), [(1.0, 1.0), (1.9, 1.0), (2.0, 2.0), (183.0, 100.0), (499.0, 200.0), (0.07, 0.05)])
def test_bars_are_round(length, bar):
    assert fields._round_length(length) == pytest.approx(bar)


def test_the_part_beside_a_field_is_its_middle_pixel_by_pixel():
    image = np.random.default_rng(0).random((3, 512, 640))
    picture = fields_picture([FieldView(image, "one")], ["a", "b", "c"], name="one", title="t")
    _, parts = picture.figure.subfigs[0].subfigs
    grey = parts.axes[1].images[0].get_array()
    rows, columns = grey.shape
    top, left = (512 - rows) // 2, (640 - columns) // 2
    low, high = contrast([image])[0]
    np.testing.assert_allclose(grey, ((image[0, top : top + rows, left : left + columns] - low) / (high - low)).clip(0, 1), atol=1e-6)
    picture.figure.draw_without_rendering()  # lays it out
    box = parts.axes[1].get_window_extent()
    assert columns == pytest.approx(box.width / picture.figure.dpi * 200, rel=0.05), "a pixel of the field is a pixel of the picture"


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_lights_can_be_told_apart(blindness):
    seen = (COLOURS[:3] ** 2.2) @ np.array(BLINDNESS[blindness]).T
    distances = np.linalg.norm(seen[:, None] - seen, axis=2)[np.triu_indices(3, 1)]
    assert distances.min() > 0.2, distances


def test_real_fields_are_read_and_drawn(tiny_plates):
    index = read_index(PlatesConfig(root=str(tiny_plates)))
    rows = index.table.iloc[[5, 0]]
    images = read_fields(index, rows)
    assert np.array_equal(images[0], read_field(index.paths(5))) and np.array_equal(images[1], read_field(index.paths(0)))
    best = rows.iloc[:1].assign(Label="x", Predicted="x", Probability=0.9, Label_Probability=0.9)
    worst = rows.iloc[1:].assign(Label="x", Predicted="y", Probability=0.7, Label_Probability=0.2)
    pictures = prediction_pictures(best, worst, images, index.channels, pixel_size_um=0.5)
    assert [picture.name for picture in pictures] == ["fields_best", "fields_worst"] and all(picture.photographic for picture in pictures)
    assert pictures[1].title == "Surest and wrong: x taken for y with 0.70" and "as stored" in pictures[1].reading
    two = pd.concat([worst, worst])
    assert prediction_pictures(best, two, [*images, images[1]], index.channels, scaled=True)[1].title.endswith("with 0.70, and 1 other")
    with pytest.raises(DataError, match="P/Z99/1 is not in"):
        read_fields(index, pd.DataFrame({"Metadata_Plate": ["P"], "Metadata_Well": ["Z99"], "Metadata_Site": [1]}))
