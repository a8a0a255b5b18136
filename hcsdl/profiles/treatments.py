"""Profiles of wells → profiles of treatments, and which treatment may be compared with which.

In: normalised wells. Out: `Treatments`, sorted by name. Promised: the order of the wells does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from hcsdl.config import DataError
from hcsdl.profiles.tables import Profiles, group_means, is_scored


@dataclass(frozen=True)
class Treatments:
    """Profiles of the scored treatments, the control's not among them.

    Attributes
    ----------
    profiles : a row per treatment; the metadata are Treatment, Compound, MoA, Concentration where known, and Wells, their number.
    in_batch : (T, B) bool, the batches a treatment occurs in; None where batches are not known.
    """

    profiles: Profiles
    in_batch: np.ndarray | None

    def __len__(self) -> int:
        return len(self.profiles)

    @property
    def names(self) -> np.ndarray:
        """Return the treatments' names (T,)."""
        return self.profiles.meta["Metadata_Treatment"].to_numpy(dtype=str)

    @property
    def compounds(self) -> np.ndarray:
        """Return each treatment's compound as a number (T,), in the order of the names."""
        return np.unique(self.profiles.meta["Metadata_Compound"].to_numpy(dtype=str), return_inverse=True)[1]

    @property
    def moas(self) -> np.ndarray:
        """Return each treatment's mechanism of action as a number (T,), in the order of `moa_names`."""
        return np.unique(self.profiles.meta["Metadata_MoA"].to_numpy(dtype=str), return_inverse=True)[1]

    @property
    def everywhere(self) -> np.ndarray:
        """Return a mask (T,), bool: treatments that occur in every one of several batches, as a positive control does."""
        if self.in_batch is None or self.in_batch.shape[1] < 2:
            return np.zeros(len(self), dtype=bool)
        return self.in_batch.all(axis=1)

    @property
    def moa_names(self) -> np.ndarray:
        """Return the names of the mechanisms of action, sorted."""
        return np.unique(self.profiles.meta["Metadata_MoA"].to_numpy(dtype=str))


def treatment_profiles(wells: Profiles, control: str) -> Treatments:
    """Return the mean over the wells of every treatment that has a mechanism of action and is not the control.

    Raises
    ------
    DataError : there is no such treatment.
    """
    rows = np.flatnonzero(is_scored(wells.meta, control))
    if not len(rows):
        raise DataError(
            "Some treatment besides the control must have a Metadata_MoA. None has: check score.control and the table's labels."
        )
    wells = wells.take(rows[np.argsort(wells.meta["Metadata_Treatment"].to_numpy(dtype=str)[rows], kind="stable")])
    names, first, codes, counts = np.unique(
        wells.meta["Metadata_Treatment"].to_numpy(dtype=str), return_index=True, return_inverse=True, return_counts=True
    )
    means = group_means(wells.values, first)
    columns = [c for c in ("Treatment", "Compound", "Concentration", "MoA") if f"Metadata_{c}" in wells.meta]
    meta = wells.meta.iloc[first][[f"Metadata_{c}" for c in columns]].reset_index(drop=True)
    meta["Metadata_Wells"] = counts
    in_batch = None
    if "Metadata_Batch" in wells.meta:
        batches, which = np.unique(wells.meta["Metadata_Batch"].to_numpy(dtype=str), return_inverse=True)
        in_batch = np.zeros((len(names), len(batches)), dtype=bool)
        in_batch[codes, which] = True
    return Treatments(Profiles(meta, means, wells.names), in_batch)


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Return rows (N, F) of length 1, float64, so that a product of two is their cosine; a row of zeros stays zeros, alike to nothing.

    With a single feature a cosine is only a sign. Then rows are put on a half circle instead, angle proportional to the value, so that the order
    by cosine is the order by distance.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape[1] == 1:
        low, high = values.min(), values.max()
        angles = np.pi * (values[:, 0] - low) / (high - low or 1.0)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(lengths > 0, lengths, 1.0)


def with_treatments(frame: pd.DataFrame, treatments: Treatments) -> pd.DataFrame:
    """Return `frame` (T rows) with the treatments' metadata before it."""
    return pd.concat([treatments.profiles.meta, frame], axis=1)
