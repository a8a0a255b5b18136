"""Drawn profile tables: wells with a plate's and a batch's own look, and phenotypes shared by mechanism."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hcsdl.profiles.tables import Profiles

FEATURES = 12


def draw_wells(
    *,
    batches: int = 3,
    plates_per_batch: int = 3,
    moas: int = 4,
    compounds_per_moa: int = 3,
    concentrations: Sequence[float] = (0.1, 1.0),
    control_wells: int = 6,
    features: int = FEATURES,
    sites: int = 1,
    effect: float = 3.0,
    batch_effect: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Return a table with a row per field: metadata and `Embedding_*`.

    A compound is on all plates of one batch, the `k`-th of every mechanism in batch `k` modulo `batches`; `effect` and `batch_effect` are in units
    of the noise of a field.
    """
    rng = np.random.default_rng(seed)
    phenotypes, looks = effect * rng.normal(size=(moas, features)), batch_effect * rng.normal(size=(batches, features))
    compounds = [(moa, number, effect * 0.2 * rng.normal(size=features)) for moa in range(moas) for number in range(compounds_per_moa)]
    rows, values = [], []
    for batch in range(batches):
        for plate in range(plates_per_batch):
            look = looks[batch] + 0.3 * batch_effect * rng.normal(size=features)
            treatments: list[tuple[str, float, str, np.ndarray]] = [("DMSO", 0.0, "DMSO", np.zeros(features))] * control_wells
            treatments += [
                (f"compound {moa}{'abcdefgh'[number]}", dose, f"moa {moa}", phenotypes[moa] + own)
                for moa, number, own in compounds
                if number % batches == batch
                for dose in concentrations
            ]
            for well, (compound, dose, moa, mean) in enumerate(treatments):
                for site in range(1, sites + 1):
                    rows.append(
                        (f"Week{batch}_{plate}", f"{'BCDEFG'[well // 10]}{well % 10 + 2:02d}", site, compound, dose, moa, f"Week{batch}")
                    )
                    values.append(mean + look + rng.normal(size=features))
    names = ["Plate", "Well", "Site", "Compound", "Concentration", "MoA", "Batch"]
    meta = pd.DataFrame(rows, columns=[f"Metadata_{name}" for name in names])
    return pd.concat([meta, pd.DataFrame(np.array(values), columns=[f"Embedding_{i:04d}" for i in range(features)])], axis=1)


def as_profiles(table: pd.DataFrame) -> Profiles:
    """Return a table of one row a well as `Profiles`, with a treatment for each."""
    meta = table.filter(like="Metadata_").reset_index(drop=True)
    doses = meta["Metadata_Concentration"].map(" {:g}".format)
    meta["Metadata_Treatment"] = meta["Metadata_Compound"].where(meta["Metadata_Compound"] == "DMSO", meta["Metadata_Compound"] + doses)
    values = table.filter(like="Embedding_")
    return Profiles(meta, values.to_numpy(), tuple(values.columns))


def treatments_only(meta: pd.DataFrame, values: np.ndarray) -> Profiles:
    """Return a well per row of `meta`, which has Compound, MoA and Batch; every row is a treatment of its own."""
    meta = meta.rename(columns="Metadata_{}".format).reset_index(drop=True)
    wells = pd.DataFrame({"Metadata_Plate": meta["Metadata_Batch"], "Metadata_Well": [f"A{i:03d}" for i in range(len(meta))]})
    names = pd.Series([f"treatment {i:03d}" for i in range(len(meta))], name="Metadata_Treatment")
    return Profiles(
        pd.concat([wells, names, meta], axis=1), np.asarray(values, dtype=np.float64), tuple(f"f{i}" for i in range(np.shape(values)[1]))
    )
