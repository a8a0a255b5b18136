"""NSC and NSCB: by hand, against a plain oracle, on BBBC021's own plate map, and under what must not matter."""

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import DataError, PlatesConfig
from hcsdl.plates.index import read_index
from hcsdl.profiles.neighbours import confusion, nearest_neighbours, per_moa
from hcsdl.profiles.normalise import normalise
from hcsdl.profiles.tables import Profiles
from hcsdl.profiles.treatments import treatment_profiles, unit_rows
from tests.plates.screens import REAL_CSV
from tests.profiles.screens import as_profiles, draw_wells, treatments_only

pytestmark = pytest.mark.xeon_only


def six() -> Profiles:
    """Six treatments by the angle of their profile; e is alone in its mechanism and stands in the others' way."""
    meta = pd.DataFrame(
        [("a", "m1", "b1"), ("a", "m1", "b1"), ("b", "m1", "b2"), ("c", "m2", "b1"), ("d", "m2", "b1"), ("e", "m3", "b2")],
        columns=["Compound", "MoA", "Batch"],
    )
    degrees = np.deg2rad([0, 10, 15, 100, 120, 13])
    return treatments_only(meta, np.stack([np.cos(degrees), np.sin(degrees)], axis=1))


def test_six_treatments_by_hand():
    treatments = treatment_profiles(six(), "DMSO")
    found = nearest_neighbours(treatments)
    nsc, nscb = found["NSC"], found["NSCB"]
    assert nsc.neighbour.tolist() == [5, 5, 5, 4, 3, -1] and nsc.accuracy == pytest.approx(2 / 5)
    assert nscb.neighbour.tolist() == [5, 5, 1, -1, -1, -1] and nscb.accuracy == pytest.approx(1 / 3)
    assert nsc.similarity[:5] == pytest.approx(np.cos(np.deg2rad([13, 3, 2, 20, 20])))
    table = per_moa(treatments, nsc).set_index("MoA")
    assert table.loc["m1", ["compounds", "treatments", "dropped", "hits", "recall"]].tolist() == [2, 3, 0, 0, 0.0]
    assert table.loc["m2", ["hits", "recall", "precision"]].tolist() == [2, 1.0, 1.0]
    assert table.loc["m3", "dropped"] == 1 and np.isnan(table.loc["m3", "recall"]) and table.loc["m3", "precision"] == 0
    assert confusion(treatments, nsc).to_numpy().tolist() == [[0, 0, 3], [0, 2, 0], [0, 0, 0]]


def oracle(meta: pd.DataFrame, batches: list[set], values: np.ndarray, rule: str) -> list[int]:
    """Return each treatment's neighbour, −1 where it is not scored, a pair at a time."""
    found = []
    for i in range(len(meta)):
        allowed = [
            j
            for j in range(len(meta))
            if meta["Compound"][j] != meta["Compound"][i]
            and (rule == "NSC" or not batches[i] & batches[j] or (len(batches[i]) == 4 > len(batches[j])))
        ]  # fmt: skip
        if not any(meta["MoA"][j] == meta["MoA"][i] for j in allowed):
            found.append(-1)
            continue
        cosines = [values[i] @ values[j] / np.linalg.norm(values[i]) / np.linalg.norm(values[j]) for j in allowed]
        found.append(allowed[int(np.argmax(cosines))])
    return found


@pytest.mark.parametrize("seed", range(5))
def test_oracle(seed):
    """Random treatments, some in several batches or all, some mechanisms of one compound."""
    rng = np.random.default_rng(seed)
    compound = rng.integers(0, 12, 40)
    meta = pd.DataFrame({"Compound": [f"c{c:02d}" for c in compound], "MoA": [f"m{c // 2 if c < 10 else c}" for c in compound]})
    batches = [set(rng.choice(4, rng.integers(1, 3), replace=False)) for _ in range(40)]
    batches[3] = batches[4] = {0, 1, 2, 3}
    values = rng.normal(size=(40, 5))
    rows = [(row, batch) for row in range(40) for batch in sorted(batches[row])]
    wells = treatments_only(meta.assign(Batch="x"), values)
    repeated = wells.take(np.array([row for row, _ in rows]))
    repeated = Profiles(repeated.meta.assign(Metadata_Batch=[f"b{b}" for _, b in rows]), repeated.values, repeated.names)
    found = nearest_neighbours(treatment_profiles(repeated, "DMSO"))
    for rule in ("NSC", "NSCB"):
        assert found[rule].neighbour.tolist() == oracle(meta, batches, values, rule)
        assert 0 < found[rule].scored.sum() < 40
        hits = [meta["MoA"][j] == meta["MoA"][i] for i, j in enumerate(found[rule].neighbour) if j >= 0]
        assert found[rule].accuracy == pytest.approx(np.mean(hits))


@pytest.mark.skipif(not REAL_CSV.is_dir(), reason="BBBC021's CSV files are not beside this checkout")
def test_bbbc021_has_103_and_92():
    """Of the real plate map, 103 treatments are scored by NSC and 92 by NSCB; the 11 that drop out are all of two mechanisms."""
    table = read_index(PlatesConfig(root=str(REAL_CSV)), files=False).table
    meta = table.drop_duplicates(["Metadata_Plate", "Metadata_Well"]).filter(like="Metadata_").reset_index(drop=True)
    values = np.random.default_rng(0).normal(size=(len(meta), 4))
    treatments = treatment_profiles(Profiles(meta, values, tuple("abcd")), "DMSO")
    found = nearest_neighbours(treatments)
    assert (len(treatments), int(found["NSC"].scored.sum()), int(found["NSCB"].scored.sum())) == (103, 103, 92)
    assert set(treatments.profiles.meta["Metadata_MoA"][~found["NSCB"].scored]) == {"Cholesterol-lowering", "Kinase inhibitors"}
    assert "taxol 0.3" in treatments.names[found["NSCB"].scored]
    assert "taxol 0.3" not in treatments.names[found["NSCB"].neighbour[found["NSCB"].scored]]


@pytest.fixture(scope="module")
def wells() -> Profiles:
    return as_profiles(draw_wells(effect=0.7, batch_effect=1.0))


STEPS = {
    "none": [],
    "standardised": ["standardise_control"],
    "robust": ["robust_all"],
    "sphered": ["sphere_zca"],
    "tvn": ["tvn"],
    "combat": ["combat"],
}


def neighbours(wells: Profiles, steps: list[str]) -> dict[str, list[int]]:
    treatments = treatment_profiles(normalise(wells, steps, control="DMSO", regularisation=0.01), "DMSO")
    return {rule: found.neighbour.tolist() for rule, found in nearest_neighbours(treatments).items()}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_row_order_and_positive_scaling_do_not_matter(wells, steps):
    expected = neighbours(wells, steps)
    order = np.random.default_rng(1).permutation(len(wells))
    assert neighbours(wells.take(order), steps) == expected
    assert neighbours(Profiles(wells.meta, 37.0 * wells.values, wells.names), steps) == expected


@pytest.mark.parametrize("steps", [[], ["sphere_pca"], ["sphere_zca"]], ids="+".join)
def test_rotation_does_not_matter_where_features_are_not_scaled_one_by_one(wells, steps):
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))[0]
    rotated = Profiles(wells.meta, wells.values @ rotation, wells.names)
    assert neighbours(rotated, steps) == neighbours(wells, steps)


def test_ties_go_to_the_first_by_name_even_when_rounding_differs():
    """Thirty multiples of one profile: every cosine is 1 but for rounding, which would choose any of them."""
    rng = np.random.default_rng(0)
    meta = pd.DataFrame({"Compound": [f"c{i:02d}" for i in range(30)], "MoA": ["m1", "m2"] * 15, "Batch": ["x"] * 30})
    values = rng.uniform(0.1, 10, 30)[:, None] * rng.normal(size=50)
    found = nearest_neighbours(treatment_profiles(treatments_only(meta, values), "DMSO"))["NSC"]
    assert found.neighbour.tolist() == [1] + [0] * 29


def test_profile_of_zeros_and_single_feature():
    """Zeros are alike to nothing; with one feature the nearest is the nearest value, not any of the same sign."""
    meta = pd.DataFrame({"Compound": list("abcd"), "MoA": ["m1", "m1", "m2", "m2"], "Batch": ["x"] * 4})
    found = nearest_neighbours(treatment_profiles(treatments_only(meta, np.array([[0.0, 0], [1, 0], [1, 0.1], [1, 0.4]])), "DMSO"))["NSC"]
    assert found.similarity[0] == 0 and found.neighbour.tolist() == [1, 2, 1, 2]
    one = nearest_neighbours(treatment_profiles(treatments_only(meta, np.array([[50.0], [61], [90], [120]])), "DMSO"))["NSC"]
    assert one.neighbour.tolist() == [1, 0, 1, 2]
    assert unit_rows(np.array([[4.0], [4.0]])).tolist() == [[1, 0], [1, 0]]


def test_one_treatment_a_mechanism_scores_nothing():
    meta = pd.DataFrame({"Compound": list("abc"), "MoA": list("xyz"), "Batch": ["x"] * 3})
    found = nearest_neighbours(treatment_profiles(treatments_only(meta, np.eye(3)), "DMSO"))
    assert np.isnan(found["NSC"].accuracy) and not found["NSC"].scored.any()


def test_no_labels():
    with pytest.raises(DataError, match="Some treatment besides the control must have a Metadata_MoA"):
        treatment_profiles(as_profiles(draw_wells().assign(Metadata_MoA="DMSO")), "DMSO")


def test_single_precision_only_chooses_candidates():
    """Forty profiles so alike that single precision puts them in another order: neighbours and cosines are those of double precision."""
    rng = np.random.default_rng(0)
    meta = pd.DataFrame({"Compound": [f"c{i:02d}" for i in range(40)], "MoA": ["m1", "m2"] * 20, "Batch": ["x"] * 40})
    values = rng.normal(size=64) + 1e-3 * rng.normal(size=(40, 64))
    units = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosines = units @ units.T - 2 * np.eye(40)
    found = nearest_neighbours(treatment_profiles(treatments_only(meta, values), "DMSO"))["NSC"]
    assert found.neighbour.tolist() == cosines.argmax(axis=1).tolist()
    np.testing.assert_allclose(found.similarity, cosines.max(axis=1), atol=1e-14)


def test_without_batches_there_is_no_nscb(wells):
    bare = Profiles(wells.meta.drop(columns="Metadata_Batch"), wells.values, wells.names)
    assert set(neighbours(bare, [])) == {"NSC"}


def test_blocks_join(monkeypatch, wells):
    expected = neighbours(wells, [])
    monkeypatch.setattr("hcsdl.profiles.neighbours.BLOCK", 5)
    monkeypatch.setattr("hcsdl.profiles.neighbours.PAIRS", 2)
    assert neighbours(wells, []) == expected
