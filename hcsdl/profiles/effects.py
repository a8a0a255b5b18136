"""How much plates and batches, rather than compounds, decide which wells are alike.

In: normalised wells. Out: a share above chance. Promised: 0 where the nearest well is of the same plate (batch) as often as chance has it, 1 where it
always is; unchanged by rotation and positive scaling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hcsdl.profiles.tables import Profiles
from hcsdl.profiles.treatments import unit_rows

MOST_WELLS = 5000  # a seeded sample beyond; with 5,000 the standard error of a share is below 0.01
BLOCK = 1024


@dataclass(frozen=True)
class Effect:
    """`score` = (share − chance) / (1 − chance); `share` of the queries whose nearest well is of the same plate or batch; nan without queries."""

    score: float
    share: float
    chance: float
    queries: int


def same_group_effect(wells: Profiles, column: str, control: str, *, apart: str | None = None, seed: int = 0) -> Effect:
    """Return how far a well's nearest well of another compound is of the same plate or batch beyond chance.

    The plate's and batch's own look makes it so; so does biology where a plate or batch has compounds alike in effect, which no step takes away
    without harm. What differs between rungs of the ladder on one table is the former. Controls are left out, because some steps are fitted on them.

    Parameters
    ----------
    wells : normalised.
    column : "Metadata_Plate" or "Metadata_Batch".
    apart : column that a neighbour must differ in as well: "Metadata_Plate" when batches are scored, else a batch effect would be a plate effect.
    """
    chosen = np.flatnonzero((wells.meta["Metadata_Compound"] != control).to_numpy())
    if len(chosen) > MOST_WELLS:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, MOST_WELLS, replace=False))
    wells = wells.take(chosen)
    units = unit_rows(wells.values)
    codes = {
        name: np.unique(wells.meta[name].to_numpy(dtype=str), return_inverse=True)[1]
        for name in {column, apart, "Metadata_Compound"}
        if name
    }
    hits, chances = [], []
    for start in range(0, len(wells), BLOCK):
        rows = slice(start, start + BLOCK)
        allowed = codes["Metadata_Compound"][rows, None] != codes["Metadata_Compound"]
        if apart:
            allowed &= codes[apart][rows, None] != codes[apart]
        same = allowed & (codes[column][rows, None] == codes[column])
        query = same.any(axis=1) & (same != allowed).any(axis=1)
        nearest = np.where(allowed, units[rows] @ units.T, -np.inf).argmax(axis=1)
        hits.append(same[np.arange(len(nearest)), nearest][query])
        chances.append((same.sum(axis=1) / np.maximum(allowed.sum(axis=1), 1))[query])
    hit, chance = np.concatenate(hits) if hits else np.empty(0), np.concatenate(chances) if chances else np.empty(0)
    if not len(hit):
        return Effect(np.nan, np.nan, np.nan, 0)
    share, expected = float(hit.mean()), float(chance.mean())
    return Effect((share - expected) / (1 - expected), share, expected, len(hit))
