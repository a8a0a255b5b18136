"""Which features to keep, as pycytominer's `feature_select` decides: enough variance, enough different values, no twin.

In: profiles. Out: profiles with fewer features. Promised: the same features as pycytominer 1.7 keeps with its own thresholds (tested).
"""

from __future__ import annotations

import numpy as np

from hcsdl.config import DataError
from hcsdl.profiles.tables import Profiles

LEAST_VARIANCE = 1e-6
LEAST_FREQUENCY_RATIO = 0.05
LEAST_UNIQUE_SHARE = 0.01
MOST_CORRELATION = 0.9
"""pycytominer's defaults."""
BLOCK = 16  # features sorted at a time; reading a table of rows a feature at a time is slow


def select_features(profiles: Profiles) -> Profiles:
    """Drop, in this order, features of little variance, of few different values, and those highly correlated with another.

    The operations `variance_threshold`, `frequency_threshold` and `correlation_threshold` of pycytominer's `feature_select`, over all wells.
    Its blocklist is of CellProfiler's own names and left to the user (`score.features`).

    Raises
    ------
    DataError : fewer than two wells.
    """
    if len(profiles) < 2:
        raise DataError(f"Feature selection must have at least two wells. There are {len(profiles)}.")
    profiles = profiles.keep(profiles.values.var(axis=0, dtype=np.float64) > LEAST_VARIANCE)
    profiles = profiles.keep(~_monotonous(profiles.values))
    return profiles.keep(~_twins(profiles.values)) if len(profiles.names) > 1 else profiles


def _monotonous(values: np.ndarray) -> np.ndarray:
    """Return a mask (F,): the second most common value is rare beside the most common one, or there are few different values."""
    found = np.zeros(values.shape[1], dtype=bool)
    for start in range(0, values.shape[1], BLOCK):
        for feature, ordered in enumerate(np.sort(values[:, start : start + BLOCK].T, axis=1), start):
            counts = np.diff(np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])))
            most = counts.argmax()
            ratio = np.delete(counts, most).max(initial=0) / counts[most]
            found[feature] = ratio < LEAST_FREQUENCY_RATIO or len(counts) / len(ordered) < LEAST_UNIQUE_SHARE
    return found


def _twins(values: np.ndarray) -> np.ndarray:
    """Return a mask (F,): of every pair with a correlation above the limit, the one that correlates more with all features together."""
    centred = values - values.mean(axis=0, dtype=np.float64).astype(values.dtype)
    covariance = (centred.T @ centred).astype(np.float64)
    scale = np.sqrt(np.diag(covariance))
    correlation = covariance / scale[:, None] / scale
    total = np.abs(correlation).sum(axis=0)
    place = np.empty(len(total), dtype=int)
    place[np.argsort(total, kind="stable")] = np.arange(len(total))
    above = np.tril(correlation > MOST_CORRELATION, k=-1)
    first, second = np.nonzero(above)
    found = np.zeros(len(total), dtype=bool)
    found[np.where(place[first] > place[second], first, second)] = True
    return found
