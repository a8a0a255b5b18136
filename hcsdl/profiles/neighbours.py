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
BLOCK = (
    256  # treatments whose similarities to all others are held at a time: small enough to stay in the cache of 32 MiB at 28,000 treatments
)
PAIRS = 2**14  # pairs whose cosines are taken anew in double precision at a time; a guess


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
    mechanism occurs among the neighbours it may have; the others stay as neighbours. On BBBC021 103 and 92 are scored.

    A treatment that occurs in every batch, as a positive control does (taxol 0.3 of BBBC021), would share one with all others and have no neighbour.
    Its profile is no single batch's, so it may be compared with all that do not occur in every batch, and is itself nobody's neighbour. Without this
    BBBC021 would have 91, not the published 92: published programs count 92 by giving that treatment one batch label of its own (Cross-Zamirski 2022
    the median of its batches' numbers), which lets it be the neighbour of treatments whose batch it was in; here it may not.

    A treatment of zeros is alike to nothing: its cosine with every other is 0.
    """
    moas = treatments.moas
    units = unit_rows(treatments.profiles.values)
    rough = units.astype(np.float32)
    size = len(treatments)
    rules = ["NSC"] if treatments.in_batch is None else ["NSC", "NSCB"]
    found = {rule: (np.full(size, -1), np.full(size, np.nan), np.zeros(size, dtype=bool)) for rule in rules}
    same_compound, same_moa = _members(treatments.compounds), _members(moas)
    for start in range(0, size, BLOCK):
        rows = np.arange(start, min(start + BLOCK, size))
        similarity = rough[rows] @ rough.T
        for place, row in enumerate(rows):
            similarity[place, same_compound[row]] = -np.inf
        for rule in rules:
            if rule == "NSCB":
                _exclude_shared_batches(similarity, treatments, rows)
            neighbour, cosine, scored = found[rule]
            scored[rows] = [(similarity[place, same_moa[row]] > -np.inf).any() for place, row in enumerate(rows)]
            asked = rows[scored[rows]]
            neighbour[asked], cosine[asked] = _nearest(similarity, units, rows, scored[rows])
    return {
        rule: NearestNeighbours(neighbour, cosine, scored, np.where(scored, (moas[neighbour] == moas).astype(float), np.nan))
        for rule, (neighbour, cosine, scored) in found.items()
    }


def _nearest(similarity: np.ndarray, units: np.ndarray, rows: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest allowed treatment of each of `rows` (R,) that is `asked` for (a mask), the first by name of those that tie, and its cosine.

    The cosines (R, T) given are in single precision, −inf where not allowed, and only choose who may be nearest: their error is below half the margin
    (each product of F terms of unit rows is off by at most F roundings; Higham 2002, §3.1). Who is, is decided in double precision.
    """
    margin = (units.shape[1] + 4) * np.finfo(np.float32).eps
    least = np.where(asked, similarity.max(axis=1) - margin, np.inf).astype(np.float32)
    place, other = np.divmod(np.flatnonzero(similarity >= least[:, None]), len(units))  # many times as fast as nonzero of two dimensions
    cosine = np.empty(len(place))
    for start in range(0, len(place), PAIRS):
        pairs = slice(start, start + PAIRS)
        cosine[pairs] = np.einsum("pf,pf->p", units[rows[place[pairs]]], units[other[pairs]])
    rank = np.cumsum(asked)[place] - 1  # of a pair's row among those asked for
    best = np.maximum.reduceat(cosine, np.searchsorted(rank, np.arange(asked.sum()))) if len(place) else np.empty(0)
    tied = np.flatnonzero(cosine >= best[rank] - TIE)
    return other[tied[np.searchsorted(rank[tied], np.arange(len(best)))]], best


def _members(codes: np.ndarray) -> list[np.ndarray]:
    """Return, for each of the N group numbers in `codes`, the places of its whole group."""
    groups = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    return [groups[code] for code in codes]


def _exclude_shared_batches(similarity: np.ndarray, treatments: Treatments, rows: np.ndarray) -> None:
    """Set to −inf, in place, what treatments `rows` have with those they share a batch with; one in every batch shares with those alike alone."""
    everywhere = treatments.everywhere
    patterns, which = np.unique(treatments.in_batch[rows], axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        mine = which == number
        shares = everywhere if everywhere[rows[mine][0]] else treatments.in_batch[:, pattern].any(axis=1)
        similarity[np.ix_(mine, shares)] = -np.inf


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
