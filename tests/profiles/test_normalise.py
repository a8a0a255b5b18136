"""The ladder: every rung against its definition and against pycytominer."""

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import NORMALISATIONS, ConfigError, DataError
from hcsdl.profiles.normalise import LADDER, normalise, sphere, standardise, usable_features
from hcsdl.profiles.selection import select_features
from hcsdl.profiles.tables import Profiles
from hcsdl.profiles.treatments import unit_rows
from tests.profiles.screens import as_profiles, draw_wells

pytestmark = pytest.mark.xeon_only


@pytest.fixture
def wells() -> Profiles:
    return as_profiles(draw_wells(batch_effect=3.0, control_wells=8))


def control(wells: Profiles) -> np.ndarray:
    return (wells.meta["Metadata_Compound"] == "DMSO").to_numpy()


def changed(wells: Profiles, values: np.ndarray) -> Profiles:
    return Profiles(wells.meta, values, tuple(f"f{i}" for i in range(values.shape[1])))


@pytest.mark.parametrize(("robust", "method"), [(False, "standardize"), (True, "mad_robustize")])
@pytest.mark.parametrize("samples", ["all", "Metadata_Compound == 'DMSO'"])
def test_scaling_is_pycytominers(wells, robust, method, samples):
    from pycytominer import normalize

    ours = standardise(wells, None if samples == "all" else control(wells), robust=robust)
    frame = pd.concat([wells.meta, pd.DataFrame(wells.values, columns=wells.names)], axis=1)
    theirs = [
        normalize(part, features=list(wells.names), meta_features=list(wells.meta), samples=samples, method=method)
        for _, part in frame.groupby("Metadata_Plate")
    ]
    np.testing.assert_allclose(ours.values, pd.concat(theirs)[list(wells.names)].to_numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["pca", "zca"])
def test_sphering_is_pycytominers_where_it_can(wells, method):
    from pycytominer.operations import Spherize

    ours = sphere(wells, control(wells), method=method, regularisation=0.0).values
    frame = pd.DataFrame(wells.values, columns=wells.names)
    theirs = Spherize(epsilon=0, method=method.upper()).fit(frame[control(wells)]).transform(frame).to_numpy()
    if method == "pca":  # components come in another order and with any sign
        ours, theirs = (np.sort(np.abs(values), axis=1) for values in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_sphered_controls_are_white_and_both_forms_alike(wells):
    pca, zca = (sphere(wells, control(wells), method=m, regularisation=0.0).values for m in ("pca", "zca"))
    np.testing.assert_allclose(np.cov(pca[control(wells)].T), np.eye(12), atol=1e-9)
    np.testing.assert_allclose(unit_rows(pca) @ unit_rows(pca).T, unit_rows(zca) @ unit_rows(zca).T, atol=1e-9)


def test_fewer_controls_than_features_need_regularisation(wells):
    few = control(wells) & (np.cumsum(control(wells)) <= 5)
    with pytest.raises(DataError, match=r"score.regularisation above 0 .* 5 wells, 12 features"):
        sphere(wells, few, method="zca", regularisation=0.0)
    values = sphere(wells, few, method="zca", regularisation=0.1).values
    assert np.isfinite(values).all() and np.trace(np.cov(values[few].T)) < 4  # five wells vary in four directions


def test_selection_is_pycytominers():
    from pycytominer import feature_select

    rng = np.random.default_rng(0)
    base = rng.normal(size=(300, 8))
    twins = base[:, :4] + 0.2 * rng.normal(size=(300, 4))
    rare = (rng.random((300, 2)) < [0.01, 0.3]).astype(float)
    values = np.concatenate([base, twins, -base[:, :1], rare, np.full((300, 1), 3.0), 1e-4 * base[:, 7:], np.round(base[:, 6:7])], axis=1)
    profiles = Profiles(pd.DataFrame({"Metadata_Well": range(300)}), values, tuple(f"Cells_{i}" for i in range(values.shape[1])))
    frame = pd.concat([profiles.meta, pd.DataFrame(values, columns=profiles.names)], axis=1)
    operations = ["variance_threshold", "frequency_threshold", "correlation_threshold"]
    theirs = [c for c in feature_select(frame, features=list(profiles.names), operation=operations) if c.startswith("Cells_")]
    ours = select_features(profiles)
    assert list(ours.names) == theirs and 5 < len(theirs) < 12
    assert np.array_equal(ours.values, frame[theirs].to_numpy())


def test_combat_is_its_definition(wells):
    """Johnson 2007, sections 3.1 and 3.2, a feature and a batch at a time."""
    got = normalise(wells, ["combat"], control="DMSO", regularisation=0.0).values
    batches = wells.meta["Metadata_Batch"].to_numpy()
    names = sorted(set(batches))
    means = {b: wells.values[batches == b].mean(axis=0) for b in names}
    grand = sum((batches == b).mean() * means[b] for b in names)
    sd = np.sqrt(np.mean([(row - means[b]) ** 2 for row, b in zip(wells.values, batches, strict=True)], axis=0))
    standard = (wells.values - grand) / sd
    for b in names:
        z = standard[batches == b]
        n, mean, variance = len(z), z.mean(axis=0), z.var(axis=0, ddof=1)
        prior, tau = mean.mean(), mean.var(ddof=1)
        shape = (2 * variance.var(ddof=1) + variance.mean() ** 2) / variance.var(ddof=1)
        rate = (variance.mean() * variance.var(ddof=1) + variance.mean() ** 3) / variance.var(ddof=1)
        for feature in range(len(mean)):
            shift, spread = mean[feature], variance[feature]
            for _ in range(200):
                shift = (n * tau * mean[feature] + spread * prior) / (n * tau + spread)
                spread = (rate + 0.5 * sum((z[:, feature] - shift) ** 2)) / (n / 2 + shape - 1)
            expected = sd[feature] * (z[:, feature] - shift) / np.sqrt(spread) + grand[feature]
            np.testing.assert_allclose(got[batches == b, feature], expected, atol=1e-3)


def test_combat_takes_batches_away(wells):
    def between(values: np.ndarray) -> float:
        means = pd.DataFrame(values).groupby(wells.meta["Metadata_Batch"].to_numpy()).mean()
        return float(means.var().sum() / values.var(axis=0).sum())

    assert between(wells.values) > 0.3 > 30 * between(normalise(wells, ["combat"], control="DMSO", regularisation=0.0).values)


def test_tvn_whitens_controls_and_aligns_batches(wells):
    """With one batch CORAL does nothing; with several, the controls' covariances come closer to each other."""

    def apart(values: np.ndarray) -> float:
        covariances = [
            np.cov(values[control(wells) & (wells.meta["Metadata_Batch"] == b).to_numpy()].T) for b in ("Week0", "Week1", "Week2")
        ]
        return sum(np.linalg.norm(a - b) for a in covariances for b in covariances)

    one = changed(Profiles(wells.meta.assign(Metadata_Batch="one"), wells.values, wells.names), wells.values)
    np.testing.assert_allclose(
        np.cov(normalise(one, ["tvn"], control="DMSO", regularisation=0.0).values[control(wells)].T), np.eye(12), atol=1e-9
    )
    stretched = changed(wells, wells.values * np.where((wells.meta["Metadata_Batch"] == "Week1").to_numpy(), 3.0, 1.0)[:, None])
    scale = stretched.values[control(wells)].std(axis=0)
    white = sphere(changed(stretched, stretched.values / scale), control(wells), method="pca", regularisation=0.01)
    assert apart(normalise(stretched, ["tvn"], control="DMSO", regularisation=0.01).values) < 0.8 * apart(white.values)


def test_tvn_and_regularised_sphering_are_their_definitions(wells):
    """Powers of matrices by scipy's general routine, not by eigenvectors."""
    from scipy.linalg import fractional_matrix_power as power

    def covariance(rows: np.ndarray) -> np.ndarray:
        return np.cov(rows, rowvar=False)

    x, mask = wells.values, control(wells)
    batches = wells.meta["Metadata_Batch"].to_numpy()
    ridge = 0.3 * np.trace(covariance(x[mask])) / 12 * np.eye(12)
    white = (x - x[mask].mean(axis=0)) @ power(covariance(x[mask]) + ridge, -0.5)
    np.testing.assert_allclose(sphere(wells, mask, method="zca", regularisation=0.3).values, white, atol=1e-9)
    z = (x - x[mask].mean(axis=0)) / x[mask].std(axis=0)
    ridge = 0.3 * np.trace(covariance(z[mask])) / 12 * np.eye(12)
    white = z @ power(covariance(z[mask]) + ridge, -0.5)
    expected = np.empty_like(white)
    for batch in set(batches):
        mine = batches == batch
        aligned = power(covariance(white[mask & mine]) + np.eye(12), -0.5) @ power(covariance(white[mask]) + np.eye(12), 0.5)
        expected[mine] = white[mine] @ aligned
    got = normalise(wells, ["tvn"], control="DMSO", regularisation=0.3).values  # whitened by PCA: the same but for a rotation
    np.testing.assert_allclose(got @ got.T, expected @ expected.T, atol=1e-8)


@pytest.mark.parametrize("steps", LADDER, ids="+".join)
def test_rungs_are_pure_and_keep_the_type(wells, steps):
    """The input stays as it is, single precision stays single and gives nearly the same."""
    before = wells.values.copy()
    double = normalise(wells, steps, control="DMSO", regularisation=0.01)
    assert np.array_equal(wells.values, before) and np.isfinite(double.values).all() and len(double.names) == double.values.shape[1]
    single = normalise(changed(wells, wells.values.astype(np.float32)), steps, control="DMSO", regularisation=0.01)
    assert single.values.dtype == np.float32 and len(single) == len(double)
    cosines = [unit_rows(p.values) @ unit_rows(p.values).T for p in (single, double)]
    np.testing.assert_allclose(cosines[0], cosines[1], atol=2e-4)


def test_every_step_is_on_the_ladder():
    assert {step for steps in LADDER for step in steps} == set(NORMALISATIONS)


def test_unusable_features_are_counted(wells):
    values = wells.values.copy()
    values[3, 0], values[:, 1], values[5:7, 2] = np.nan, 1e6, np.nan
    kept, dropped = usable_features(changed(wells, values))
    assert (dropped.missing, dropped.constant) == (2, 1) and kept.names == tuple(f"f{i}" for i in range(3, 12))
    with pytest.raises(DataError, match="Of 1, 0 miss a value somewhere and 1 are constant"):
        usable_features(changed(wells, values[:, 1:2]))


def test_rounding_is_no_variance_and_large_values_are_not_constant(wells):
    """A constant whose mean is not exact stays constant on large plates; 16 levels at a million, in single precision, are a feature."""
    big = Profiles(
        wells.meta.assign(Metadata_Plate="p"), np.stack([np.full(len(wells), 0.1), np.arange(len(wells)) % 2], axis=1), ("a", "b")
    )
    assert standardise(big, None, robust=False).names == ("b",)
    assert usable_features(changed(wells, (1e6 + np.arange(len(wells)) % 16 / 16)[:, None].astype(np.float32)))[0].names == ("f0",)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_feature_that_is_constant_in_a_plates_controls_is_dropped(wells, dtype):
    values = wells.values.astype(dtype)
    values[control(wells) & (wells.meta["Metadata_Plate"] == "Week1_0").to_numpy(), 4] = 0.1
    scaled = normalise(changed(wells, values), ["standardise_control"], control="DMSO", regularisation=0.0)
    assert len(scaled.names) == 11 and "f4" not in scaled.names and np.abs(scaled.values).max() < 1e3
    assert len(normalise(changed(wells, values), ["standardise_all"], control="DMSO", regularisation=0.0).names) == 12


def test_what_cannot_be_normalised_is_told(wells):
    bare = wells.take(~(control(wells) & (wells.meta["Metadata_Plate"] == "Week1_0").to_numpy()))
    with pytest.raises(DataError, match=r"at least two control wells .* 1 of 9 have not \(Week1_0 the first\)"):
        normalise(bare, ["standardise_control"], control="DMSO", regularisation=0.0)
    with pytest.raises(DataError, match="at least two control wells. There are 0"):
        normalise(wells, ["sphere_pca"], control="vehicle", regularisation=0.0)
    unbatched = Profiles(wells.meta.drop(columns="Metadata_Batch"), wells.values, wells.names)
    for step, name in (("tvn", "TVN"), ("combat", "ComBat")):
        with pytest.raises(DataError, match=f"{name} must have a Metadata_Batch"):
            normalise(unbatched, [step], control="DMSO", regularisation=0.0)
    with pytest.raises(ConfigError, match="score.pipeline must be a list of standardise_all"):
        normalise(wells, ["whiten"], control="DMSO", regularisation=0.0)
    with pytest.raises(DataError, match="must leave a feature"):
        normalise(
            changed(wells, np.where(control(wells)[:, None], 1.0, wells.values)), ["robust_control"], control="DMSO", regularisation=0.0
        )
