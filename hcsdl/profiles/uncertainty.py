"""How sure a score is: intervals that resample compounds, paired differences, the spread over runs.

In: one figure per treatment (or field) and the compound it is of. Out: intervals and p-values. Promised: the same for the same seed.

Treatments of one compound stand or fall together, so compounds are drawn, not treatments: the cluster bootstrap (Davison & Hinkley 1997, §3.8).
Neighbours are not looked for anew in a draw: a compound drawn twice would be its own neighbour. Compounds that are alike in their number of treatments
and in their sum need not be told apart, so that a draw is one of the multinomial distribution over such kinds: the same bootstrap, whose cost does not
grow with the compounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
EXACT = 14  # up to so many compounds that differ, all 2^n flips of signs are tried
BLOCK_BYTES = 2**27  # of draws held at a time


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; nan where there is nothing to take it of, or a single compound."""

    value: float
    low: float
    high: float
    compounds: int


@dataclass(frozen=True)
class Difference:
    """The mean paired difference of two methods, its interval, and a two-sided sign-flip p-value."""

    value: float
    low: float
    high: float
    p_value: float
    treatments: int
    compounds: int


def cluster_bootstrap(figures: np.ndarray, compounds: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Return the mean of `figures` and the 2.5 and 97.5 percentiles of it over draws of compounds with replacement.

    Parameters
    ----------
    figures : (N,) float, one per treatment; nan is left out.
    compounds : (N,) what to draw together, any labels.
    draws, seed : number of draws and their seed.
    """
    sums, counts = _clusters(figures, compounds)
    if len(sums) < 2:
        return Interval(float(sums.sum() / counts.sum()) if len(sums) else np.nan, np.nan, np.nan, len(sums))
    kinds, alike = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    means = []
    step = max(1, BLOCK_BYTES // (8 * len(kinds)))
    for start in range(0, draws, step):
        drawn = rng.multinomial(len(sums), alike / len(sums), size=min(step, draws - start))
        totals = drawn @ kinds
        means.append(totals[:, 0] / totals[:, 1])
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high), len(sums))


def paired_difference(first: np.ndarray, second: np.ndarray, compounds: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Return the mean of `first` − `second` over the treatments that both have, with its cluster-bootstrap interval and p-value.

    The p-value is of a sign-flip test: were the methods alike, each compound's summed difference might as well have the other sign. Up to
    2^14 flips are all tried; of more compounds `draws` random flips are, the one observed counted among them.

    Parameters
    ----------
    first, second : (N,) figures of the same treatments; a treatment that is nan in either is left out.
    compounds : (N,) their compounds.
    """
    difference = first - second
    interval = cluster_bootstrap(difference, compounds, draws=draws, seed=seed)
    sums, counts = _clusters(difference, compounds)
    sums = np.abs(sums[np.abs(sums) > 1e-12])  # who does not differ does not change under a flip
    observed = abs(np.nansum(difference))
    if len(sums) <= EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1)
        p_value = float((np.abs(signs @ sums) >= observed - 1e-9).mean())
    else:
        rng = np.random.default_rng(seed)
        totals = np.concatenate(
            [np.abs((1 - 2.0 * rng.integers(0, 2, (min(1000, draws - start), len(sums)))) @ sums) for start in range(0, draws, 1000)]
        )
        p_value = float((1 + (totals >= observed - 1e-9).sum()) / (draws + 1))
    return Difference(interval.value, interval.low, interval.high, p_value, int(counts.sum()), interval.compounds)


def spread(scores: list[float]) -> dict[str, float]:
    """Return mean, sd (n − 1), least and greatest of the scores of three or more runs that differ in their seed."""
    if len(scores) < 3:
        raise ValueError(f"A spread must be of at least three runs. Got {len(scores)}.")
    return {
        "runs": len(scores),
        "mean": float(np.mean(scores)),
        "sd": float(np.std(scores, ddof=1)),
        "min": min(scores),
        "max": max(scores),
    }


def _clusters(figures: np.ndarray, compounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of the figures of each compound that has any."""
    there = ~np.isnan(figures)
    _, codes = np.unique(np.asarray(compounds)[there], return_inverse=True)
    return np.bincount(codes, weights=figures[there]), np.bincount(codes)
