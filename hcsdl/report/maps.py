"""Wells as a map: profiles on two axes, coloured by mechanism, batch and concentration.

In: normalised profiles of wells. Out: `Picture`s of one map. Promised: the same wells give the same map; what the title says was counted among the profiles
themselves, for a map of two axes distorts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from hcsdl.config import DataError
from hcsdl.plates.tables import CONTROL_MOA
from hcsdl.profiles.effects import same_group_effect
from hcsdl.profiles.tables import Profiles
from hcsdl.profiles.treatments import unit_rows
from hcsdl.report.picture import SEQUENTIAL, WIDTH_IN, Picture, looks, styled

SHOWS = 0.1  # share of the way from chance to certainty from which a batch or mechanism is said to show. A guess


@dataclass(frozen=True)
class WellMap:
    """`points` (N, 2) float64, rows as the wells; `shares` of the variance on each axis."""

    points: np.ndarray
    shares: tuple[float, float]


def map_wells(wells: Profiles) -> WellMap:
    """Return the first two principal components of the wells' profiles.

    Profiles are put at length 1 first, so that the map shows what scores go by, the cosine; wells without effect, whose directions are random, come to lie
    in the middle, where plates have controls enough to be scaled by (two a plate are too few). PCA and not UMAP: its distances mean something, and
    umap-learn took 18 s to import for the first time, 2 to 3 s later, and 11 s to compile itself each time (measured here, 90 wells).

    Parameters
    ----------
    wells : normalised, without missing values, at least three.

    Raises
    ------
    DataError : fewer than three wells, or a missing value.
    """
    missing = int(np.isnan(wells.values).sum())
    if len(wells) < 3 or missing:
        raise DataError(f"A map must be of at least three wells without a missing value. Got {len(wells)} wells, {missing} values missing.")
    from sklearn.decomposition import PCA

    units = unit_rows(wells.values)
    pca = PCA(min(2, units.shape[1]), svd_solver="full" if min(units.shape) <= 1000 else "randomized", random_state=0)
    points = np.zeros((len(wells), 2))
    found = pca.fit_transform(units)
    points[:, : found.shape[1]] = found
    first, second = [*pca.explained_variance_ratio_, 0.0][:2]
    return WellMap(points, (float(first), float(second)))


def map_pictures(wells: Profiles, *, control: str = "DMSO") -> list[Picture]:
    """Return one map three times: coloured by mechanism, by batch, by concentration; left out where the wells do not know it.

    Parameters
    ----------
    wells : normalised, as for `map_wells`, with Metadata_Plate, _Compound and what there is of Metadata_MoA, _Batch and _Concentration.
    control : compound name of the negative control.
    """
    found = map_wells(wells)
    is_control = (wells.meta["Metadata_Compound"] == control).to_numpy()
    pictures = []
    if "Metadata_MoA" in wells.meta and (wells.meta["Metadata_MoA"].notna() & ~is_control).any():
        names = wells.meta["Metadata_MoA"].astype(object).where(wells.meta["Metadata_MoA"].notna(), None)
        names = names.mask(is_control, CONTROL_MOA)
        look_for = "wells of one mechanism should lie together, whatever their compound"
        pictures.append(_by_name(found, names, "moa", CONTROL_MOA, _moa_title(wells, control), "mechanism", look_for))
    if "Metadata_Batch" in wells.meta and wells.meta["Metadata_Batch"].nunique() > 1:
        title = _batch_title(wells, control)
        look_for = "colours should be mixed everywhere; a region of one colour is a batch's own look, or compounds of that batch alone"
        pictures.append(_by_name(found, wells.meta["Metadata_Batch"], "batch", None, title, "batch", look_for))
    if "Metadata_Concentration" in wells.meta and (wells.meta.loc[~is_control, "Metadata_Concentration"] > 0).any():
        pictures.append(_by_concentration(found, wells, is_control, control))
    return pictures


def _axes(found: WellMap, height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, height_in))
    axes = figure.subplots()
    labels = [f"principal component {number} ({share:.0%} of the variance)" for number, share in enumerate(found.shares, start=1)]
    axes.set(xlabel=labels[0], ylabel=labels[1])
    return figure, axes


def _size(number: int) -> float:
    return float(np.clip(9000 / max(number, 1), 9, 46))


@styled()
def _by_name(found: WellMap, names: pd.Series, name: str, control: str | None, title: str, what: str, look_for: str) -> Picture:
    known = sorted(names.dropna().unique(), key=lambda one: (one != control, one))
    look = looks(known, control=control)
    shown = known[:24]
    columns = 2 if max(map(len, shown)) > 12 else 4
    figure, axes = _axes(found, 5.0 + 0.2 * -(-len(shown) // columns))
    size = _size(len(names))
    unknown = names.isna().to_numpy()
    if unknown.any():
        axes.scatter(*found.points[unknown].T, s=size / 3, color="#DDDDDD", linewidths=0, label=f"no {what} known ({unknown.sum()})")
    for one in known:
        mine = (names == one).to_numpy()
        colour, marker = look[one]
        label = f"{one} ({mine.sum()})" if one in shown else None
        axes.scatter(
            *found.points[mine].T,
            s=2.5 * size if marker == "." else size,
            color=colour,
            marker=marker,
            alpha=0.8,
            linewidths=0.3,
            edgecolors="white",
            label=label,
        )
    legend = figure.legend(loc="outside lower center", ncols=columns, columnspacing=1.2, handletextpad=0.3)
    for handle in legend.legend_handles:  # to be told apart however small the wells' are
        handle.set_sizes([46])
    reading = f"Each marker is a well, placed by PCA of its profile; {look_for}; in brackets the number of wells."
    return Picture(f"map_{name}", title, reading, figure)


def _moa_title(wells: Profiles, control: str) -> str:
    labelled = wells.take((wells.meta["Metadata_MoA"].notna() & (wells.meta["Metadata_Compound"] != control)).to_numpy())
    effect = same_group_effect(labelled, "Metadata_MoA", control, apart=_apart(wells))
    if not effect.queries:
        return "Whether wells lie by mechanism cannot be told: no mechanism has two compounds on two plates"
    figures = f"the nearest well of another compound{_and_plate(wells)} has the same one for {effect.share:.0%} of wells, by chance for {effect.chance:.0%}"
    return f"Mechanisms show: {figures}" if effect.score >= SHOWS else f"Mechanisms hardly show: {figures}"


def _apart(wells: Profiles) -> str | None:
    """Return the column in which a well's neighbour must differ, so that a plate's own look does not count."""
    return "Metadata_Plate" if wells.meta["Metadata_Plate"].nunique() > 1 else None


def _and_plate(wells: Profiles) -> str:
    return " and plate" if _apart(wells) else ""


def _batch_title(wells: Profiles, control: str) -> str:
    effect = same_group_effect(wells, "Metadata_Batch", control, apart=_apart(wells))
    if not effect.queries:
        return "No well can be compared within and across batches: whether batches show cannot be told"
    figures = f"the nearest well of another compound{_and_plate(wells)} is of the same batch for {effect.share:.0%} of wells, by chance for {effect.chance:.0%}"
    return f"Batches show: {figures}" if effect.score >= SHOWS else f"Batches hardly show: {figures}"


@styled()
def _by_concentration(found: WellMap, wells: Profiles, is_control: np.ndarray, control: str) -> Picture:

    doses = wells.meta["Metadata_Concentration"].to_numpy(dtype=float)
    treated = ~is_control & (doses > 0)
    figure, axes = _axes(found, 5.2)
    size = _size(len(wells))
    axes.scatter(*found.points[is_control].T, s=size, color="black", marker="x", linewidths=1, label=control)
    order = np.flatnonzero(treated)[np.argsort(doses[treated], kind="stable")]
    drawn = axes.scatter(
        *found.points[order].T, s=size, c=doses[order], cmap=SEQUENTIAL, norm=LogNorm(), linewidths=0.3, edgecolors="white"
    )
    figure.colorbar(
        drawn, ax=axes, label="concentration (unit of the plates' list)", location="bottom", shrink=0.7, aspect=35, pad=0.02, format="{x:g}"
    )
    if is_control.any():
        axes.legend(loc="best")
    reading = "Each marker is a well, placed by PCA of its profile; a compound that acts moves away from the controls as its colour turns to yellow."
    return Picture("map_concentration", _concentration_title(wells, is_control, treated, control), reading, figure)


def _concentration_title(wells: Profiles, is_control: np.ndarray, treated: np.ndarray, control: str) -> str:
    """Return whether a compound's wells move away from the controls with its dose, compounds of three concentrations and more."""
    doses = wells.meta["Metadata_Concentration"]
    compounds = wells.meta["Metadata_Compound"].where(treated)
    several = doses.where(treated).groupby(compounds).nunique()
    several = several[several >= 3].index
    if not len(several) or not is_control.any():
        return "No compound has three concentrations, so the map tells how concentrations lie, not how effects grow with them"
    distance = pd.Series(np.linalg.norm(wells.values - wells.values[is_control].mean(axis=0), axis=1))
    # A plate of few controls is scaled by chance; doses of one plate can be compared all the same.
    distance /= distance.where(treated).groupby(wells.meta["Metadata_Plate"]).transform("median")
    found = pd.Series(
        {one: spearmanr(doses[mine], distance[mine]).statistic for one in several if len(mine := np.flatnonzero(compounds == one))}
    )
    found = found.dropna()
    if found.empty:
        return "No compound's wells differ from each other"
    growing = int((found >= 0.5).sum())
    return f"{growing} of {len(found)} compounds move away from {control} as their concentration rises (rank correlation 0.5 or more; the median is {found.median():.2f})"
