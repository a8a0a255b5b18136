"""The baseline learns what simple features tell, per plate, and nothing from the held-out part."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import DataError
from hcsdl.training.baseline import baseline_scores, standardised


def plates(effect=3.0, seed=0, sites=4):
    """Return features, index table and split: 4 plates, DMSO and two compounds of each of two mechanisms, gains that differ by plate."""
    random = np.random.default_rng(seed)
    rows = []
    for plate in range(4):
        for well in range(12):
            compound = ("DMSO", "a1", "a2", "b1", "b2", "DMSO")[well % 6]
            moa = {"D": "DMSO", "a": "A", "b": "B"}[compound[0]]
            rows += [(f"P{plate}", f"W{well}", site, compound, moa) for site in range(sites)]
    table = pd.DataFrame(rows, columns=["Metadata_Plate", "Metadata_Well", "Metadata_Site", "Metadata_Compound", "Metadata_MoA"])
    shift = effect * np.stack([table["Metadata_MoA"] == "A", table["Metadata_MoA"] == "B", np.zeros(len(table))], axis=1)
    plate = table["Metadata_Plate"].str[1:].astype(int).to_numpy()[:, None]
    values = (random.normal(size=shift.shape) + shift) * 10 * (1 + plate) + 500 * plate
    features = pd.DataFrame(values, columns=["Intensity_mean_DAPI", "Intensity_sd_DAPI", "Count_Nuclei"])
    split = pd.Series(np.where(table["Metadata_Plate"].isin(["P0", "P1"]), "train", "val"), index=table.index)
    return features, table, split


def test_standardised_plates_are_comparable():
    """A strong effect is found on other plates with other gains; without effect nothing is."""
    fields, wells = baseline_scores(*plates(), "Metadata_MoA", "DMSO")
    assert fields > 0.85 and wells >= fields
    fields, wells = baseline_scores(*plates(effect=0.0), "MoA", "DMSO")
    assert fields < 0.5 and wells < 0.55


def test_held_out_labels_are_not_learned():
    """Shuffling the held-out labels among themselves destroys the figure; the fit has not seen them."""
    features, table, split = plates()
    val = (split == "val").to_numpy()
    table.loc[val, "Metadata_MoA"] = table.loc[val, "Metadata_MoA"].map({"A": "B", "B": "DMSO", "DMSO": "A"})
    fields, wells = baseline_scores(features, table, split, "MoA", "DMSO")
    assert fields < 0.15 and wells < 0.15


def test_rows_are_matched_by_place_not_by_index():
    """A table selected by a query keeps its old row numbers; the figures do not change."""
    features, table, split = plates(effect=1.0)
    expected = baseline_scores(features, table, split, "MoA", "DMSO")
    odd = np.random.default_rng(1).permutation(len(table)) + 1000
    assert baseline_scores(features, table.set_axis(odd), split.set_axis(odd), "MoA", "DMSO") == expected


def test_unlabelled_fields_are_left_out():
    """Fields without label, or in neither part, change nothing but the standardisation."""
    features, table, split = plates(effect=1.0)
    expected = baseline_scores(features, table, split, "MoA", "DMSO")
    more = table[table["Metadata_Compound"] == "a1"].assign(Metadata_MoA=None, Metadata_Compound="UNKNOWN")
    again = (pd.concat([features, features.loc[more.index]]), pd.concat([table, more]), pd.concat([split, split.loc[more.index]]))
    assert baseline_scores(*again, "MoA", "DMSO") == expected


def test_standardised_by_hand():
    """Mean 0 and sd 1 over each plate's controls; without controls over all; what does not vary is only shifted."""
    features = pd.DataFrame({"Intensity_a": [1.0, 3.0, 10.0, 4.0, 8.0], "Intensity_b": [0.1, 0.1, 0.3, 7.0, 7.0]})
    found = standardised(features, pd.Series(["P", "P", "P", "Q", "Q"]), pd.Series([True, True, False, False, True]))
    assert found == pytest.approx(np.array([[-1, 0], [1, 0], [8, 0.2], [-1, 0], [1, 0]]))
    assert features.iloc[0, 0] == 1.0


def test_impossible():
    """One class in train, or nothing held out, is an error."""
    features, table, split = plates()
    with pytest.raises(DataError, match="Got 1 classes"):
        baseline_scores(features, table.assign(Metadata_MoA="A"), split, "MoA", "DMSO")
    with pytest.raises(DataError, match="and 0 fields"):
        baseline_scores(features, table, split.replace("val", "train"), "MoA", "DMSO")


def test_no_torch():
    """The baseline runs where torch is not imported."""
    code = "import sys, hcsdl.training.baseline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
