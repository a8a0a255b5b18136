"""Which treatment stands where: replicates, randomness, names, presets, and requests that cannot be laid out."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import ConfigError, SimulateConfig
from hcsdl.simulation.compounds import COMPOUNDS, active_fraction, treatments
from hcsdl.simulation.layout import fields_of_view
from hcsdl.simulation.phenotypes import PHENOTYPES
from hcsdl.simulation.presets import PRESETS, resolve

REAL = Path(__file__).parents[3] / "shared/data/bbbc021"


def test_demo_preset_has_the_counts_it_promises() -> None:
    """Demo: 2 × 3 plates, 84 wells of 14 a plate, 168 fields; each treatment once a plate, two wells of each MoA and of DMSO."""
    fields = fields_of_view(PRESETS["demo"], 0, "DMSO")
    assert len(fields) == 168
    wells = {(f.plate, f.well): f.treatment.moa for f in fields}
    assert len(wells) == 84
    for plate in range(6):
        moas = [moa for (p, _), moa in wells.items() if p == plate]
        assert len(moas) == 14 and all(moas.count(moa) == 2 for moa in set(moas)) and len(set(moas)) == 7


def test_config_wins_over_preset() -> None:
    """A number set in the config takes the place of the preset's; the others stay."""
    assert resolve(SimulateConfig(preset="tiny", sites=4)) == replace(PRESETS["tiny"], sites=4)
    assert resolve(SimulateConfig(preset="demo")) == PRESETS["demo"]


@pytest.mark.parametrize("replicates", [2, 3, 6])
def test_replicates_stand_on_different_plates(replicates: int) -> None:
    """Each treatment has its number of replicates, numbered from 1, each on another plate; taxol, a control, is on every plate."""
    preset = replace(PRESETS["demo"], replicates=replicates, moas=12, sites=1)
    plates, numbers = defaultdict(list), defaultdict(list)
    for field in fields_of_view(preset, 3, "DMSO"):
        plates[field.treatment].append(field.plate)
        numbers[field.treatment].append(field.replicate)
    for treatment, found in plates.items():
        if treatment.compound == "DMSO":
            assert sorted(found) == sorted(2 * list(range(6)))
        else:
            assert len(set(found)) == len(found) == (6 if treatment.compound == "taxol" else replicates)
        assert numbers[treatment] == list(range(1, len(found) + 1))


def test_no_moa_is_tied_to_a_place() -> None:
    """Over many seeds every MoA, DMSO too, stands in every row and column about equally often, and never in one well alone."""
    preset = replace(PRESETS["demo"], sites=1)
    rows, columns = defaultdict(lambda: np.zeros(6)), defaultdict(lambda: np.zeros(10))
    for seed in range(60):
        for field in fields_of_view(preset, seed, "DMSO"):
            rows[field.treatment.moa]["BCDEFG".index(field.well[0])] += 1
            columns[field.treatment.moa][int(field.well[1:]) - 2] += 1
    for moa in rows:  # 720 wells of each MoA: 120 ± 10 a row, 72 ± 8 a column
        assert rows[moa].min() > 70 and rows[moa].max() < 170, moa
        assert columns[moa].min() > 35 and columns[moa].max() < 110, moa


def test_names_do_not_depend_on_the_treatment() -> None:
    """File names are a function of seed, plate, well, site and channel: other treatments in the same wells have the same names."""
    few, many = PRESETS["demo"], replace(PRESETS["demo"], moas=12)
    names = {(f.plate, f.well, f.site): f.file_names for f in fields_of_view(many, 5, "DMSO")}
    shared = [f for f in fields_of_view(few, 5, "DMSO") if (f.plate, f.well, f.site) in names]
    assert len(shared) > 20
    assert all(names[f.plate, f.well, f.site] == f.file_names for f in shared)
    assert len({name for both in names.values() for name in both}) == 3 * len(names)


def test_fields_come_in_the_order_of_places() -> None:
    """Rows are ordered by plate, well and site, whatever the treatments are."""
    places = [(f.plate, f.well, f.site) for f in fields_of_view(PRESETS["demo"], 1, "DMSO")]
    assert places == sorted(places)


def test_more_replicates_than_plates_is_explained() -> None:
    """Seven replicates on six plates cannot be: the error names the setting and the way out."""
    with pytest.raises(ConfigError, match=r"simulate\.replicates must be at most .* 6.*Got 7"):
        fields_of_view(replace(PRESETS["demo"], replicates=7), 0, "DMSO")


def test_more_wells_than_a_plate_has_is_explained() -> None:
    """More treated wells than the 60 inner ones hold is an error that says how many there is room for."""
    with pytest.raises(ConfigError, match="room for 58"):
        fields_of_view(replace(PRESETS["demo"], moas=12, compounds_per_moa=4, concentrations=2), 0, "DMSO")


def test_concentrations_go_on_downwards() -> None:
    """Asked for more concentrations than BBBC021 labels, a compound gets distinct lower ones, and lower ones act on fewer cells."""
    ladder = [t.concentration for t in treatments(12, 4, 5) if t.compound == "simvastatin"]
    assert ladder == [20, 6, 2, 0.7, 0.2]
    fractions = [active_fraction("simvastatin", "Cholesterol-lowering", value) for value in ladder]
    assert fractions == sorted(fractions, reverse=True) and fractions[0] > 0.9 and fractions[-1] < 0.2


def test_every_moa_has_a_phenotype() -> None:
    """The twelve MoAs with compounds are the twelve with a phenotype."""
    assert set(COMPOUNDS) == set(PHENOTYPES) and len(COMPOUNDS) == 12


@pytest.mark.skipif(not REAL.exists(), reason="BBBC021's CSV files are not beside this checkout")
def test_compounds_are_bbbc021s() -> None:
    """Every compound, its MoA and all its active concentrations are those of the public file."""
    real = pd.read_csv(REAL / "BBBC021_v1_moa.csv")
    real = real[real["compound"] != "DMSO"]
    ours = {(name, float(value), moa) for moa, found in COMPOUNDS.items() for name, values in found.items() for value in values}
    assert ours == set(real.itertuples(index=False, name=None))
