"""Mean average precision with p-values: do replicates, and treatments of one mechanism, come before the others?

In: normalised wells or treatments. Out: a table, a row per treatment or mechanism. Promised: copairs' figures (Kalinin 2025, Nature
Communications 16:5181), tested against it, without holding all pairs; the same for the same seed.

Of a query, the profiles it might be paired with are ranked by cosine; its average precision is the mean, over the true partners, of the share of true ones
among those ranked up to there. A tie counts against the query, where copairs counts it for it: profiles that are all equal have found nothing.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from hcsdl.profiles.tables import Profiles
from hcsdl.profiles.treatments import Treatments, unit_rows

NULL_SIZE = 10_000
BLOCK = 512  # queries whose similarities to all treatments are held at a time
BLOCK_ELEMENTS = 2**22  # of null draws held at a time
LEAST_TO_COUNT = 0.05  # corrected p-value up to which a group counts as found, as in copairs' own examples


def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the average precision of ranking `positive` (M,) similarities among `negative` (N,) ones; ties put the negative first."""
    return _of_sorted(np.sort(positive)[::-1], np.sort(negative))


def _of_sorted(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the average precision of `positive` similarities, falling, among `negative` ones, rising."""
    ahead = len(negative) - np.searchsorted(negative, positive, side="left")
    number = np.arange(1, len(positive) + 1)
    return float((number / (number + ahead)).mean())


def null_distribution(positives: int, total: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return `size` average precisions of random rankings of `positives` among `total`.

    Positives and negatives are taken as uniform numbers: the spacings between the positives are exponentials over their sum, and the negatives fall
    into them as a multinomial has it. That is exact, and its cost does not grow with the negatives.
    """
    found = []
    number = np.arange(1, positives + 1)
    step = max(1, BLOCK_ELEMENTS // (positives + 1))
    for start in range(0, size, step):
        spacings = rng.standard_exponential((min(step, size - start), positives + 1))
        spacings /= spacings.sum(axis=1, keepdims=True)
        ahead = rng.multinomial(total - positives, spacings)[:, :-1].cumsum(axis=1)
        found.append((number / (number + ahead)).mean(axis=1))
    return np.concatenate(found)


def replicate_precision(wells: Profiles, control: str, *, null_size: int = NULL_SIZE, seed: int = 0) -> tuple[pd.DataFrame, int]:
    """Are a treatment's wells more alike than a well and the controls of its plate?

    Every well but the controls is a query; its true partners are the other wells of its treatment, the false ones the control wells of its own
    plate, which makes the plate's own look count against it.

    Returns
    -------
    A row per treatment: Metadata_Treatment, queries, mAP, p_value, corrected_p_value (Benjamini–Hochberg); and how many wells could be no query,
    because their treatment has one well or their plate no control.
    """
    is_control = (wells.meta["Metadata_Compound"] == control).to_numpy()
    treatments, codes = np.unique(wells.meta["Metadata_Treatment"].to_numpy(dtype=str), return_inverse=True)
    units = unit_rows(wells.values)
    against = _to_controls(units, wells.meta["Metadata_Plate"].to_numpy(dtype=str), is_control)
    rows = []
    treated = np.flatnonzero(~is_control)
    for members in np.split(treated[np.argsort(codes[treated], kind="stable")], np.cumsum(np.bincount(codes[treated]))[:-1]):
        if len(members) < 2:
            continue
        for start in range(0, len(members), BLOCK):
            queries = members[start : start + BLOCK]
            similarity = units[queries] @ units[members].T
            similarity[np.arange(len(queries)), np.arange(start, start + len(queries))] = -np.inf  # a well is no partner of itself
            similarity = np.sort(similarity, axis=1)[:, :0:-1]
            for positive, query in zip(similarity, queries, strict=True):
                if len(against[query]):
                    ap = _of_sorted(positive, against[query])
                    rows.append((codes[query], ap, len(members) - 1, len(members) - 1 + len(against[query])))
    table = _grouped(rows, null_size, seed)
    table.insert(0, "Metadata_Treatment", treatments[table.pop("group").to_numpy(dtype=int)])
    return table, len(treated) - len(rows)


def _to_controls(units: np.ndarray, plates: np.ndarray, is_control: np.ndarray) -> list[np.ndarray]:
    """Return each well's cosines with the control wells of its plate, rising: (N,) arrays of as many as the plate has."""
    found: list[np.ndarray] = [np.empty(0)] * len(units)
    _, codes = np.unique(plates, return_inverse=True)
    for wells in np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1]):
        similarity = np.sort(units[wells] @ units[wells[is_control[wells]]].T, axis=1)
        for well, row in zip(wells, similarity, strict=True):
            found[well] = row
    return found


def moa_precision(treatments: Treatments, *, null_size: int = NULL_SIZE, seed: int = 0) -> tuple[pd.DataFrame, int]:
    """Are treatments of one mechanism, of different compounds, more alike than treatments of different mechanisms?

    Every treatment is a query; its true partners are the treatments of other compounds with its mechanism, the false ones those with another.

    Returns
    -------
    A row per mechanism: Metadata_MoA, queries, mAP, p_value, corrected_p_value; and how many treatments could be no query, because no other compound
    has their mechanism, or all have it.
    """
    compounds, moas = treatments.compounds, treatments.moas
    units = unit_rows(treatments.profiles.values)
    rows = []
    for start in range(0, len(units), BLOCK):
        similarity = units[start : start + BLOCK] @ units.T
        for place, found in enumerate(similarity, start):
            same = moas == moas[place]
            true, false = same & (compounds != compounds[place]), ~same
            if true.any() and false.any():
                ap = average_precision(found[true], found[false])
                rows.append((moas[place], ap, int(true.sum()), int(true.sum() + false.sum())))
    table = _grouped(rows, null_size, seed)
    table.insert(0, "Metadata_MoA", treatments.moa_names[table.pop("group").to_numpy(dtype=int)])
    return table, len(treatments) - len(rows)


def found_share(table: pd.DataFrame) -> float:
    """Return the share of the groups whose corrected p-value is small; nan where there is none."""
    return float((table["corrected_p_value"] < LEAST_TO_COUNT).mean()) if len(table) else float("nan")


def _grouped(rows: list[tuple[int, float, int, int]], null_size: int, seed: int) -> pd.DataFrame:
    """Return the mean of the average precisions of each group, and how often chance does as well.

    As in copairs, queries with as many true and false partners share their random rankings: their average precisions are not independent either, and
    so the p-value is not too small. Chance that does as well counts; copairs counts only what does better, which gives a perfect ranking of three
    wells among six controls, one in 28 by chance, a p-value of 1e-4.
    """
    table = pd.DataFrame(rows, columns=["group", "ap", "positives", "total"])
    sizes, kind = np.unique(table[["positives", "total"]].to_numpy(dtype=int), axis=0, return_inverse=True)
    rngs = np.random.default_rng(seed).spawn(len(sizes))
    nulls = [null_distribution(*size, null_size, rng) for size, rng in zip(sizes.tolist(), rngs, strict=True)]
    groups, codes, queries = np.unique(table["group"].to_numpy(dtype=int), return_inverse=True, return_counts=True)
    means = np.bincount(codes, weights=table["ap"]) / queries
    kinds = np.split(kind[np.lexsort((kind, codes))], np.cumsum(queries)[:-1]) if len(groups) else []
    p_values = np.empty(len(groups))
    by_kinds = sorted(range(len(groups)), key=lambda group: kinds[group].tobytes())
    for _, alike in itertools.groupby(by_kinds, key=lambda group: kinds[group].tobytes()):
        alike = list(alike)
        there, counts = np.unique(kinds[alike[0]], return_counts=True)
        null = sum(count / counts.sum() * nulls[number] for number, count in zip(there, counts, strict=True))
        for group in alike:
            p_values[group] = (1 + (null >= means[group] - 1e-12).sum()) / (1 + null_size)
    found = pd.DataFrame({"group": groups, "queries": queries, "mAP": means, "p_value": p_values})
    found["corrected_p_value"] = _benjamini_hochberg(p_values)
    return found


def _benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """Return p-values corrected for the false discovery rate (Benjamini & Hochberg 1995)."""
    order = np.argsort(p_values)[::-1]
    ranks = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1, np.minimum.accumulate(p_values[order] * len(p_values) / ranks))
    return corrected
