"""A column of a table, on the plates: heat maps where it holds numbers, coloured markers where it holds names.

In: a table of fields or wells with `Metadata_Plate` and `Metadata_Well`. Out: a `Picture`. Promised: every plate stands in one layout and one
colour scale, so that plates can be compared; wells that were not imaged stay empty; control wells are marked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import mannwhitneyu

from hcsdl.config import ConfigError, DataError
from hcsdl.report.picture import SEQUENTIAL, WIDTH_IN, Picture, looks, safe_name, styled

FORMATS = {96: (8, 12), 384: (16, 24), 1536: (32, 48)}  # wells: rows and columns, ANSI/SLAS 4-2004
MOST_PLATES = 12  # drawn; beyond, those are chosen that differ most from the others. A guess
EDGE_P = 0.01  # p-value up to which an edge effect is told. A guess
WELL = ["Metadata_Plate", "Metadata_Well"]
UNITS = {"Count_Nuclei": "nuclei a field", "Intensity_": "camera units", "Prob_": "probability", "QC_Saturated": "share of pixels", "QC_Foreground": "share of pixels"}  # fmt: skip


def well_places(wells: Sequence[str]) -> np.ndarray:
    """Return row and column, from 0, of wells named like B02, p24 or AB7: (N, 2) int. Raises DataError at another name."""
    found = [re.fullmatch(r"([A-Za-z]{1,2})0*([1-9][0-9]?)", str(well).strip()) for well in wells]
    if None in found:
        raise DataError(
            f"A well must be named by its row's letter and its column, such as B02. Got {list(wells)[found.index(None)]!r} instead."
        )
    rows = [sum((ord(letter) - 64) * 26**place for place, letter in enumerate(reversed(f[1].upper()))) - 1 for f in found if f]
    return np.array([rows, [int(f[2]) - 1 for f in found if f]], dtype=int).T


def plate_format(places: np.ndarray) -> tuple[int, int]:
    """Return rows and columns of the smallest plate of 96, 384 or 1,536 wells that has all `places` (N, 2). Raises DataError where none has."""
    for shape in FORMATS.values():
        if (places < shape).all():
            return shape
    raise DataError(f"Wells must fit on a plate of {', '.join(map(str, FORMATS))} wells. Row {places[:, 0].max() + 1}, column {places[:, 1].max() + 1} does not.")  # fmt: skip


def unit_of(column: str) -> str:
    """Return the unit of one of our tables' columns, "" where unknown."""
    return next((unit for start, unit in UNITS.items() if column.startswith(start)), "")


def _spoken(column: str) -> str:
    words = column.removeprefix("Metadata_").removeprefix("QC_").split("_")
    return {"Count_Nuclei": "Nucleus count"}.get(column, " ".join(words))


@styled()
def plate_picture(table: pd.DataFrame, column: str, *, control: str = "DMSO", most: int = MOST_PLATES) -> Picture:
    """Return `column` on every plate: each well's mean over its rows where it holds numbers, else its name.

    Parameters
    ----------
    table : rows are fields or wells: Metadata_Plate, Metadata_Well, `column`; Metadata_Compound marks the control, Metadata_Treatment is named in the title.
    column : of numbers or names.
    control : compound name of the negative control.
    most : plates drawn at most, those whose median is furthest from all plates' (of names: the first).

    Raises
    ------
    ConfigError : there is no such column, or no row has a value.
    DataError : a well's name is none, or a well has two names in `column`.
    """
    if column not in table or table[column].isna().all():
        raise ConfigError(
            f"A column to draw on plates must be in the table and hold values. {column} does not; there are {', '.join(list(table)[:12])} …."
        )
    numeric = pd.api.types.is_numeric_dtype(table[column])
    known = [c for c in ("Metadata_Compound", "Metadata_Treatment") if c in table and c != column]
    grouped = table.groupby(WELL, sort=True)
    if not numeric and (torn := grouped[column].nunique() > 1).any():
        raise DataError(f"A well must have one {column} to be drawn by it. {'/'.join(map(str, torn.idxmax()))} has several.")
    wells = pd.concat([grouped[column].mean() if numeric else grouped[column].first(), grouped[known].first()], axis=1).reset_index()
    places = well_places(wells["Metadata_Well"])
    wells["row"], wells["column"] = places.T
    shape = plate_format(places)
    plates = _chosen(wells, column, numeric, most)
    across = 1 if len(plates) == 1 else 2 if shape == FORMATS[96] and len(plates) <= 8 or shape != FORMATS[96] else 3
    down = -(-len(plates) // across)
    height = ((WIDTH_IN - 0.35) / across * shape[0] / shape[1] + 0.27) * down
    names = [] if numeric else sorted(wells[column].dropna().astype(str).unique())
    figure = Figure(figsize=(WIDTH_IN, height + (0.8 if numeric else 0.25 + 0.21 * -(-len(names) // _columns(names)))))
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0.0, wspace=0.0)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[len(plates) :]:
        axes.set_axis_off()
    parts = [wells[wells["Metadata_Plate"] == plate] for plate in plates]
    if numeric:
        _draw_numbers(figure, grid, parts, column, shape, control)
    else:
        _draw_names(figure, grid, parts, column, shape, names, control)
    for number, (axes, plate) in enumerate(zip(grid, plates, strict=False)):
        _frame(axes, shape, str(plate), left=number % across == 0, bottom=number + across >= len(plates))
    left_out = wells["Metadata_Plate"].nunique() - len(plates)
    title = _number_title(wells, column, control) if numeric else _name_title(wells, column)
    reading = (
        "A square is a well"
        + (", the mean of its fields" if table.duplicated(WELL).any() else "")
        + f"; dots mark {control} wells, grey ones were not imaged"
        if numeric
        else "A marker is a well; empty places were not imaged"
    )
    reading += (
        f"; of {left_out + len(plates)} plates the {len(plates)} furthest from the middle are shown."
        if left_out
        else "; all plates are shown."
    )
    return Picture(f"plates_{safe_name(column)}", title, reading, figure)


def _chosen(wells: pd.DataFrame, column: str, numeric: bool, most: int) -> list:
    """Return the plates to draw, in order of their names."""
    plates = sorted(wells["Metadata_Plate"].unique())
    if len(plates) <= most or not numeric:
        return plates[:most]
    medians = wells.groupby("Metadata_Plate")[column].median()
    return sorted((medians - medians.median()).abs().sort_values(ascending=False, kind="stable").index[:most])


def _draw_numbers(figure: Figure, grid: np.ndarray, plates: list[pd.DataFrame], column: str, shape: tuple[int, int], control: str) -> None:
    values = pd.concat(plates)[column].dropna()
    low, high = np.percentile(values, [1, 99])
    image = None
    for axes, wells in zip(grid, plates, strict=False):
        plate = np.full(shape, np.nan)
        plate[wells["row"], wells["column"]] = wells[column]
        axes.set_facecolor("#EDEDED")
        image = axes.imshow(plate, vmin=low, vmax=high if high > low else low + 1, cmap=SEQUENTIAL)
        if "Metadata_Compound" in wells:
            mine = wells[wells["Metadata_Compound"] == control]
            axes.scatter(mine["column"], mine["row"], s=260 / shape[1], color="white", edgecolors="black", linewidths=0.6)
    label = " ".join(filter(None, [_spoken(column), f"({unit_of(column)})" if unit_of(column) else ""]))
    figure.colorbar(image, ax=list(grid), location="bottom", shrink=0.6, aspect=35, pad=0.02, label=label,
                    extend={(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[bool(values.min() < low), bool(values.max() > high)])  # fmt: skip


def _columns(names: Sequence[str]) -> int:
    return 2 if max(map(len, names)) > 14 else 4


def _draw_names(
    figure: Figure, grid: np.ndarray, plates: list[pd.DataFrame], column: str, shape: tuple[int, int], names: list[str], control: str
) -> None:
    look = looks(names, control=control)
    handles = {}
    for axes, wells in zip(grid, plates, strict=False):
        axes.set(xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5), aspect="equal")
        for name in names:
            mine = wells[wells[column].astype(str) == name]
            if len(mine):
                colour, marker = look[name]
                handles.setdefault(name, axes.scatter(mine["column"], mine["row"], s=520 / shape[1], color=colour, marker=marker))
    shown = [name for name in names if name in handles]
    figure.legend([handles[name] for name in shown], shown, loc="outside lower center", ncols=_columns(shown), handletextpad=0.3)


def _frame(axes: Axes, shape: tuple[int, int], plate: str, *, left: bool, bottom: bool) -> None:
    step = 1 if shape == FORMATS[96] else shape[0] // 8
    rows, columns = range(0, shape[0], step), range(step - 1, shape[1], step * 2 if shape == FORMATS[96] else step)
    letters = [chr(65 + row) if row < 26 else f"A{chr(39 + row)}" for row in rows]
    axes.set_xticks(columns, [str(c + 1) for c in columns] if bottom else [""] * len(columns), fontsize=8.5)
    axes.set_yticks(rows, letters if left else [""] * len(rows), fontsize=8.5)
    axes.tick_params(length=0, pad=2)
    axes.set_title(plate, fontsize=9.5, pad=3)
    for side in axes.spines.values():
        side.set(visible=True, color="#AAAAAA")


def _plain(value: float) -> str:
    """Return a number with three digits, or all those before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _number_title(wells: pd.DataFrame, column: str, control: str) -> str:
    """Return what stands out: plates, edges, or treatments."""
    what, values = _spoken(column), wells.dropna(subset=[column])
    total = ((values[column] - values[column].mean()) ** 2).sum()
    if total <= 1e-24 * max(1.0, float((values[column] ** 2).sum())):
        return f"{what} is the same, {_plain(values[column].iloc[0])}, in every well"
    middles = values.groupby("Metadata_Plate")[column].transform("mean")
    between = float(((middles - values[column].mean()) ** 2).sum() / total)
    medians = values.groupby("Metadata_Plate")[column].median()
    parts = []
    if len(medians) > 1:
        far = (medians - medians.median()).abs().idxmax()
        if between >= 0.5:
            parts.append(f"{what} differs mostly between plates ({between:.0%} of the wells' variance)")
            parts.append(f"{far} stands furthest out, median {_plain(medians[far])} against {_plain(medians.median())}")
        else:
            parts.append(f"{what} differs mostly within plates ({1 - between:.0%} of the wells' variance)")
    else:
        parts.append(f"{what} goes from {_plain(values[column].min())} to {_plain(values[column].max())} on the plate")
    if edge := _edge(values, column):
        parts.append(edge)
    elif between < 0.5 and (strongest := _strongest(values, column, control)):
        parts.append(strongest)
    return "; ".join(parts)


def _edge(wells: pd.DataFrame, column: str) -> str:
    """Return a clause where the outermost imaged rows and columns differ from the inner ones (Mann-Whitney test on distances to the plate's median).

    Only treatments that stand in both are compared, each with itself: where controls have the rim to themselves it is they that differ.
    """
    deviation = wells[column] - wells.groupby("Metadata_Plate")[column].transform("median")
    outer = wells["row"].isin([wells["row"].min(), wells["row"].max()]) | wells["column"].isin(
        [wells["column"].min(), wells["column"].max()]
    )
    if "Metadata_Treatment" in wells:
        treatment = wells["Metadata_Treatment"]
        both = outer.groupby(treatment).transform("nunique") == 2
        deviation, outer = (deviation - deviation.groupby(treatment).transform("median"))[both], outer[both]
    if min(outer.sum(), (~outer).sum()) < 10 or mannwhitneyu(deviation[outer], deviation[~outer]).pvalue > EDGE_P:
        return ""
    difference = float(deviation[outer].median() - deviation[~outer].median())
    return f"wells at the edge are {'higher' if difference > 0 else 'lower'} than the inner ones by {_plain(abs(difference))}, so look for evaporation"


def _strongest(wells: pd.DataFrame, column: str, control: str) -> str:
    """Return a clause on the treatment furthest from the controls."""
    if not {"Metadata_Treatment", "Metadata_Compound"} <= set(wells):
        return ""
    is_control = wells["Metadata_Compound"] == control
    treated = wells[~is_control].groupby("Metadata_Treatment")[column].median()
    if treated.empty or not is_control.any():
        return ""
    usual = float(wells.loc[is_control, column].median())
    far = (treated - usual).abs().idxmax()
    return f"{far} is furthest from {control}, {_plain(treated[far])} against {_plain(usual)}"


def _name_title(wells: pd.DataFrame, column: str) -> str:
    """Return whether wells of one name always stand in the same place, which no network could tell from what the place itself does."""
    what = _spoken(column)
    counts = wells.groupby("Metadata_Plate")[column].nunique()
    places = wells.groupby(column)[["row", "column"]].apply(lambda part: len(part.drop_duplicates()) / len(part))
    fixed = [str(name) for name, share in places.items() if share <= 0.5 and (wells[column] == name).sum() >= 3]
    text = (
        f"A plate holds {counts.min()}"
        + (f" to {counts.max()}" if counts.max() > counts.min() else "")
        + f" of {wells[column].nunique()} kinds of {what}"
    )
    if fixed:
        some = ", ".join(fixed[:2]) + (" …" if len(fixed) > 2 else "")
        return f"{text}; {len(fixed)} of them stand in the same wells on several plates ({some}), so place and effect are mixed there"
    return f"{text}, in other places on other plates"
