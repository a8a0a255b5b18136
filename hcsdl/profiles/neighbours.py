"""Does a treatment's nearest other treatment have its mechanism of action? NSC and NSCB.

In: `Treatments`. Out: `NearestNeighbours`. Promised: ties go to the treatment first by name, so that the result is reproducible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from hcsdl.profiles.treatments import Treatments, unit_rows

TIE = 1e-9
"""Cosines closer than this are ties: far above rounding (about 1e-15), far below any difference between real treatments. A guess."""
BLOCK = 1024  # treatments whose similarities to all others are held at a time; a guess


@dataclass(frozen=True)
class NearestNeighbours:
    """What the nearest neighbours say.

    Attributes
    ----------
    neighbour : (T,) int, the nearest allowed treatment; −1 where the treatment is not scored.
    similarity : (T,) cosine with it; nan where not scored.
    scored : (T,) bool: another treatment of the same mechanism may be its neighbour. The others drop out as queries, and stay as neighbours.
    hit : (T,) float, 1 where the neighbour has the same mechanism, 0 where not, nan where not scored.
    """

    neighbour: np.ndarray
    similarity: np.ndarray
    scored: np.ndarray
    hit: np.ndarray

    @property
    def accuracy(self) -> float:
        """Return the share of the scored treatments whose neighbour has their mechanism, 0 … 1; nan where none is scored."""
        return float(self.hit[self.scored].mean()) if self.scored.any() else float("nan")


def nearest_neighbours(treatments: Treatments) -> dict[str, NearestNeighbours]:
    """Return not-same-compound ("NSC") and, where batches are known, not-same-compound-and-batch ("NSCB") neighbours by cosine.

    As Ljosa 2013 (J. Biomol. Screen. 18:1321) and Ando 2017 (doi:10.1101/161422) define them: NSC leaves out as neighbours the treatments of the
    same compound; NSCB also those that share a batch, which two treatments do when their sets of batches meet. A treatment is scored if its
    mechanism occurs among the neighbours it may have; on BBBC021 these are 103 and 92.

    A treatment that occurs in every batch, as a positive control does (taxol 0.3 of BBBC021), would share one with all others and have no neighbour.
    Its profile is no single batch's, so it may be compared with all that do not occur in every batch, and is itself nobody's neighbour. Without this
    BBBC021 would have 91, not the published 92.

    A treatment of zeros is alike to nothing: its cosine with every other is 0.
    """
    moas = treatments.moas
    units = unit_rows(treatments.profiles.values)
    rules = ["NSC"] if treatments.in_batch is None else ["NSC", "NSCB"]
    size = len(treatments)
    found = {rule: (np.full(size, -1), np.full(size, np.nan), np.zeros(size, dtype=bool)) for rule in rules}
    same_compound, same_moa = _members(treatments.compounds), _members(moas)
    for start in range(0, size, BLOCK):
        rows = np.arange(start, min(start + BLOCK, size))
        similarity = units[rows] @ units.T
        for place, row in enumerate(rows):
            similarity[place, same_compound[row]] = -np.inf
        for rule in rules:
            if rule == "NSCB":
                _exclude_shared_batches(similarity, treatments.in_batch, rows)
            neighbour, cosine, scored = found[rule]
            scored[rows] = [similarity[place, same_moa[row]].max() > -np.inf for place, row in enumerate(rows)]
            best = similarity.max(axis=1, keepdims=True)
            neighbour[rows] = np.where(scored[rows], (similarity >= best - TIE).argmax(axis=1), -1)
            cosine[rows] = np.where(scored[rows], best[:, 0], np.nan)
    return {
        rule: NearestNeighbours(neighbour, cosine, scored, np.where(scored, (moas[neighbour] == moas).astype(float), np.nan))
        for rule, (neighbour, cosine, scored) in found.items()
    }


def _members(codes: np.ndarray) -> list[np.ndarray]:
    """Return, for each of the N group numbers in `codes`, the places of its whole group."""
    groups = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    return [groups[code] for code in codes]


def _exclude_shared_batches(similarity: np.ndarray, in_batch: np.ndarray, rows: np.ndarray) -> None:
    """Set to −inf, in place, what treatments `rows` have with those they share a batch with; one in every batch shares with those alike alone."""
    everywhere = in_batch.all(axis=1) & (in_batch.shape[1] > 1)
    patterns, which = np.unique(in_batch[rows], axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        shares = everywhere if pattern.all() and len(pattern) > 1 else in_batch[:, pattern].any(axis=1)
        similarity[np.ix_(which == number, shares)] = -np.inf


def per_moa(treatments: Treatments, nearest: NearestNeighbours) -> pd.DataFrame:
    """Return a row per mechanism: MoA, compounds, treatments scored, hits, recall (nan where none is scored), precision (nan where never given)."""
    moas, names, compounds = treatments.moas, treatments.moa_names, treatments.compounds
    given = np.where(nearest.scored, moas[nearest.neighbour], -1)
    rows = []
    for number, name in enumerate(names):
        mine = (moas == number) & nearest.scored
        hits, taken = int(nearest.hit[mine].sum()), int((given == number).sum())
        rows.append(
            {
                "MoA": name,
                "compounds": len(np.unique(compounds[mine])),
                "treatments": int(mine.sum()),
                "dropped": int(((moas == number) & ~nearest.scored).sum()),
                "hits": hits,
                "recall": hits / mine.sum() if mine.any() else np.nan,
                "precision": hits / taken if taken else np.nan,
            }
        )
    return pd.DataFrame(rows)


def confusion(treatments: Treatments, nearest: NearestNeighbours) -> pd.DataFrame:
    """Return counts (M, M) of the scored treatments: rows are their mechanisms, columns their neighbours'."""
    names, moas = treatments.moa_names, treatments.moas
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (moas[nearest.scored], moas[nearest.neighbour[nearest.scored]]), 1)
    return pd.DataFrame(counts, index=names, columns=names)
