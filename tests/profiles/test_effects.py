"""Plate and batch effect: against a plain oracle, on planted effects, under what must not matter."""

import numpy as np
import pandas as pd
import pytest

from hcsdl.profiles.effects import same_group_effect
from hcsdl.profiles.tables import Profiles

pytestmark = pytest.mark.xeon_only


def wells(effect: float, column: str = "Metadata_Plate", count: int = 240) -> Profiles:
    """Return wells of 3 batches of 2 plates, compounds spread over all, whose values depend on `column` alone."""
    rng = np.random.default_rng(0)
    plate = rng.integers(0, 6, count)
    meta = pd.DataFrame(
        {
            "Metadata_Plate": [f"p{p}" for p in plate],
            "Metadata_Batch": [f"b{p // 2}" for p in plate],
            "Metadata_Compound": rng.choice(["DMSO", *"abcdefgh"], count),
        }
    )
    _, codes = np.unique(meta[column], return_inverse=True)
    return Profiles(meta, effect * rng.normal(size=(6, 8))[codes] + rng.normal(size=(count, 8)), tuple("abcdefgh"))


@pytest.mark.parametrize(("column", "apart"), [("Metadata_Plate", None), ("Metadata_Batch", "Metadata_Plate")])
def test_oracle(column, apart):
    profiles = wells(0.5, column, count=80)
    meta, values = profiles.meta.to_dict("list"), profiles.values / np.linalg.norm(profiles.values, axis=1, keepdims=True)
    hits, chances = [], []
    for i in range(80):
        if meta["Metadata_Compound"][i] == "DMSO":
            continue
        others = [
            j for j in range(80)
            if meta["Metadata_Compound"][j] not in ("DMSO", meta["Metadata_Compound"][i]) and (not apart or meta[apart][j] != meta[apart][i])
        ]  # fmt: skip
        nearest = max(others, key=lambda j: values[i] @ values[j])
        hits.append(meta[column][nearest] == meta[column][i])
        chances.append(np.mean([meta[column][j] == meta[column][i] for j in others]))
    found = same_group_effect(profiles, column, "DMSO", apart=apart)
    assert (found.share, found.chance, found.queries) == (pytest.approx(np.mean(hits)), pytest.approx(np.mean(chances)), len(hits))
    assert found.score == pytest.approx((np.mean(hits) - np.mean(chances)) / (1 - np.mean(chances)))


def test_planted_effects_are_found_and_nothing_else():
    assert abs(same_group_effect(wells(0), "Metadata_Plate", "DMSO").score) < 0.1
    assert same_group_effect(wells(20), "Metadata_Plate", "DMSO").score > 0.95
    batch = wells(20, "Metadata_Batch")
    assert same_group_effect(batch, "Metadata_Batch", "DMSO", apart="Metadata_Plate").score > 0.95
    plate_alone = same_group_effect(wells(20), "Metadata_Batch", "DMSO", apart="Metadata_Plate").score
    assert plate_alone < 0.5  # plates' own looks say nothing on batches but by chance: six looks are few


def test_rotation_and_scaling_do_not_matter(monkeypatch):
    profiles = wells(1.0)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    expected = same_group_effect(profiles, "Metadata_Plate", "DMSO")
    monkeypatch.setattr("hcsdl.profiles.effects.BLOCK", 7)
    other = same_group_effect(Profiles(profiles.meta, 9 * profiles.values @ rotation, profiles.names), "Metadata_Plate", "DMSO")
    assert (other.share, other.chance) == (pytest.approx(expected.share), pytest.approx(expected.chance))


def test_many_wells_are_sampled(monkeypatch):
    monkeypatch.setattr("hcsdl.profiles.effects.MOST_WELLS", 100)
    found = same_group_effect(wells(20), "Metadata_Plate", "DMSO")
    assert found.queries == 100 and found.score > 0.9


def test_one_plate_has_no_effect_to_measure():
    profiles = wells(1)
    alone = Profiles(profiles.meta.assign(Metadata_Plate="p"), profiles.values, profiles.names)
    assert np.isnan(same_group_effect(alone, "Metadata_Plate", "DMSO").score)
