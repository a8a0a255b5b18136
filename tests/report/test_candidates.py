"""Compounds of unknown mechanism: each by its treatment nearest to a known one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hcsdl.profiles.tables import Profiles
from hcsdl.report.candidates import candidates

pytestmark = pytest.mark.xeon_only


@pytest.fixture
def wells() -> Profiles:
    rows = [
        ("DMSO", "DMSO", "DMSO", [0.0, 0.0]),
        ("actin 1", "actin", "A", [1.0, 0.0]),
        ("tubulin 1", "tubulin", "T", [0.0, 1.0]),
        ("new 1", "new", None, [1.0, 1.0]),
        ("new 9", "new", None, [3.0, 0.1]),
        ("new 9", "new", None, [3.0, -0.1]),
        ("odd 1", "odd", None, [0.1, 1.0]),
    ]
    names = ["Metadata_Treatment", "Metadata_Compound", "Metadata_MoA"]
    return Profiles(pd.DataFrame([r[:3] for r in rows], columns=names), np.array([r[3] for r in rows]), ("f0", "f1"))


def test_each_stands_once_by_its_clearest_treatment(wells):
    found = candidates(wells, pd.DataFrame(), "DMSO")
    assert found[["compound", "treatment", "wells", "looks_like", "nearest"]].to_numpy().tolist() == [
        ["new", "new 9", 2, "A", "actin 1"], ["odd", "odd 1", 1, "T", "tubulin 1"],
    ]  # fmt: skip
    assert found["cosine"][0] == pytest.approx(1.0) and found["cosine"][1] == pytest.approx(1 / np.sqrt(1.01))


def test_treatments_without_an_effect_are_left_out(wells):
    replicates = pd.DataFrame({"Metadata_Treatment": ["new 1", "new 9", "odd 1"], "corrected_p_value": [0.01, 0.2, np.nan]})
    assert list(candidates(wells, replicates, "DMSO")["treatment"]) == ["new 1"]


def test_nothing_unknown_gives_nothing(wells):
    known = wells.take(wells.meta["Metadata_MoA"].notna().to_numpy())
    assert candidates(known, pd.DataFrame(), "DMSO").empty
