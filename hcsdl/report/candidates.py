"""Compounds without a known mechanism: what each looks like.

In: normalised wells. Out: a table. Promised: only treatments of other compounds that have a mechanism are compared with.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hcsdl.profiles.tables import Profiles, is_scored
from hcsdl.profiles.treatments import unit_rows


def candidates(wells: Profiles, replicates: pd.DataFrame, control: str) -> pd.DataFrame:
    """Return the compounds of unknown mechanism, each by its treatment nearest to one of known mechanism, the most alike first.

    Parameters
    ----------
    wells : normalised.
    replicates : Metadata_Treatment, corrected_p_value: treatments whose wells do not stand out from the controls are left out; empty: none is.

    Returns
    -------
    DataFrame : compound, treatment, wells, looks_like (mechanism), nearest (treatment), cosine. Empty where there is no such compound.
    """
    columns = ["compound", "treatment", "wells", "looks_like", "nearest", "cosine"]
    labelled = is_scored(wells.meta, control)
    unknown = ~labelled & (wells.meta["Metadata_Compound"] != control).to_numpy()
    if not labelled.any() or not unknown.any():
        return pd.DataFrame(columns=columns)
    known, others = _means(wells.take(labelled)), _means(wells.take(unknown))
    if not replicates.empty:
        found = replicates.loc[replicates["corrected_p_value"] < 0.05, "Metadata_Treatment"]
        others = others.take(others.meta["Metadata_Treatment"].isin(found).to_numpy())
    if not len(others):
        return pd.DataFrame(columns=columns)
    units = unit_rows(np.concatenate([known.values, others.values]))
    similarity = units[len(known) :] @ units[: len(known)].T
    nearest = similarity.argmax(axis=1)
    table = pd.DataFrame(
        {
            "compound": others.meta["Metadata_Compound"],
            "treatment": others.meta["Metadata_Treatment"],
            "wells": others.meta["Wells"],
            "looks_like": known.meta["Metadata_MoA"].to_numpy()[nearest],
            "nearest": known.meta["Metadata_Treatment"].to_numpy()[nearest],
            "cosine": similarity.max(axis=1),
        }
    )
    return table.sort_values(["cosine", "treatment"], ascending=[False, True], kind="stable").drop_duplicates("compound", ignore_index=True)


def _means(wells: Profiles) -> Profiles:
    """Return the mean over the wells of each treatment, with their number as `Wells`."""
    names, first, codes, counts = np.unique(
        wells.meta["Metadata_Treatment"].to_numpy(dtype=str), return_index=True, return_inverse=True, return_counts=True
    )
    sums = np.zeros((len(names), len(wells.names)))
    np.add.at(sums, codes, wells.values)
    meta = wells.meta.iloc[first].assign(Wells=counts).reset_index(drop=True)
    return Profiles(meta, sums / counts[:, None], wells.names)
