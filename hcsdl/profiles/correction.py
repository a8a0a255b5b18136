"""Two steps against differences between batches of plates: typical variation normalisation and ComBat.

In: profiles of wells with `Metadata_Batch`. Out: profiles. Promised: pure functions; a table they cannot be done on is a `DataError`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hcsdl.config import DataError
from hcsdl.profiles.tables import Profiles

ROUNDS = 500  # of ComBat's fixed point; it settles in tens
SETTLED = 1e-4  # largest relative change at which it stops, as in sva
CORAL_REGULARISATION = 1.0  # of the identity, added to both covariances (Sun 2016, algorithm 1)


def tvn(profiles: Profiles, reference: np.ndarray, sphere: Callable[..., Profiles], *, regularisation: float) -> Profiles:
    """Return profiles after typical variation normalisation (Ando 2017, doi:10.1101/161422).

    Features are standardised and PCA-whitened by all reference wells together, so that directions in which controls vary little count as much as
    others; then each batch's covariance of reference wells, Cᵦ, is aligned with that of all, C, by CORAL (Sun 2016): x (Cᵦ + I)^(−1/2) (C + I)^(1/2).

    Parameters
    ----------
    profiles : wells (N, F) with `Metadata_Batch`.
    reference : mask (N,), bool, of the control wells.
    sphere : `normalise.sphere`.
    regularisation : as there.

    Raises
    ------
    DataError : no `Metadata_Batch`, or a batch with fewer than two control wells.
    """
    batches, codes = _batches(profiles, "TVN")
    counts = np.bincount(codes[reference], minlength=len(batches))
    if (counts < 2).any():
        raise DataError(
            f"TVN must have at least two control wells in every batch. {batches[counts.argmin()]} has {counts.min()}: see score.query."
        )
    controls = profiles.values[reference].astype(np.float64)
    centre, scale = controls.mean(axis=0), controls.std(axis=0)
    profiles = profiles.keep(scale > 0)
    dtype = profiles.values.dtype
    scaled = ((profiles.values - centre[scale > 0].astype(dtype)) / scale[scale > 0].astype(dtype)).astype(dtype)
    white = sphere(replace(profiles, values=scaled), reference, method="pca", regularisation=regularisation)
    target = _power(_covariance(white.values[reference]), 0.5)
    values = np.empty_like(white.values)
    for batch in range(len(batches)):
        matrix = _power(_covariance(white.values[reference & (codes == batch)]), -0.5) @ target
        values[codes == batch] = white.values[codes == batch] @ matrix.astype(dtype)
    return replace(white, values=values)


def combat(profiles: Profiles) -> Profiles:
    """Return profiles after ComBat (Johnson 2007, Biostatistics 8:118): parametric empirical Bayes of each batch's shift and scale, no covariates.

    Every feature is standardised over all wells; a batch's mean γ̂ and variance δ̂² of it are shrunk towards those of all features in the batch
    (normal and inverse gamma priors fitted by moments); what remains is scaled back. Without covariates, biology that differs between batches
    is taken for a batch effect and removed with it.

    Raises
    ------
    DataError : no `Metadata_Batch`, or a batch with fewer than two wells.
    """
    batches, codes = _batches(profiles, "ComBat")
    counts = np.bincount(codes)
    if len(batches) == 1:
        return profiles
    if (counts < 2).any():
        raise DataError(
            f"ComBat must have at least two wells in every batch. {batches[counts.argmin()]} has {counts.min()}: see score.query."
        )
    masks = [codes == batch for batch in range(len(batches))]
    means = np.stack([profiles.values[mask].mean(axis=0, dtype=np.float64) for mask in masks])
    grand = counts @ means / len(codes)
    pooled = sum(
        ((profiles.values[mask] - mean) ** 2).sum(axis=0, dtype=np.float64) for mask, mean in zip(masks, means, strict=True)
    ) / len(codes)
    kept = pooled > 0
    profiles, means, grand, sd = profiles.keep(kept), means[:, kept], grand[kept], np.sqrt(pooled[kept])
    values = np.empty_like(profiles.values)
    for mask, count in zip(masks, counts, strict=True):
        standard = (profiles.values[mask].astype(np.float64) - grand) / sd
        shift, variance = _shrunk(standard, count)
        values[mask] = (standard - shift) / np.sqrt(variance) * sd + grand
    return replace(profiles, values=values)


def _shrunk(standard: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the posterior shift and variance (F,) of a batch's standardised wells (count, F); one feature has nothing to be shrunk towards."""
    mean, variance = standard.mean(axis=0), standard.var(axis=0, ddof=1)
    variance = np.where(variance > 0, variance, 1.0)
    if len(mean) == 1:
        return mean, variance
    prior_mean, prior_variance = mean.mean(), mean.var(ddof=1)
    average, spread = variance.mean(), variance.var(ddof=1)
    if spread <= 0 or prior_variance <= 0:
        return mean, variance
    shape, rate = 2 + average**2 / spread, average + average**3 / spread
    shift, scale = mean, variance
    squares = (standard**2).sum(axis=0)
    for _ in range(ROUNDS):
        new_shift = (count * prior_variance * mean + scale * prior_mean) / (count * prior_variance + scale)
        residual = squares - 2 * count * new_shift * mean + count * new_shift**2
        new_scale = (rate + residual / 2) / (count / 2 + shape - 1)
        change = max(np.max(np.abs(new_shift - shift) / np.maximum(np.abs(shift), 1e-12)), np.max(np.abs(new_scale - scale) / scale))
        shift, scale = new_shift, new_scale
        if change < SETTLED:
            break
    return shift, scale


def _batches(profiles: Profiles, step: str) -> tuple[np.ndarray, np.ndarray]:
    if "Metadata_Batch" not in profiles.meta:
        raise DataError(
            f"{step} must have a Metadata_Batch. The table has none: name a column with score.columns=[Metadata_Batch:Its_Name]."
        )
    return np.unique(profiles.meta["Metadata_Batch"].to_numpy(dtype=str), return_inverse=True)


def _covariance(values: np.ndarray) -> np.ndarray:
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    return centred.T @ centred / (len(values) - 1)


def _power(covariance: np.ndarray, exponent: float) -> np.ndarray:
    """Return a covariance, regularised, to a power."""
    eigenvalues, vectors = np.linalg.eigh(covariance + CORAL_REGULARISATION * np.eye(len(covariance)))
    return vectors * eigenvalues**exponent @ vectors.T
