"""A made-up profile table as `hcsdl embed` writes it, with a known answer: mechanisms show, effects grow with the dose."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hcsdl.profiles.tables import Profiles

CLASSES = ("DMSO", "Actin", "Kinase")
DOSES = (0.1, 1.0, 10.0)


def profile_table(*, sites: int = 2, seed: int = 0) -> pd.DataFrame:
    """Return a row per field of 4 plates in 2 batches: 4 DMSO wells and 5 compounds at 3 doses on each; compound U has no mechanism and acts as Kinase does.

    Probabilities of the own mechanism are 0.1, 0.6 and 0.9 at the three doses, those of DMSO wells 0.9; wells of the first plate of a batch were trained on.
    """
    rng = np.random.default_rng(seed)
    directions = {moa: rng.normal(size=8) for moa in CLASSES}
    moas = {"A1": "Actin", "A2": "Actin", "K1": "Kinase", "K2": "Kinase", "U": None}
    rows = []
    for number in range(4):
        treatments = [("DMSO", 0.0)] * 4 + [(compound, dose) for compound in moas for dose in DOSES]
        places = rng.permutation(60)[: len(treatments)]
        for (compound, dose), place in zip(treatments, places, strict=True):
            moa = "DMSO" if compound == "DMSO" else moas[compound]
            acts_as = moa or "Kinase"
            level = DOSES.index(dose) if dose else None
            own = 0.9 if level is None else (0.1, 0.6, 0.9)[level]
            strength = 0.0 if level is None else (2.0, 6.0, 12.0)[level]
            well = f"{chr(66 + place // 10)}{place % 10 + 2:02d}"
            for site in range(1, sites + 1):
                rest = (1 - own) / 2
                rows.append(
                    {
                        "Metadata_Plate": f"Week{number // 2 + 1}_{number}",
                        "Metadata_Well": well,
                        "Metadata_Site": site,
                        "Metadata_Compound": compound,
                        "Metadata_Concentration": dose,
                        "Metadata_Treatment": "DMSO" if compound == "DMSO" else f"{compound} {dose:g}",
                        "Metadata_MoA": moa,
                        "Metadata_Batch": f"Week{number // 2 + 1}",
                        "Metadata_Split": "train" if number % 2 == 0 else "val",
                        **{f"Embedding_{k:04d}": v for k, v in enumerate(strength * directions[acts_as] + rng.normal(size=8))},
                        **{f"Prob_{name}": own if name == acts_as else rest for name in CLASSES},
                        "Count_Nuclei": float(rng.integers(40, 60)),
                    }
                )
    return pd.DataFrame(rows)


def meta_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return the metadata columns."""
    return table[[name for name in table if name.startswith("Metadata_")]]


def probabilities_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return the probabilities, columns named by class."""
    return table[[name for name in table if name.startswith("Prob_")]].rename(columns=lambda name: name.removeprefix("Prob_"))


def wells_of(table: pd.DataFrame) -> Profiles:
    """Return the mean profile of every well."""
    features = [name for name in table if name.startswith("Embedding_")]
    grouped = table.groupby(["Metadata_Plate", "Metadata_Well"])
    meta = meta_of(table).drop(columns=["Metadata_Site", "Metadata_Split"]).drop_duplicates(["Metadata_Plate", "Metadata_Well"])
    meta = meta.sort_values(["Metadata_Plate", "Metadata_Well"]).reset_index(drop=True)
    return Profiles(meta, grouped[features].mean().to_numpy(), tuple(features))
