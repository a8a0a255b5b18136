"""The part of `hcsdl report` that looks at images: contact sheets of the best and worst predicted fields, and what the network saw in them.

In: a run, a profile table, the plates. Out: a `Section`. Promised: torch is imported only where there is a network to ask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from hcsdl.config import DataError, PlatesConfig
from hcsdl.data.preprocessing import Preprocessing, load_preprocessing, set_aside
from hcsdl.plates.index import Index, load_index, read_index
from hcsdl.plates.tables import find_csv
from hcsdl.profiles.predictions import find_target
from hcsdl.profiles.tables import ProfileTable
from hcsdl.report.attention import attention_picture
from hcsdl.report.fields import FieldView, best_and_worst, predicted_fields, prediction_pictures, read_fields
from hcsdl.report.page import Section
from hcsdl.report.picture import Picture
from hcsdl.report.records import RunRecord
from hcsdl.training.embeddings import read_about

NO_TABLE = "No table of fields with Prob_* columns was given. `hcsdl embed checkpoint=<run folder>` makes one in the run folder."
MOST_ATTENTION = 4  # fields whose attention is shown; a guess


def fields_section(
    table: ProfileTable | None,
    run: RunRecord | None,
    plates: Callable[[], Index],
    shown: Callable[[], Preprocessing | None],
    number: int,
) -> Section:
    """Return sheets of the `number` best and worst fields held out, and the network's attention on the first of them.

    Parameters
    ----------
    plates : returns the index of the plates, or raises DataError where they are not there.
    shown : `find_preprocessing`, of the run and the table.
    """
    section = Section("fields", "Fields of view, at full resolution")
    if not number:
        section.missing.append("Not asked for: `report.fields=4` shows four of the best and four of the worst.")
        return section
    if table is None or table.probabilities is None or "Metadata_Site" not in table.rows:
        section.missing.append(NO_TABLE)
        return section
    try:
        target = find_target(table.rows, list(table.probabilities.columns), None)
        index = plates()
        held_out = "Metadata_Split" in table.rows and (table.rows["Metadata_Split"] == "val").any()
        predicted = predicted_fields(table.rows, table.probabilities, target, split="val" if held_out else None)
        best, worst = best_and_worst(predicted, number)
        preprocessing = shown()
        images = read_fields(index, pd.concat([best, worst], ignore_index=True), preprocessing)
    except DataError as error:
        section.missing.append(f"{error} `report.plates=<folder>` says where the plates are.")
        return section
    pixel_size = run.config["plates"]["pixel_size_um"] if run is not None else None
    section.intro = (
        "Fields that the network was not trained on, whole." if held_out else "All fields of the table: which were held out is not known."
    )
    section.pictures += prediction_pictures(best, worst, images, index.channels, pixel_size_um=pixel_size, scaled=preprocessing is not None)
    if preprocessing is None:
        section.missing.append("Where in a field the network looks (Grad-CAM) takes a network: give its folder as `run=<run folder>`.")
        return section
    try:
        section.pictures.append(_attention(run, index, best, worst, preprocessing, pixel_size))
    except DataError as error:
        section.missing.append(f"Where in a field the network looks (Grad-CAM) is left out. {error}")
    return section


def find_preprocessing(run: RunRecord | None, profiles: Path | None) -> Preprocessing | None:
    """Return what makes fields comparable that were stained and lit apart: the run's own scaling, of whole fields at full resolution; None without a run.

    Plates that are not the run's, whatever their names, are scaled by the values of all its plates together. Raises DataError at a broken file.
    """
    if run is None:
        return None
    try:
        fitted = load_preprocessing(run.path / "preprocessing.npz")
    except Exception as error:  # numpy and zipfile have many
        raise DataError(f"A run folder must hold its preprocessing.npz to show fields. {run.path} has none that can be read.") from error
    about = (read_about(profiles) if profiles is not None else None) or {}
    return replace(set_aside(fitted, about.get("new_plates", [])), crop_px=None, downsample=1)


def find_plates(run: RunRecord | None, profiles: Path | None, plates: str | None) -> Index:
    """Return the index of the plates a table was made of. Raises DataError where they are not known or not there."""
    about = read_about(profiles) if profiles is not None else None
    known = plates or (about or {}).get("plates_root")
    index = load_index(run.path) if run is not None else None
    if index is not None and (known is None or Path(known).resolve() == index.root.resolve()):
        return index
    if known is None:
        raise DataError("The plates must be known to show fields of them. The table tells nothing of them, and no run was given.")
    root = Path(known)
    if not root.is_dir():
        raise DataError(f"The plates must be there to show fields of them. {root} is no folder.")
    return read_index(PlatesConfig(root=str(root)), moa=find_csv(root, "moa") is not None)


def _attention(
    run: RunRecord, index: Index, best: pd.DataFrame, worst: pd.DataFrame, shown: Preprocessing, pixel_size_um: float | None
) -> Picture:
    """Return the attention on some of the worst and best fields, each as far as the network sees it, at full resolution. Raises DataError."""
    import torch

    from hcsdl.training.attention import grad_cam
    from hcsdl.training.load import load_run

    network = load_run(run.path)
    few = min(MOST_ATTENTION // 2, len(worst))
    many = min(MOST_ATTENTION - few, len(best))
    rows = pd.concat([worst.head(few), best.head(many)], ignore_index=True)
    images = read_fields(index, rows, replace(shown, crop_px=network.preprocessing.crop_px))
    prepared = read_fields(index, rows, replace(shown, crop_px=network.preprocessing.crop_px, downsample=network.preprocessing.downsample))
    views = []
    for row, image, one in zip(rows.itertuples(), images, prepared, strict=True):
        heat, probabilities = grad_cam(network.model, torch.from_numpy(one)[None])
        said = int(probabilities[0].argmax())
        text = f"{row.Metadata_Plate} {row.Metadata_Well} site {row.Metadata_Site}\n{row.Label}\nsays {network.classes[said]} {probabilities[0, said]:.2f}"
        views.append(FieldView(image, text, heat[0]))
    return attention_picture(views, pixel_size_um=pixel_size_um)
