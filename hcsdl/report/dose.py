"""What a network says of a compound at each of its concentrations.

In: `Prob_*` of fields or wells, of a network that learned mechanisms, compounds or treatments. Out: a `Picture`. Promised: every replicate well is a marker of its
own; wells the network was trained on look different; with compounds or treatments learned, the compound's own classes do not count.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hcsdl.config import ConfigError
from hcsdl.plates.tables import CONTROL_MOA
from hcsdl.profiles.predictions import well_probabilities
from hcsdl.report.picture import COLOURS, GREY, WIDTH_IN, Picture, safe_name, styled

MOST_MECHANISMS = 3  # lines that can be followed
RECOGNISED = 0.5  # probability from which a mechanism is said to be seen


def mechanism_probabilities(rows: pd.DataFrame, probabilities: pd.DataFrame, target: str, compound: str) -> pd.DataFrame:
    """Return the probability of each mechanism (N, M).

    Where the classes are mechanisms these are the probabilities as they are. Where they are compounds or treatments, they are summed over the classes of a
    mechanism, the compound's own left out and the rest scaled to sum 1: else a compound would only be told to look like itself.

    Parameters
    ----------
    rows : metadata (N, …) of the whole table: its labels say which class has which mechanism.
    probabilities : (N, K), columns named by class.
    target : metadata column of the classes.

    Raises
    ------
    ConfigError : no class of another compound has a mechanism.
    """
    if target == "Metadata_MoA":
        return probabilities
    known = rows.dropna(subset=["Metadata_MoA"]).drop_duplicates(target).set_index(target)
    known = known[(known["Metadata_Compound"] != compound) & known.index.isin(probabilities.columns)]
    if known.empty:
        raise ConfigError(
            f"Some class besides those of {compound} must have a mechanism of action. None of the {probabilities.shape[1]} has."
        )
    sums = probabilities[list(known.index)].T.groupby(known["Metadata_MoA"].astype(str).to_numpy()).sum().T
    return sums.div(sums.sum(axis=1).clip(lower=1e-30), axis=0)


@styled()
def dose_picture(
    rows: pd.DataFrame, probabilities: pd.DataFrame, compound: str, *, target: str = "Metadata_MoA", control: str = "DMSO"
) -> Picture:
    """Return the probabilities of mechanisms against the concentration of a compound: its own mechanism where known, and those it is most taken for.

    Parameters
    ----------
    rows : metadata of fields or wells (N, …), all of the table: Metadata_Plate, _Well, _Compound, _Concentration, and what there is of _MoA, _Split.
    probabilities : (N, K), columns named by class.
    compound : which one.
    target : metadata column of the classes.
    control : compound name of the negative control, drawn on the left as concentration 0.

    Raises
    ------
    ConfigError : the table has no such compound, or no concentration of it.
    """
    if not (rows["Metadata_Compound"] == compound).any() or "Metadata_Concentration" not in rows:
        there = ", ".join(map(str, rows["Metadata_Compound"].unique()[:8]))
        raise ConfigError(
            f"A dose response needs a compound of the table and its Metadata_Concentration. Got {compound!r}; there are {there} …."
        )
    wells, values = well_probabilities(rows, mechanism_probabilities(rows, probabilities, target, compound))
    doses = wells["Metadata_Concentration"].to_numpy(dtype=float)
    mine = (wells["Metadata_Compound"] == compound).to_numpy() & ~np.isnan(doses)
    if not mine.any():
        raise ConfigError(f"A dose response needs concentrations. No well of {compound} has one.")
    own = _own_mechanism(wells[mine])
    shown = _shown(values[mine], own)
    levels = np.unique(doses[mine])
    is_control = (wells["Metadata_Compound"] == control).to_numpy() & ~mine
    figure = Figure(figsize=(WIDTH_IN, 4.6))
    axes = figure.subplots()
    trained = (wells["Metadata_Split"] == "train").to_numpy() if "Metadata_Split" in wells else np.zeros(len(wells), dtype=bool)
    spread = np.linspace(-0.16, 0.16, len(shown)) if len(shown) > 1 else [0.0]
    for number, (mechanism, shift) in enumerate(zip(shown, spread, strict=True)):
        label = f"{mechanism}" + (" (its own)" if mechanism == own else "")
        _draw(axes, values[mechanism].to_numpy(), doses, levels, (mine, is_control, trained), number, shift, label)
    axes.axhline(1 / values.shape[1], color=GREY, linestyle=":", linewidth=1)
    axes.annotate("chance", (len(levels) - 0.55, 1 / values.shape[1]), color=GREY, fontsize=8.5, va="bottom", ha="right")
    places = list(range(len(levels)))
    left = [-1] if is_control.any() else []
    axes.set_xticks([*left, *places], [*([control] if left else []), *(f"{level:g}" for level in levels)])
    axes.set(xlim=((-1.5 if left else -0.5), len(levels) - 0.5), ylim=(-0.03, 1.03))
    axes.set(xlabel=f"concentration of {compound} (unit of the plates' list)", ylabel="probability of the mechanism")
    if left:
        axes.axvline(-0.5, color="#DDDDDD", linewidth=1)
    figure.legend(loc="outside upper left", ncols=1 if max(map(len, shown)) > 16 else len(shown))
    reading = (
        f"A marker is a well, the line its concentration's median, {control} on the left"
        if left
        else "A marker is a well, the line its concentration's median"
    )
    if (trained & mine).any():
        reading += "; hollow wells were trained on and say little, filled ones were held out"
    if target != "Metadata_MoA":
        reading += f"; probabilities are summed over the other compounds' classes of a mechanism, {compound}'s own left out"
    return Picture(f"dose_{safe_name(compound)}", _title(compound, own, values, doses, levels, mine, trained), reading + ".", figure)


def _own_mechanism(wells: pd.DataFrame) -> str | None:
    known = wells["Metadata_MoA"].dropna() if "Metadata_MoA" in wells else pd.Series(dtype=object)
    return None if known.empty else str(known.mode().iloc[0])


def _shown(values: pd.DataFrame, own: str | None) -> list[str]:
    """Return the mechanisms to draw: the own first, then those with the highest mean, the control's kept if it is among them."""
    ranked = [name for name in values.mean().sort_values(ascending=False, kind="stable").index if name != own]
    return ([own] if own in values else []) + ranked[: MOST_MECHANISMS - (own in values)]


def _draw(
    axes: Axes,
    values: np.ndarray,
    doses: np.ndarray,
    levels: np.ndarray,
    masks: tuple[np.ndarray, ...],
    number: int,
    shift: float,
    label: str,
) -> None:
    """Draw one mechanism: a marker a well, a line through the medians."""
    mine, is_control, trained = masks
    colour, marker = COLOURS[number], "os^"[number]
    places = np.where(is_control, -1.0, np.searchsorted(levels, doses)) + shift
    for group in (mine, is_control):
        for hollow in (False, True):
            some = group & (trained == hollow)
            faint = {"s": 30 if group is mine else 14, "alpha": 0.85 if group is mine else 0.45}
            axes.scatter(places[some], values[some], marker=marker, edgecolors=colour, facecolors="none" if hollow else colour, **faint)
    middles = [np.median(values[mine & (doses == level)]) for level in levels]
    width = 2.4 if number == 0 else 1.4
    axes.plot(np.arange(len(levels)) + shift, middles, color=colour, linewidth=width)
    axes.plot([], [], color=colour, linewidth=width, marker=marker, label=label)  # what the legend shows


def _title(
    compound: str, own: str | None, values: pd.DataFrame, doses: np.ndarray, levels: np.ndarray, mine: np.ndarray, trained: np.ndarray
) -> str:
    """Return from which concentration on the mechanism is seen; of wells held out where there are some."""
    judged = mine & ~trained if (mine & ~trained).any() else mine
    medians = values[judged].groupby(doses[judged]).median()
    levels = medians.index.to_numpy()
    if own in values:
        seen = medians[own].to_numpy() >= RECOGNISED
        first = len(levels) - int(np.argmin(seen[::-1])) if not seen.all() else 0
        if seen.all():
            low = "its only concentration" if len(levels) == 1 else f"every concentration from {levels[0]:g}"
            return f"{compound} is recognised as {own} at {low}"
        if first < len(levels):
            return f"{compound} is recognised as {own} from {levels[first]:g} on"
        if seen.any():
            return f"{compound} is recognised as {own} at {', '.join(f'{level:g}' for level in levels[seen])}, but not at its highest concentration"
    top = medians.iloc[-1]
    looks_like = f"at {levels[-1]:g} it looks most like {top.idxmax()} ({top.max():.2f})"
    if top.idxmax() == CONTROL_MOA:
        looks_like = f"even at {levels[-1]:g} it looks like the control ({top.max():.2f})"
    return (
        f"{compound} is not recognised as {own} at any concentration; {looks_like}"
        if own in values
        else f"{compound}, of no known mechanism: {looks_like}"
    )
