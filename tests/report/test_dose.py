"""Dose responses: every well is a marker, trained ones are hollow, titles say from which dose on a mechanism is seen."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import ConfigError
from hcsdl.report.dose import dose_picture, mechanism_probabilities
from tests.report.tables import meta_of, probabilities_of, profile_table

pytestmark = pytest.mark.xeon_only


def draw(table: pd.DataFrame, compound: str = "A1", **options: object):
    return dose_picture(meta_of(table), probabilities_of(table), compound, **options)


def test_title_says_from_which_concentration_on():
    table = profile_table()
    assert draw(table).title == "A1 is recognised as Actin from 1 on"
    table.loc[table["Metadata_Concentration"] == 1, "Prob_Actin"] = 0.01
    assert draw(table).title == "A1 is recognised as Actin from 10 on"
    table.loc[table["Metadata_Concentration"] == 10, ["Prob_DMSO", "Prob_Actin", "Prob_Kinase"]] = [0.8, 0.1, 0.1]
    title = draw(table).title
    assert title.startswith("A1 is not recognised as Actin at any concentration") and "looks like the control (0.80)" in title


def test_wells_that_were_trained_on_do_not_decide():
    table = profile_table()
    table.loc[table["Metadata_Split"] == "train", ["Prob_Actin", "Prob_Kinase", "Prob_DMSO"]] = [0.98, 0.01, 0.01]
    assert draw(table).title == "A1 is recognised as Actin from 1 on", "at 0.1 only wells that trained say so"
    assert "hollow wells were trained on" in draw(table).reading
    assert "hollow" not in draw(table.drop(columns="Metadata_Split")).reading


def test_every_well_is_a_marker_in_its_place():
    table = profile_table()
    axes = draw(table).figure.axes[0]
    points = np.concatenate([group.get_offsets() for group in axes.collections])
    assert len(points) == 3 * (12 + 16), "3 mechanisms of 3 doses on 4 plates, and of 4 control wells on each"
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["DMSO", "0.1", "1", "10"] and "concentration of A1" in axes.get_xlabel()
    hollow = sum(len(group.get_offsets()) for group in axes.collections if not len(group.get_facecolors()))
    assert hollow == len(points) / 2


def test_a_compound_without_mechanism_is_told_what_it_looks_like():
    assert draw(profile_table(), "U").title == "U, of no known mechanism: at 10 it looks most like Kinase (0.90)"


def test_classes_of_treatments_are_summed_by_mechanism_without_the_own_compound():
    table = profile_table(sites=1)
    rows, rng = meta_of(table), np.random.default_rng(0)
    classes = sorted(rows["Metadata_Treatment"].unique())
    values = pd.DataFrame(rng.dirichlet(np.ones(len(classes)), len(rows)), columns=classes)
    found = mechanism_probabilities(rows, values, "Metadata_Treatment", "A1")
    allowed = {"DMSO": ["DMSO"], "Actin": [c for c in classes if c.startswith("A2")], "Kinase": [c for c in classes if c[0] == "K"]}
    for row in (0, 7, 50):
        total = sum(values.at[row, c] for names in allowed.values() for c in names)
        for moa, names in allowed.items():
            assert found.at[row, moa] == pytest.approx(sum(values.at[row, c] for c in names) / total)
    assert "A1's own left out" in dose_picture(rows, values, "A1", target="Metadata_Treatment").reading


def test_wells_without_a_concentration_are_left_out_and_none_at_all_is_an_error():
    table = profile_table()
    some = table["Metadata_Concentration"] == 1
    table.loc[some, "Metadata_Concentration"] = np.nan
    ticks = [label.get_text() for label in draw(table).figure.axes[0].get_xticklabels()]
    assert "nan" not in ticks and "1" not in ticks and "10" in ticks
    table["Metadata_Concentration"] = np.nan
    with pytest.raises(ConfigError, match="No well of A1 has one"):
        draw(table)


def test_an_unknown_compound_is_an_error():
    with pytest.raises(ConfigError, match="Got 'water'; there are DMSO, A1"):
        draw(profile_table(), "water")
