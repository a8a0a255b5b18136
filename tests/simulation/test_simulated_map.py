"""BBBC021's own plate map: where everything stands, what `hcsdl score` will count, and that the preset stays what it is."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import ConfigError, SimulateConfig
from hcsdl.profiles.neighbours import nearest_neighbours
from hcsdl.profiles.tables import Profiles
from hcsdl.profiles.treatments import treatment_profiles
from hcsdl.simulation import drift
from hcsdl.simulation.compounds import COMPOUNDS, Treatment
from hcsdl.simulation.fields import draw_field
from hcsdl.simulation.layout import Field, fields_of_view
from hcsdl.simulation.phenotypes import looks
from hcsdl.simulation.plate_map import SHARE_AT_LOWEST
from hcsdl.simulation.presets import PRESETS, resolve

pytestmark = pytest.mark.xeon_only

REAL = Path(__file__).parents[3] / "shared/data/bbbc021"
LIKE = ("bbbc021_like", "bbbc021_reduced", "bbbc021_tiny")
FROZEN = "98bff2a84e121ae9"


def wells(preset: str) -> pd.DataFrame:
    """Return the wells of a preset with the metadata that profiles have."""
    fields = fields_of_view(PRESETS[preset], 0, "DMSO")
    return pd.DataFrame(
        [
            (f.plate_name, f"Week{f.batch}", f.well, f.treatment.compound, f.treatment.concentration, f.treatment.moa)
            for f in fields
            if f.site == 1
        ],
        columns=[f"Metadata_{name}" for name in ("Plate", "Batch", "Well", "Compound", "Concentration", "MoA")],
    )


@pytest.mark.parametrize("preset", ["bbbc021_like", "bbbc021_reduced"])
def test_scores_count_what_they_count_on_bbbc021(preset: str) -> None:
    """Ten batches, 38 compounds, 12 mechanisms and DMSO; of 103 treatments NSC scores all and NSCB 92, as on the real plates."""
    table = wells(preset)
    treated = table[table["Metadata_MoA"] != "DMSO"]
    names = treated["Metadata_Compound"] + " " + treated["Metadata_Concentration"].astype(str)
    assert (table["Metadata_Batch"].nunique(), table["Metadata_Plate"].nunique(), treated["Metadata_Compound"].nunique()) == (10, 49, 38)
    assert table["Metadata_MoA"].nunique() == 13
    profiles = Profiles(
        treated.assign(Metadata_Treatment=names).reset_index(drop=True),
        np.random.default_rng(0).normal(size=(len(treated), 8)),
        tuple("abcdefgh"),
    )
    nearest = nearest_neighbours(treatment_profiles(profiles, "DMSO"))
    assert {rule: int(found.scored.sum()) for rule, found in nearest.items()} == {"NSC": 103, "NSCB": 92}
    replicates = Counter(Counter(names[names != "taxol 0.3"]).values())
    assert replicates == {3: 95, 2: 7} and Counter(
        table.groupby("Metadata_Plate")["Metadata_Compound"].agg(lambda c: (c == "DMSO").sum())
    ) == {6: 49}


@pytest.mark.skipif(not REAL.exists(), reason="BBBC021's CSV files are not beside this checkout")
def test_wells_are_bbbc021s() -> None:
    """Every well holds what the public files say it holds, and no labelled treatment's well is left out, the controls apart."""
    image, moa = pd.read_csv(REAL / "BBBC021_v1_image.csv.gz"), pd.read_csv(REAL / "BBBC021_v1_moa.csv")
    names = {
        f"Image_Metadata_{name}": f"Metadata_{name.removesuffix('_DAPI')}"
        for name in ("Plate_DAPI", "Well_DAPI", "Compound", "Concentration")
    }
    real = image.rename(columns=names)[list(names.values())].drop_duplicates()
    real = real.merge(moa, left_on=["Metadata_Compound", "Metadata_Concentration"], right_on=["compound", "concentration"])
    real = set(real[[*names.values(), "moa"]].itertuples(index=False, name=None))
    ours = set(wells("bbbc021_like")[[*names.values(), "Metadata_MoA"]].itertuples(index=False, name=None))
    assert ours <= real
    assert {well[2:] for well in real - ours} <= {("DMSO", 0.0, "DMSO"), ("taxol", 0.3, "Microtubule stabilizers")}


@pytest.mark.parametrize("preset", LIKE)
def test_more_of_a_compound_changes_more_cells(preset: str) -> None:
    """Every labelled treatment changes at least two thirds of the cells, more at higher concentrations; DMSO none."""
    shares: dict[str, dict[float, float]] = {}
    for field in fields_of_view(PRESETS[preset], 0, "DMSO"):
        shares.setdefault(field.treatment.compound, {})[field.treatment.concentration] = field.share
    assert shares.pop("DMSO") == {0.0: 0.0}
    for found in shares.values():
        ordered = [found[concentration] for concentration in sorted(found)]
        assert ordered == sorted(set(ordered)) and ordered[0] >= SHARE_AT_LOWEST - 1e-9 and ordered[-1] < 1


def test_tiny_has_mechanisms_that_batches_do_not_tell() -> None:
    """The tiny plates have three mechanisms of two compounds each, two of them in several batches: NSCB has something to score."""
    table = wells("bbbc021_tiny")
    treated = table[table["Metadata_MoA"] != "DMSO"].groupby("Metadata_MoA")
    assert len(table) < 80 and treated["Metadata_Compound"].nunique().tolist() == [2, 2, 2]
    assert (treated["Metadata_Batch"].nunique() > 1).sum() == 2


def test_the_map_decides_replicates_and_batches() -> None:
    """What the plate map fixes cannot be asked for; sizes and sites can."""
    for name in ("replicates", "batches", "plates_per_batch"):
        with pytest.raises(ConfigError, match=rf"simulate\.{name} must be null with simulate\.preset=bbbc021_tiny.*Got 2"):
            resolve(SimulateConfig(preset="bbbc021_tiny", **{name: 2}))
    assert resolve(SimulateConfig(preset="bbbc021_like", sites=1, height_px=512)) == replace(
        PRESETS["bbbc021_like"], sites=1, height_px=512
    )


def test_batches_drift_and_treatments_have_no_part_in_it() -> None:
    """With drift a batch's fields differ from those without, another batch's are drawn otherwise, and at effect 0 the treatment alters no pixel."""
    dmso, taxol = Treatment("DMSO", 0.0, "DMSO"), Treatment("taxol", 3.0, "Microtubule stabilizers")
    field = Field(batch=1, plate=0, plate_name="Week1_22123", well="D03", site=1, replicate=1, treatment=dmso, file_names=(), share=0.0)
    still, drifted, later = (draw_field(0, f, 0.0, 128, 160, e) for f, e in ((field, 0.0), (field, 1.0), (replace(field, batch=2), 1.0)))
    assert (still != drifted).mean() > 0.9 and (drifted != later).mean() > 0.9
    np.testing.assert_array_equal(draw_field(0, replace(field, treatment=taxol, share=0.9), 0.0, 128, 160, 1.0), drifted)


def test_plates_of_a_batch_drift_together() -> None:
    """The spread of cell sizes between batches is larger than between wells of one batch, and strength 0 is no drift at all."""
    sizes = np.log([[drift.drift(0, batch, 10 * batch + well, "C05", 1.0).body_size for well in range(8)] for batch in range(1, 41)])
    assert sizes.mean(axis=1).std() > 1.3 * sizes.std(axis=1).mean()
    none = drift.drift(0, 1, 0, "C05", 0.0)
    assert none.of(look := looks("Eg5 inhibitors", "AZ-C")[0][1]) == look
    assert none.share(0.7) == pytest.approx(0.7) and none.blur_px == 0 and (none.gain == 1).all()


def test_presets_are_frozen() -> None:
    """All that decides what these presets draw is as it was when the figures in the README were made: change none of it, add another preset."""
    decided = {name: asdict(PRESETS[name]) for name in LIKE} | {
        "map": [(f.plate_name, f.well, f.treatment.compound, f.treatment.concentration, f.share) for f in fields_of_view(PRESETS["bbbc021_like"], 0, "DMSO")],
        "looks": {compound: [asdict(look) | {"share": share} for share, look in looks(moa, compound)] for moa, found in COMPOUNDS.items() for compound in found},
        "drift": [drift.OF_BATCH, drift.OF_WELL, drift.LARGEST_BLUR_PX],
    }  # fmt: skip
    assert hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16] == FROZEN


def test_pixels_of_the_presets_are_frozen() -> None:
    """A treated field's means and spreads, which a change in the drawing moves; within a thousandth, for other processors' rounding."""
    field = next(f for f in fields_of_view(PRESETS["bbbc021_tiny"], 0, "DMSO") if f.treatment.compound == "AZ138")
    image = draw_field(0, field, 1.0, 128, 160, 1.0).astype(np.float64)
    np.testing.assert_allclose(image.mean(axis=(1, 2)), (537.98, 663.05, 881.57), rtol=1e-3)
    np.testing.assert_allclose(image.std(axis=(1, 2)), (958.24, 823.17, 1258.33), rtol=1e-3)
