"""Predicted probabilities: scikit-learn's figures, wells as the mean of logits, folds that must be whole."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

from hcsdl.config import ConfigError, DataError
from hcsdl.profiles.predictions import Predicted, find_target, merge_folds, predict
from tests.profiles.screens import draw_wells

pytestmark = pytest.mark.xeon_only


@pytest.fixture
def rows() -> pd.DataFrame:
    table = draw_wells(sites=3, batches=3, plates_per_batch=1, compounds_per_moa=3)
    return table.filter(like="Metadata_").assign(Metadata_Split="val")


def draw_probabilities(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return probabilities (N, 5), often right, of the five classes of `rows`."""
    classes = sorted(set(rows["Metadata_MoA"]))
    logits = np.random.default_rng(seed).normal(size=(len(rows), len(classes)))
    logits[np.arange(len(rows)), [classes.index(moa) for moa in rows["Metadata_MoA"]]] += 1.0
    return pd.DataFrame(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), columns=classes)


def test_figures_are_scikit_learns(rows):
    probabilities = draw_probabilities(rows)
    found, left_out = predict(rows, probabilities, "Metadata_MoA")
    guess = probabilities.columns[probabilities.to_numpy().argmax(axis=1)]
    assert left_out == 0 and found["fields"].hit.mean() == accuracy_score(rows["Metadata_MoA"], guess)
    assert found["fields"].macro_f1 == pytest.approx(f1_score(rows["Metadata_MoA"], guess, average="macro"))
    logits = np.log(probabilities).groupby([rows["Metadata_Plate"], rows["Metadata_Well"]]).mean()
    truth = rows.groupby(["Metadata_Plate", "Metadata_Well"])["Metadata_MoA"].first()
    assert len(found["wells"].labels) == len(truth) == len(rows) // 3
    assert found["wells"].hit.mean() == accuracy_score(truth, logits.idxmax(axis=1)) > found["fields"].hit.mean()
    scaled = np.exp(logits)
    expected = (scaled.max(axis=1) / scaled.sum(axis=1)).to_numpy()
    np.testing.assert_allclose(found["wells"].confidence, expected)


def test_rows_that_are_wells_are_not_called_fields(rows):
    wells = rows[rows["Metadata_Site"] == 1].drop(columns="Metadata_Site").reset_index(drop=True)
    found, _ = predict(wells, draw_probabilities(wells), "Metadata_MoA")
    assert set(found) == {"wells"} and len(found["wells"].labels) == len(wells)


def test_f1_is_of_the_classes_that_occur(rows):
    some = (rows["Metadata_MoA"] != "moa 0").to_numpy()
    probabilities = draw_probabilities(rows)
    found = predict(rows[some], probabilities[some], "Metadata_MoA")[0]["fields"]
    guess = probabilities.columns[probabilities[some].to_numpy().argmax(axis=1)]
    present = sorted(set(rows["Metadata_MoA"][some]))
    assert found.macro_f1 == pytest.approx(f1_score(rows["Metadata_MoA"][some], guess, labels=present, average="macro"))
    assert "moa 0" in set(guess)


def test_calibration_error_by_hand():
    """Two bins: three at 0.9 of which two are right, one at 0.5 that is wrong."""
    predicted = Predicted("fields", np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0]), np.array([0.9, 0.9, 0.9, 0.5]), np.array(list("abcd")))
    assert predicted.calibration_error == pytest.approx((3 * abs(2 / 3 - 0.9) + 0.5) / 4)
    sure = Predicted("fields", np.zeros(3, int), np.zeros(3, int), np.ones(3), np.array(list("abc")))
    assert sure.calibration_error == 0


def test_rows_without_a_class_are_counted(rows):
    probabilities = draw_probabilities(rows)
    other = rows.assign(Metadata_MoA=rows["Metadata_MoA"].replace("moa 1", None))
    probabilities.iloc[0, 2] = np.nan
    found, left_out = predict(other, probabilities, "Metadata_MoA")
    assert left_out == int((rows["Metadata_MoA"] == "moa 1").sum()) + 1 == len(rows) - len(found["fields"].labels)
    assert predict(other.assign(Metadata_MoA=None), probabilities, "Metadata_MoA") == ({}, len(rows))


def test_target_is_found_by_the_classes(rows):
    assert find_target(rows, ["moa 0", "moa 1"], None) == "Metadata_MoA"
    assert find_target(rows, ["compound 0a", "DMSO"], None) == "Metadata_Compound"
    assert find_target(rows, ["Week0"], "Batch") == "Metadata_Batch"
    with pytest.raises(DataError, match="must be named by classes of Metadata_MoA or .* No row has any of the 1, mao 0 the first"):
        find_target(rows, ["mao 0"], None)
    with pytest.raises(ConfigError, match="score.target must be a Metadata_"):
        find_target(rows, ["moa 0"], "Colour")


def folds(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Return three folds that hold out compounds a, b and c of every mechanism."""
    return [
        (f"fold {letter}", rows.assign(Metadata_Split=np.where(rows["Metadata_Compound"].str.endswith(letter), "val", "train")), draw_probabilities(rows, seed))
        for seed, letter in enumerate("abc")
    ]  # fmt: skip


def test_folds_are_merged_and_each_compound_counts_once(rows):
    merged, probabilities = merge_folds(folds(rows), "DMSO")
    treated = rows[rows["Metadata_Compound"] != "DMSO"]
    assert len(merged) == len(probabilities) == len(treated) and set(merged["Metadata_Compound"]) == set(treated["Metadata_Compound"])
    key = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
    assert not merged.duplicated(key).any()
    at = rows.reset_index().merge(merged.iloc[[0, -1]], on=key)["index"]
    assert probabilities.iloc[0].tolist() == draw_probabilities(rows, 0).iloc[at[0]].tolist()
    assert probabilities.iloc[-1].tolist() == draw_probabilities(rows, 2).iloc[at[1]].tolist()


def test_folds_must_be_whole(rows):
    a, b, c = folds(rows)
    with pytest.raises(DataError, match=r"4 of 12 are in none \(compound 0c, compound 1c, .*\): add the missing folds"):
        merge_folds([a, b], "DMSO")
    with pytest.raises(DataError, match="compound 0a is in fold a and in again"):
        merge_folds([a, b, c, ("again", *a[1:])], "DMSO")
    torn = b[1].assign(Metadata_Split=b[1]["Metadata_Split"].where(b[1]["Metadata_Well"] != "B08", "val"))
    with pytest.raises(DataError, match="fold b also trains on"):
        merge_folds([a, ("fold b", torn.assign(Metadata_Split=np.where(torn.index % 2, "train", torn["Metadata_Split"])), b[2]), c], "DMSO")
    with pytest.raises(DataError, match="fold b has none"):
        merge_folds([a, ("fold b", b[1].drop(columns="Metadata_Split"), b[2]), c], "DMSO")
    with pytest.raises(DataError, match="must have the same classes"):
        merge_folds([a, ("fold b", b[1], b[2].rename(columns={"moa 0": "other"})), c], "DMSO")
