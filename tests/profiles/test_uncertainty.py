"""Intervals and p-values: what can be worked out by hand, and that compounds are what is drawn."""

import itertools

import numpy as np
import pytest

from hcsdl.profiles.uncertainty import cluster_bootstrap, paired_difference, spread

pytestmark = pytest.mark.xeon_only


def test_interval_is_the_binomials_where_every_compound_has_one_treatment():
    hits = np.repeat([1.0, 0.0], [70, 30])
    found = cluster_bootstrap(hits, np.arange(100))
    half = 1.96 * np.sqrt(0.7 * 0.3 / 100)
    assert found.value == 0.7 and found.compounds == 100
    assert (found.low, found.high) == (pytest.approx(0.7 - half, abs=0.015), pytest.approx(0.7 + half, abs=0.015))


def test_treatments_of_a_compound_are_drawn_together():
    """Ten treatments alike of each of ten compounds tell as much as ten, not as a hundred."""
    hits = np.repeat(np.repeat([1.0, 0.0], [7, 3]), 10)
    together, apart = cluster_bootstrap(hits, np.repeat(np.arange(10), 10)), cluster_bootstrap(hits, np.arange(100))
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(np.sqrt(10), rel=0.15)


def test_interval_is_that_of_all_draws():
    """Three compounds of unequal size: all 27 draws can be listed."""
    figures, compounds = np.array([1, 0, 0, 0, 0, 1.0, np.nan]), np.array(list("aaabbca"))
    sums, counts = {"a": 1, "b": 0, "c": 1}, {"a": 3, "b": 2, "c": 1}
    means = [sum(sums[c] for c in draw) / sum(counts[c] for c in draw) for draw in itertools.product("abc", repeat=3)]
    found = cluster_bootstrap(figures, compounds, draws=20_000)
    assert found.value == pytest.approx(2 / 6)
    assert [found.low, found.high] == pytest.approx(np.percentile(means, [2.5, 97.5], method="inverted_cdf"))


def test_same_seed_same_interval_and_blocks_do_not_matter(monkeypatch):
    hits, compounds = np.random.default_rng(0).random(200), np.arange(200) // 4
    found = cluster_bootstrap(hits, compounds, seed=3)
    assert cluster_bootstrap(hits, compounds, seed=3) == found != cluster_bootstrap(hits, compounds, seed=4)
    monkeypatch.setattr("hcsdl.profiles.uncertainty.BLOCK_BYTES", 10_000)
    assert cluster_bootstrap(hits, compounds, seed=3) == found


def test_one_compound_has_no_interval():
    found = cluster_bootstrap(np.array([1.0, 0.0]), np.array(["a", "a"]))
    assert found.value == 0.5 and np.isnan(found.low) and np.isnan(found.high)
    assert np.isnan(cluster_bootstrap(np.array([np.nan]), np.array(["a"])).value)


def test_sign_flip_by_hand():
    """Four compounds that all favour the first: 2 of 16 flips are as extreme. One that speaks against: all signs but two less extreme ones listed."""
    first, second, compounds = np.array([1.0, 1, 1, 1, 0]), np.array([0.0, 0, 0, 0, 0]), np.arange(5)
    found = paired_difference(first, second, compounds)
    assert (found.value, found.p_value, found.treatments, found.compounds) == (0.8, 2 / 16, 5, 5)
    mixed = paired_difference(np.array([1.0, 1, 1, 0, 0]), np.array([0.0, 0, 0, 1, 0]), compounds)
    assert mixed.value == pytest.approx(0.4) and mixed.p_value == 10 / 16
    worse = paired_difference(second, first, compounds)
    assert (worse.value, worse.p_value) == (-0.8, 2 / 16)


def test_flips_are_of_compounds():
    """Forty treatments of four compounds are four signs to flip."""
    found = paired_difference(np.ones(40), np.zeros(40), np.arange(40) // 10)
    assert found.p_value == 2 / 16


def test_alike_methods_do_not_differ():
    hits = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    same = paired_difference(hits, hits, np.arange(60))
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_random_flips_agree_with_all_flips(monkeypatch):
    rng = np.random.default_rng(1)
    first, second = rng.random(12) + 0.1, rng.random(12)
    exact = paired_difference(first, second, np.arange(12)).p_value
    monkeypatch.setattr("hcsdl.profiles.uncertainty.EXACT", 3)
    assert paired_difference(first, second, np.arange(12)).p_value == pytest.approx(exact, abs=0.015) and 0.01 < exact < 0.5


def test_only_treatments_that_both_have_count():
    found = paired_difference(np.array([1.0, np.nan, 1.0]), np.array([0.0, 0.0, np.nan]), np.arange(3))
    assert (found.value, found.treatments) == (1.0, 1)


def test_spread():
    assert spread([0.5, 0.7, 0.6]) == {"runs": 3, "mean": pytest.approx(0.6), "sd": pytest.approx(0.1), "min": 0.5, "max": 0.7}
    with pytest.raises(ValueError, match="at least three runs"):
        spread([0.5, 0.6])
