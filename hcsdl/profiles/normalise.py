"""The normalisation ladder: profiles of wells → comparable profiles of wells.

Each step is a pure function from `Profiles` to new `Profiles`; statistics are computed in float64, features come back in the type they had.
A step drops the features it cannot scale, so the names tell what is left. A step that the table does not allow is a `DataError`.

pycytominer and copairs do much of this and of `precision`; they are what the tests compare with. They are not imported here: loading them takes
longer than a command may take to start, they bring a dozen packages (databases among them), sphering there refuses fewer control wells than
features, and copairs holds every pair of wells in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hcsdl.config import NORMALISATIONS, ConfigError, DataError
from hcsdl.profiles.correction import combat, tvn
from hcsdl.profiles.selection import select_features
from hcsdl.profiles.tables import Profiles

MAD_TO_SD = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation, 1 / Φ⁻¹(3/4); the digits pycytominer uses."""

LADDER: tuple[tuple[str, ...], ...] = (
    (),
    ("standardise_all",),
    ("standardise_control",),
    ("robust_all",),
    ("robust_control",),
    ("standardise_control", "select"),
    ("standardise_control", "sphere_pca"),
    ("standardise_control", "sphere_zca"),
    ("tvn",),
    ("standardise_control", "combat"),
)
"""What `hcsdl score` always compares. PCA and ZCA sphering differ by a rotation, so every score by cosine is the same for both."""


@dataclass(frozen=True)
class Dropped:
    """How many features could not be used, and why."""

    missing: int
    constant: int


def usable_features(profiles: Profiles) -> tuple[Profiles, Dropped]:
    """Drop features with a missing value or without variance over all wells. Raises DataError where none is left."""
    missing = np.isnan(profiles.values).any(axis=0)
    constant = ~missing & ~_varies(profiles.values, profiles.values.dtype)
    kept = ~(missing | constant)
    if not kept.any():
        raise DataError(
            f"Some feature must vary and be there in every well. Of {len(kept)}, {missing.sum()} miss a value somewhere and {constant.sum()} are "
            "constant: leave wells out with score.query, or choose features with score.features."
        )
    return profiles.keep(kept), Dropped(int(missing.sum()), int(constant.sum()))


def normalise(profiles: Profiles, steps: Sequence[str], *, control: str, regularisation: float) -> Profiles:
    """Apply `steps`, of `hcsdl.config.NORMALISATIONS`, in turn, to profiles without missing values.

    Parameters
    ----------
    profiles : wells, with `Metadata_Plate`, `Metadata_Compound` and, for tvn and combat, `Metadata_Batch`.
    steps : empty leaves the profiles as they are.
    control : compound name of the negative control.
    regularisation : share of the mean eigenvalue added to the controls' covariance before it is inverted (sphering, and TVN's own), 0 or more.

    Raises
    ------
    ConfigError : an unknown step.
    DataError : a step cannot be done, or leaves no feature.
    """
    for step in steps:
        is_control = (profiles.meta["Metadata_Compound"] == control).to_numpy()
        if step.startswith(("standardise_", "robust_")):
            reference = is_control if step.endswith("_control") else None
            profiles = standardise(profiles, reference, robust=step.startswith("robust"))
        elif step.startswith("sphere_"):
            profiles = sphere(profiles, is_control, method=step.removeprefix("sphere_"), regularisation=regularisation)
        elif step == "tvn":
            profiles = tvn(profiles, is_control, sphere, regularisation=regularisation)
        elif step == "combat":
            profiles = combat(profiles)
        elif step == "select":
            profiles = select_features(profiles)
        else:
            raise ConfigError(f"score.pipeline must be a list of {', '.join(NORMALISATIONS)}. Got {step!r} instead.")
        if not profiles.names:
            raise DataError(f"{step} must leave a feature. It leaves none: no feature varies in every plate's reference wells.")
    return profiles


def standardise(profiles: Profiles, reference: np.ndarray | None, *, robust: bool) -> Profiles:
    """Return each plate's features shifted and scaled by its reference wells: (x − mean) / sd, or (x − median) / (1.4826 MAD).

    The sd is the population's (as scikit-learn's `StandardScaler` and pycytominer have it). The robust form is that of Birmingham 2009
    (Nature Methods 6:569) and of pycytominer, which adds 1e-18 to the MAD where we drop the feature.

    Parameters
    ----------
    profiles : wells (N, F).
    reference : mask (N,), bool, of the wells that a plate is scaled by; None: all of them.
    robust : median and MAD instead of mean and sd.

    Returns
    -------
    Profiles, without the features whose scale is zero on some plate.

    Raises
    ------
    DataError : a plate has fewer than two reference wells.
    """
    plates, codes = np.unique(profiles.meta["Metadata_Plate"].to_numpy(dtype=str), return_inverse=True)
    used = np.ones(len(codes), dtype=bool) if reference is None else reference
    counts = np.bincount(codes[used], minlength=len(plates))
    if (counts < 2).any():
        bare = plates[counts < 2]
        kind = "wells" if reference is None else "control wells"
        raise DataError(
            f"Every plate must have at least two {kind} to be scaled by. {len(bare)} of {len(plates)} have not ({bare[0]} the first): leave them out "
            "with score.query, check score.control, or choose a score.pipeline that does without."
        )
    values = np.empty_like(profiles.values)
    varies = np.ones(len(profiles.names), dtype=bool)
    by_plate = np.argsort(codes, kind="stable")
    for rows in np.split(by_plate, np.cumsum(np.bincount(codes))[:-1]):
        block = profiles.values[rows].astype(np.float64)
        wells = block[used[rows]]
        centre = np.median(wells, axis=0) if robust else wells.mean(axis=0)
        scale = MAD_TO_SD * np.median(np.abs(wells - centre), axis=0) if robust else wells.std(axis=0)
        good = _varies(wells, profiles.values.dtype) & (scale > 0)
        varies &= good
        values[rows] = (block - centre) / np.where(good, scale, 1.0)
    return replace(profiles, values=values).keep(varies)


def sphere(profiles: Profiles, reference: np.ndarray, *, method: str, regularisation: float) -> Profiles:
    """Return profiles centred on the reference wells and whitened by their covariance C = E Λ Eᵀ (Kessy 2018, The American Statistician 72:309).

    PCA: (x − mean) E (Λ + r λ̄)^(−1/2); ZCA: the same times Eᵀ, which stays closest to the original features. λ̄ is the mean eigenvalue, r the
    regularisation: without it directions in which the control does not vary, always some where its wells are fewer than the features, would be
    blown up without bound. pycytominer's `Spherize` adds its epsilon to the singular values instead; at r → 0 the two agree.

    Parameters
    ----------
    profiles : wells (N, F).
    reference : mask (N,), bool, of at least two wells.
    method : "pca" or "zca".
    regularisation : r, 0 or more.

    Raises
    ------
    DataError : fewer than two reference wells, or, with r = 0, a direction in which they do not vary.
    """
    wells = profiles.values[reference].astype(np.float64)
    if len(wells) < 2:
        raise DataError(f"Sphering must have at least two control wells. There are {len(wells)}: check score.control.")
    centre = wells.mean(axis=0)
    eigenvalues, vectors = np.linalg.eigh((wells - centre).T @ (wells - centre) / (len(wells) - 1))
    eigenvalues = np.maximum(eigenvalues, 0) + regularisation * eigenvalues.mean()
    if eigenvalues.min() <= 1e-12 * eigenvalues.max():
        raise DataError(
            f"Sphering must have score.regularisation above 0 where controls vary in fewer directions than there are features: {len(wells)} wells, "
            f"{len(centre)} features."
        )
    matrix = vectors / np.sqrt(eigenvalues)
    names = tuple(f"PC{number:04d}" for number in range(len(centre))) if method == "pca" else profiles.names
    matrix = matrix @ vectors.T if method == "zca" else matrix
    dtype = profiles.values.dtype
    return replace(profiles, values=(profiles.values - centre.astype(dtype)) @ matrix.astype(dtype), names=names)


def _varies(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return whether each column's range is more than rounding of `dtype`, in which means over different numbers of fields differ by a bit or two."""
    high, low = values.max(axis=0), values.min(axis=0)
    return high - low > 2 * np.finfo(dtype).eps * np.maximum(np.abs(high), np.abs(low))
