"""Mean average precision: copairs' figures, exact nulls, corrected p-values."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hcsdl.profiles.precision import _benjamini_hochberg, average_precision, moa_precision, null_distribution, replicate_precision
from hcsdl.profiles.tables import Profiles
from hcsdl.profiles.treatments import treatment_profiles
from tests.profiles.screens import as_profiles, draw_wells

pytestmark = pytest.mark.xeon_only


@pytest.fixture(scope="module")
def wells() -> Profiles:
    return as_profiles(draw_wells(effect=0.8))


def copairs_map(ap: pd.DataFrame, by: str, cache: Path) -> pd.DataFrame:
    """Return copairs' mAP and p-values of groups; where chance can do exactly as well, that counts as in copairs' p-values of single queries."""
    from copairs import compute
    from copairs.map import mean_average_precision

    found = mean_average_precision(ap, [by], null_size=10_000, threshold=0.05, seed=0, progress_bar=False, max_workers=1, cache_dir=cache)
    sizes, which = np.unique(ap[["n_pos_pairs", "n_total_pairs"]].to_numpy(), axis=0, return_inverse=True)
    nulls = compute.get_null_dists(sizes, 10_000, seed=0, cache_dir=cache, progress_bar=False)
    found["p_value"] = [
        (1 + (nulls[which[rows]].mean(axis=0) >= mean - 1e-6).sum()) / 10_001
        for rows, mean in zip(found["indices"], found["mean_average_precision"], strict=True)
    ]
    return found.sort_values(by, ignore_index=True)


def test_mechanisms_are_copairs(wells, tmp_path):
    from copairs.map import average_precision as copairs_ap

    treatments = treatment_profiles(wells, "DMSO")
    meta, values = treatments.profiles.meta, treatments.profiles.values
    ap = copairs_ap(meta, values, ["Metadata_MoA"], ["Metadata_Compound"], [], ["Metadata_MoA"], progress_bar=False)
    ours, left_out = moa_precision(treatments)
    theirs = copairs_map(ap, "Metadata_MoA", tmp_path)
    assert list(ours["Metadata_MoA"]) == list(theirs["Metadata_MoA"]) and left_out == 0
    np.testing.assert_allclose(ours["mAP"], theirs["mean_average_precision"], rtol=1e-6)
    np.testing.assert_allclose(ours["p_value"], theirs["p_value"], atol=0.02)


def test_replicates_are_copairs(tmp_path):
    """copairs pairs controls with each other too unless each stands for itself, so they get numbers."""
    from copairs.map import average_precision as copairs_ap

    wells = as_profiles(draw_wells(effect=0.3, batch_effect=0.2))
    is_control = wells.meta["Metadata_Compound"] == "DMSO"
    own = wells.meta["Metadata_Treatment"].where(~is_control, [f"DMSO {i}" for i in range(len(wells))])
    meta = wells.meta.assign(Metadata_Own=own, Metadata_Control=is_control)
    ap = copairs_ap(meta, wells.values, ["Metadata_Own"], [], ["Metadata_Plate"], ["Metadata_Control"], progress_bar=False)
    ours, left_out = replicate_precision(wells, "DMSO")
    theirs = copairs_map(ap[~ap["Metadata_Control"]].reset_index(drop=True), "Metadata_Own", tmp_path)
    assert list(ours["Metadata_Treatment"]) == list(theirs["Metadata_Own"]) and left_out == 0
    np.testing.assert_allclose(ours["mAP"], theirs["mean_average_precision"], rtol=1e-6)
    np.testing.assert_allclose(ours["p_value"], theirs["p_value"], atol=0.02)
    assert ours["p_value"].max() > 0.3 and ours["p_value"].min() < 0.05


def test_average_precision_by_hand():
    assert average_precision(np.array([0.9, 0.5]), np.array([0.7, 0.1])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([0.5]), np.array([0.5, 0.5])) == pytest.approx(1 / 3)  # ties speak against
    assert average_precision(np.array([0.2, 0.8]), np.array([])) == 1


@pytest.mark.parametrize(("positives", "total"), [(1, 4), (2, 6), (3, 3), (4, 9)])
def test_null_is_that_of_all_rankings(positives, total):
    exact = [
        np.mean([(k + 1) / (place + 1) for k, place in enumerate(places)]) for places in itertools.combinations(range(total), positives)
    ]  # fmt: skip
    drawn = null_distribution(positives, total, 40_000, np.random.default_rng(0))
    values = np.unique(np.round(exact, 9))
    shares = [np.mean(np.isclose(exact, v)) for v in values]
    assert [np.mean(np.isclose(drawn, v)) for v in values] == pytest.approx(shares, abs=0.012)
    assert set(np.round(drawn, 9)) == set(values)


def test_null_comes_in_blocks(monkeypatch):
    whole = null_distribution(3, 50, 1000, np.random.default_rng(0))
    monkeypatch.setattr("hcsdl.profiles.precision.BLOCK_ELEMENTS", 40)
    blocks = null_distribution(3, 50, 1000, np.random.default_rng(0))
    assert len(blocks) == 1000 and blocks.mean() == pytest.approx(whole.mean(), abs=0.02)


def test_corrected_p_values_are_scipys():
    from scipy.stats import false_discovery_control

    p_values = np.random.default_rng(0).random(30) ** 2
    assert _benjamini_hochberg(p_values) == pytest.approx(false_discovery_control(p_values))


def test_chance_that_does_as_well_counts():
    """Three wells that rank perfectly among six controls do what one random ranking in 28 does; no p-value is below one over the rankings drawn."""
    wells = as_profiles(draw_wells(effect=50.0, batch_effect=0.0))
    table, _ = replicate_precision(wells, "DMSO", null_size=20_000)
    assert (table["mAP"] == 1).all() and table["p_value"].to_numpy() == pytest.approx(1 / 28, rel=0.15)
    assert set(moa_precision(treatment_profiles(wells, "DMSO"), null_size=100)[0]["p_value"]) == {1 / 101}


def test_who_cannot_be_a_query_is_counted(wells):
    bare = wells.take(~((wells.meta["Metadata_Compound"] == "DMSO") & (wells.meta["Metadata_Plate"] == "Week0_1")).to_numpy())
    single = bare.take(~((bare.meta["Metadata_Compound"] == "compound 0b") & (bare.meta["Metadata_Plate"] != "Week1_0")).to_numpy())
    table, left_out = replicate_precision(single, "DMSO", null_size=100)
    assert left_out == 8 + 2 and "compound 0b 1" not in set(table["Metadata_Treatment"])
    assert table.set_index("Metadata_Treatment").loc["compound 0a 1", "queries"] == 2
    lonely = wells.take(
        (wells.meta["Metadata_Compound"] != "compound 3b").to_numpy() & (wells.meta["Metadata_Compound"] != "compound 3c").to_numpy()
    )
    table, left_out = moa_precision(treatment_profiles(lonely, "DMSO"), null_size=100)
    assert left_out == 2 and list(table["Metadata_MoA"]) == ["moa 0", "moa 1", "moa 2"]


def test_profiles_all_alike_find_nothing(wells):
    flat = Profiles(wells.meta, np.ones_like(wells.values), wells.names)
    assert moa_precision(treatment_profiles(flat, "DMSO"))[0]["p_value"].min() > 0.9
    assert replicate_precision(flat, "DMSO")[0]["p_value"].min() > 0.9


def test_row_order_and_scaling_do_not_matter_and_blocks_join(monkeypatch, wells):
    expected = [replicate_precision(wells, "DMSO")[0], moa_precision(treatment_profiles(wells, "DMSO"))[0]]
    monkeypatch.setattr("hcsdl.profiles.precision.BLOCK", 2)
    order = np.random.default_rng(0).permutation(len(wells))
    other = Profiles(wells.meta.iloc[order].reset_index(drop=True), 5 * wells.values[order], wells.names)
    found = [replicate_precision(other, "DMSO")[0], moa_precision(treatment_profiles(other, "DMSO"))[0]]
    for one, two in zip(expected, found, strict=True):
        pd.testing.assert_frame_equal(one, two)
