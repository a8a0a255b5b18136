"""The part of `hcsdl report` that looks at profiles: wells as maps and on their plates, and one compound closely.

In: a profile table. Out: `Section`s. Promised: wells are normalised as they were for the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hcsdl.config import ConfigError, DataError, ScoreConfig
from hcsdl.data.preprocessing import Preprocessing
from hcsdl.plates.index import Index
from hcsdl.profiles.normalise import normalise, usable_features
from hcsdl.profiles.predictions import find_target
from hcsdl.profiles.tables import Profiles, ProfileTable, read_profiles
from hcsdl.report.answer import Evidence, rank_compounds
from hcsdl.report.candidates import candidates
from hcsdl.report.dose import dose_picture
from hcsdl.report.fields import predicted_fields, read_fields
from hcsdl.report.maps import map_pictures
from hcsdl.report.neighbours import example_rows, nearest_treatments, neighbours_picture
from hcsdl.report.page import Section, Table
from hcsdl.report.plates import plate_picture
from hcsdl.report.records import RunRecord, ScoreRecord
from hcsdl.report.sections import compound_table

NO_PROFILES = "No profile table was given. `hcsdl embed checkpoint=<run folder>` makes one in the run folder."
MOST_CANDIDATES = 10


@dataclass(frozen=True)
class Screen:
    """A profile table as a report takes it: `table` as read, `wells` normalised by `pipeline`, the name of the `control`."""

    table: ProfileTable
    wells: Profiles
    pipeline: tuple[str, ...]
    control: str


def read_screen(path: Path, scores: Sequence[ScoreRecord]) -> Screen:
    """Return the table at `path`, normalised as it was scored; without scores, by the usual pipeline. Raises DataError."""
    settings = {**vars(ScoreConfig()), **(scores[0].data["settings"] if scores else {})}
    table = read_profiles(path, control=settings["control"])
    wells, _ = usable_features(table.wells)
    pipeline = tuple(settings["pipeline"])
    try:
        wells = normalise(wells, pipeline, control=settings["control"], regularisation=settings["regularisation"])
    except DataError as error:
        if scores:
            raise
        raise DataError(
            f"{error} A report takes the pipeline of its scores: `hcsdl score profiles={path}` with one that fits, then give its folder as scores=."
        ) from error
    return Screen(table, wells, pipeline, settings["control"])


def wells_section(screen: Screen | None, columns: Sequence[str]) -> Section:
    """Return maps of the wells, and `columns` of the table on the plates (none given: those that tell most).

    Raises
    ------
    ConfigError : a column the table does not have.
    """
    section = Section("wells", "Wells: maps and plates")
    if screen is None:
        section.missing.append(NO_PROFILES)
        return section
    section.intro = f"{len(screen.wells)} wells, their profiles normalised by {' + '.join(screen.pipeline) or 'nothing'}; plates show values as measured."
    section.pictures += map_pictures(screen.wells, control=screen.control)
    try:
        for column in columns or telling_columns(screen.table):
            section.pictures.append(plate_picture(table_with(screen.table, column), column, control=screen.control))
    except DataError as error:  # wells whose names are no places on a plate
        section.missing.append(f"Plates are not drawn. {error}")
    return section


def telling_columns(table: ProfileTable) -> list[str]:
    """Return the columns drawn by default: nucleus count, and of the mean intensities the one that differs most between plates."""
    if table.simple is None:
        return []
    names = list(table.simple.names)
    plates = table.simple.meta["Metadata_Plate"]
    means = pd.DataFrame(table.simple.values, columns=names)[[n for n in names if n.startswith("Intensity_Mean")]]
    shares = means.groupby(plates).transform("mean").var() / means.var().replace(0, np.nan)
    return [*(["Count_Nuclei"] if "Count_Nuclei" in names else []), *([shares.idxmax()] if shares.notna().any() else [])]


def table_with(table: ProfileTable, column: str) -> pd.DataFrame:
    """Return a table of fields or wells that has `column`, whichever part of the profile table it stands in. Raises ConfigError."""
    rows = table.rows if table.probabilities is None else pd.concat([table.rows, table.probabilities.add_prefix("Prob_")], axis=1)
    if column in rows:
        return rows
    for part in filter(None, (table.simple, table.wells)):
        if column in part.names:
            return part.meta.assign(**{column: part.values[:, part.names.index(column)]})
    some = [*rows.columns, *(table.simple.names if table.simple else ())]
    raise ConfigError(f"report.columns must be columns of the profile table. It has no {column!r}; it has {', '.join(some[:20])} ….")


def choose_compound(screen: Screen | None, evidence: Evidence | None, wanted: str | None) -> tuple[str, str | None] | None:
    """Return the compound to look at closely and which of its treatments (None: its strongest): `wanted`; else the one most worth a look; None where unknown.

    Raises
    ------
    ConfigError : the table has no such compound.
    """
    if screen is None:
        return None
    names = set(screen.wells.meta["Metadata_Compound"])
    if wanted is not None and wanted not in names:
        raise ConfigError(
            f"report.compound must be one of the table's compounds. Got {wanted!r} instead; there are {', '.join(sorted(names)[:12])} …."
        )
    if evidence is not None:
        ranked = rank_compounds(evidence)
        mine = ranked[ranked["compound"] == wanted] if wanted is not None else ranked[ranked["compound"].isin(names)]
        if len(mine):
            return mine["compound"].iloc[0], mine["treatment"].iloc[0]
    if wanted is None and (predicted := _predicted(screen)) is not None:
        treated = predicted[predicted["Metadata_Compound"] != screen.control]
        if len(treated):
            return treated.groupby("Metadata_Compound")["Label_Probability"].mean().idxmin(), None
    return (wanted, None) if wanted is not None else None


def _predicted(screen: Screen) -> pd.DataFrame | None:
    table = screen.table
    if table.probabilities is None:
        return None
    try:
        return predicted_fields(
            table.rows, table.probabilities, find_target(table.rows, list(table.probabilities.columns), None), split=None
        )
    except DataError:  # no row has any of the classes
        return None


def compounds_section(
    screen: Screen | None,
    evidence: Evidence | None,
    chosen: tuple[str, str | None] | None,
    run: RunRecord | None,
    plates: Callable[[], Index],
    shown: Callable[[], Preprocessing | None],
) -> Section:
    """Return the ranking of compounds, those of unknown mechanism, and one compound closely: dose response, nearest treatments, their fields.

    Parameters
    ----------
    chosen : of `choose_compound`.
    plates : returns the index of the plates, or raises DataError where they are not there.
    shown : returns how fields are scaled to be shown, None: not; or raises DataError.
    """
    section = Section("compounds", "Compounds: which to look at next")
    if evidence is not None:
        section.tables.append(compound_table(evidence))
    if screen is None:
        section.missing.append(NO_PROFILES)
        return section
    replicates = evidence.replicates if evidence is not None else pd.DataFrame()
    if len(found := candidates(screen.wells, replicates, screen.control)):
        section.tables.append(candidate_table(found))
    if chosen is None:
        section.missing.append("No compound is looked at closely: `report.compound=<name>` chooses one.")
        return section
    compound, treatment = chosen
    section.intro = f"Looked at closely: {compound}. `report.compound=<name>` chooses another."
    table = screen.table
    if table.probabilities is None:
        section.missing.append(f"The dose response of {compound} takes Prob_* columns, as `hcsdl embed` writes them.")
    else:
        try:
            target = find_target(table.rows, list(table.probabilities.columns), None)
            section.pictures.append(dose_picture(table.rows, table.probabilities, compound, target=target, control=screen.control))
        except (ConfigError, DataError) as error:
            section.missing.append(f"The dose response of {compound} is left out. {error}")
    name, nearest = nearest_treatments(screen.wells, compound, control=screen.control, treatment=treatment)
    section.tables.append(neighbour_table(name, nearest))
    if "Metadata_Site" not in table.rows:
        return section
    try:
        examples = example_rows(table.rows, [name, *nearest["Treatment"]])
        index = plates()
        images = read_fields(index, examples, shown())
        moa = examples["Metadata_MoA"].iloc[0] if "Metadata_MoA" in examples else None
        pixel_size = run.config["plates"]["pixel_size_um"] if run is not None else None
        section.pictures.append(neighbours_picture(name, moa, nearest, images, index.channels, pixel_size_um=pixel_size))
    except DataError as error:
        section.missing.append(
            f"Fields of {name} and its neighbours are left out. {error} `report.plates=<folder>` says where the plates are."
        )
    return section


def candidate_table(found: pd.DataFrame) -> Table:
    """Return compounds of unknown mechanism by what they look like; `found` is of `candidates`."""
    rows = [
        [r.compound, r.treatment, str(r.wells), r.looks_like, f"{r.nearest} ({r.cosine:.2f})"]
        for r in found.head(MOST_CANDIDATES).itertuples()
    ]
    heads = ["compound", "its treatment", "wells", "looks like", "nearest treatment (cosine)"]
    return Table(f"Compounds of unknown mechanism: of {len(found)} the {len(rows)} most like a known one", heads, rows)


def neighbour_table(treatment: str, nearest: pd.DataFrame) -> Table:
    """Return the nearest treatments of other compounds; `nearest` is of `nearest_treatments`."""
    rows = [[r.Treatment, r.MoA or "unknown", f"{r.Cosine:.2f}", r.Batches or "unknown", str(r.Wells)] for r in nearest.itertuples()]
    return Table(f"Nearest to {treatment}, own compound left out", ["treatment", "mechanism", "cosine", "batch", "wells"], rows)
