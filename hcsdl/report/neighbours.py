"""What a compound is like: its nearest treatments, as a table and as fields to compare.

In: normalised profiles of wells. Out: a table, a `Picture`. Promised: compounds without a known mechanism can be asked about too; no treatment of the compound
itself is its neighbour; a neighbour that shares a batch is marked, for it may be near because of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hcsdl.config import ConfigError
from hcsdl.profiles.tables import Profiles
from hcsdl.profiles.treatments import unit_rows
from hcsdl.report.fields import LIGHTS, FieldView, caption, composite, contrast, middle, scale_bar, show
from hcsdl.report.picture import DPI, WIDTH_IN, Picture, safe_name, styled

ACROSS = 3


def nearest_treatments(
    wells: Profiles, compound: str, *, control: str = "DMSO", treatment: str | None = None, number: int = 5
) -> tuple[str, pd.DataFrame]:
    """Return a treatment of `compound` and the treatments of other compounds nearest to it by cosine; the control is one of them.

    Parameters
    ----------
    wells : normalised, with Metadata_Compound and _Treatment, and what there is of _MoA and _Batch.
    compound : any of the table, of known mechanism or not.
    treatment : which of its treatments; None: the one furthest from the origin (the controls' mean, after standardising on them), its strongest.
    number : neighbours at most.

    Returns
    -------
    The treatment's name; DataFrame, the nearest first: Treatment, Compound, MoA (None where unknown), Cosine, Batches ("same", "other", "some shared", "" where
    unknown), Wells.

    Raises
    ------
    ConfigError : the wells have no such compound or treatment.
    """
    meta = wells.meta
    names, first, codes, counts = np.unique(
        meta["Metadata_Treatment"].to_numpy(dtype=str), return_index=True, return_inverse=True, return_counts=True
    )
    sums = np.zeros((len(names), len(wells.names)))
    np.add.at(sums, codes, wells.values)
    profiles = sums / counts[:, None]
    compounds = meta["Metadata_Compound"].to_numpy(dtype=str)[first]
    mine = np.flatnonzero(compounds == compound)
    if not len(mine) or (treatment is not None and treatment not in names[mine]):
        raise ConfigError(
            f"Neighbours need a compound of the table, and a treatment of it. Got {compound!r}{f', {treatment!r}' if treatment else ''}."
        )
    chosen = mine[np.linalg.norm(profiles[mine], axis=1).argmax()] if treatment is None else int(np.flatnonzero(names == treatment)[0])
    units = unit_rows(profiles)
    cosines = units @ units[chosen]
    others = np.flatnonzero(compounds != compound)
    order = others[np.argsort(-cosines[others], kind="stable")][:number]
    batches = meta.groupby(codes)["Metadata_Batch"].agg(set).to_dict() if "Metadata_Batch" in meta else {}
    moas = meta["Metadata_MoA"].iloc[first].tolist() if "Metadata_MoA" in meta else [None] * len(names)
    rows = [
        {
            "Treatment": names[row],
            "Compound": compounds[row],
            "MoA": moas[row] if pd.notna(moas[row]) else ("control" if compounds[row] == control else None),
            "Cosine": float(cosines[row]),
            "Batches": _shared(batches.get(chosen), batches.get(row)),
            "Wells": int(counts[row]),
        }
        for row in order
    ]
    return str(names[chosen]), pd.DataFrame(rows)


def _shared(own: set | None, other: set | None) -> str:
    if not own or not other:
        return ""
    return "other" if not own & other else "same" if own == other else "some shared"


def example_rows(rows: pd.DataFrame, treatments: Sequence[str]) -> pd.DataFrame:
    """Return one field of each treatment, its first by plate, well and site; `rows` are fields (Metadata_Plate, _Well, _Site, _Treatment)."""
    ordered = rows.sort_values(["Metadata_Plate", "Metadata_Well", "Metadata_Site"], kind="stable").drop_duplicates("Metadata_Treatment")
    return ordered.set_index("Metadata_Treatment").loc[list(treatments)].reset_index()


@styled()
def neighbours_picture(
    treatment: str,
    moa: str | None,
    found: pd.DataFrame,
    images: Sequence[np.ndarray],
    channels: Sequence[str],
    *,
    pixel_size_um: float | None = None,
) -> Picture:
    """Return a strip of fields, pixel by pixel: the treatment's own first, then its neighbours'.

    Parameters
    ----------
    treatment : of `nearest_treatments`; `moa` its mechanism, None where unknown.
    found : the neighbours.
    images : a field (C, H, W) of the treatment and of each neighbour, in this order; best preprocessed, for they come from several plates.
    """
    captions = [f"{treatment}\n{moa or 'mechanism unknown'}"]
    for row in found.itertuples():
        batch = f", {row.Batches} batch" if row.Batches in ("same", "other") else ""
        captions.append(f"{row.Treatment}\n{row.MoA or 'mechanism unknown'}\ncosine {row.Cosine:.2f}{batch}")
    views = [FieldView(image, text) for image, text in zip(images, captions, strict=True)]
    limits = contrast(images)
    side = int(WIDTH_IN / ACROSS * DPI)
    down = -(-len(views) // ACROSS)
    figure = Figure(figsize=(WIDTH_IN, WIDTH_IN / ACROSS * down))
    figure.get_layout_engine().set(w_pad=0.012, h_pad=0.012, wspace=0.0, hspace=0.0)
    grid = figure.subplots(down, ACROSS, squeeze=False).ravel()
    for axes in grid[len(views) :]:
        axes.set_axis_off()
    for axes, view in zip(grid, views, strict=False):
        rows, columns = middle(view.image.shape[1:], (side, side))
        piece = view.image[:, rows, columns]
        show(axes, composite(piece, limits), piece.shape[1:])
        caption(axes, piece.shape[1:], view.caption, 8)

    grid[0].add_patch(Rectangle((0, 0), 1, 1, transform=grid[0].transAxes, fill=False, edgecolor="#E69F00", linewidth=5))
    scale_bar(grid[0], middle_shape(images[0], side), pixel_size_um)
    colours = ", ".join(f"{channel} {colour}" for channel, colour in zip(channels, LIGHTS, strict=False))
    reading = (
        f"The framed field is {treatment}, the others its nearest treatments by cosine of their profiles, the nearest first; the middle of a field, pixel by pixel"
        + (f" ({colours})" if len(channels) > 1 else "")
        + ": do the cells look alike?"
    )
    return Picture(f"neighbours_{safe_name(treatment)}", _title(treatment, moa, found), reading, figure, photographic=True)


def middle_shape(image: np.ndarray, side: int) -> tuple[int, int]:
    """Return rows and columns of the middle of `image` that `neighbours_picture` shows."""
    return min(image.shape[1], side), min(image.shape[2], side)


def _title(treatment: str, moa: str | None, found: pd.DataFrame) -> str:
    if found.empty:
        return f"{treatment} has no treatment of another compound to be compared with"
    first = found.iloc[0]
    text = f"{treatment} is nearest to {first['Treatment']} (cosine {first['Cosine']:.2f})"
    if moa is None:
        known = found["MoA"].dropna()
        return text + (
            f"; {int((known == known.mode().iloc[0]).sum())} of its {len(found)} nearest are {known.mode().iloc[0]}"
            if len(known)
            else "; no neighbour's mechanism is known"
        )
    same = int((found["MoA"] == moa).sum())
    whose = "of the same mechanism" if first["MoA"] == moa else f"not of its own mechanism but {first['MoA'] or 'of an unknown one'}"
    return f"{text}, {whose}; {same} of its {len(found)} nearest share {moa}"
