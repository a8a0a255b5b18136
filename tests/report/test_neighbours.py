"""Nearest treatments: against a plain loop, the own compound left out, batches told."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import ConfigError
from hcsdl.profiles.tables import Profiles
from hcsdl.report.neighbours import example_rows, nearest_treatments, neighbours_picture
from tests.report.tables import meta_of, profile_table, wells_of

pytestmark = pytest.mark.xeon_only


def test_nearest_are_those_a_plain_loop_finds():
    wells = wells_of(profile_table())
    treatment, found = nearest_treatments(wells, "A1", number=4)
    names = wells.meta["Metadata_Treatment"]
    means = {name: wells.values[(names == name).to_numpy()].mean(axis=0) for name in names.unique()}
    lengths = {name: np.linalg.norm(mean) for name, mean in means.items()}
    assert treatment == max((name for name in means if name.startswith("A1 ")), key=lengths.get) == "A1 10"
    cosines = {n: means[n] @ means[treatment] / lengths[n] / lengths[treatment] for n in means if not n.startswith("A1 ")}
    expected = sorted(cosines, key=cosines.get, reverse=True)[:4]
    assert list(found["Treatment"]) == expected and list(found["Cosine"]) == pytest.approx([cosines[n] for n in expected])
    assert found["Treatment"].iloc[0] in ("A2 10", "A2 1") and found["MoA"].iloc[0] == "Actin"


def test_a_compound_of_no_known_mechanism_has_neighbours_too():
    treatment, found = nearest_treatments(wells_of(profile_table()), "U")
    assert treatment == "U 10" and set(found["MoA"].head(3)) == {"Kinase"}
    title = neighbours_picture(treatment, None, found, [np.random.default_rng(0).random((3, 64, 64))] * 6, ["a", "b", "c"]).title
    assert title.startswith(f"U 10 is nearest to {found['Treatment'].iloc[0]}") and "nearest are Kinase" in title


def test_batches_are_told():
    wells = wells_of(profile_table())
    first = wells.take((wells.meta["Metadata_Plate"] == "Week1_0").to_numpy() & (wells.meta["Metadata_Compound"] != "K1").to_numpy())
    second = wells.take((wells.meta["Metadata_Plate"] == "Week2_2").to_numpy() & (wells.meta["Metadata_Compound"] == "K1").to_numpy())
    joined = Profiles(pd.concat([first.meta, second.meta], ignore_index=True), np.vstack([first.values, second.values]), first.names)
    found = nearest_treatments(joined, "K2", number=20)[1].set_index("Compound")["Batches"]
    assert set(found["K1"]) == {"other"} and set(found["A1"]) == {"same"}


def test_the_picture_shows_the_treatment_and_all_neighbours_and_says_whose_mechanism_they_have():
    treatment, found = nearest_treatments(wells_of(profile_table()), "A1", number=5)
    images = [np.random.default_rng(n).random((3, 512, 640)) for n in range(6)]
    picture = neighbours_picture(treatment, "Actin", found, images, ["a", "b", "c"], pixel_size_um=0.5)
    texts = [text.get_text() for axes in picture.figure.axes for text in axes.texts]
    assert all(any(text.startswith(f"{name}\n") for text in texts) for name in [treatment, *found["Treatment"]])
    same = (found["MoA"] == "Actin").sum()
    assert "of the same mechanism" in picture.title and picture.title.endswith(f"{same} of its 5 nearest share Actin")
    assert "not of its own mechanism but Actin" in neighbours_picture(treatment, "Kinase", found, images, ["a", "b", "c"]).title


def test_examples_are_one_field_of_each_in_the_order_asked():
    rows = example_rows(meta_of(profile_table()), ["K1 10", "DMSO"])
    assert list(rows["Metadata_Treatment"]) == ["K1 10", "DMSO"] and list(rows["Metadata_Site"]) == [1, 1]
    assert set(rows["Metadata_Plate"]) == {"Week1_0"}


@pytest.mark.parametrize("words", [{"compound": "water"}, {"compound": "A1", "treatment": "A2 10"}])
def test_what_is_not_there_is_an_error(words):
    with pytest.raises(ConfigError, match="a compound of the table"):
        nearest_treatments(wells_of(profile_table()), **words)
