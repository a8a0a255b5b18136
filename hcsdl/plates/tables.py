"""The CSV files of a screen → the columns of the index, checked.

In: a folder with `*_image.csv`, `*_moa.csv`, `*_compound.csv` (plain or `.gz`). Out: the index table as the files have it, its
channels, and notes on what was assumed. Promised: what cannot be read as it must is a `DataError` naming file, column and row.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from hcsdl.config import DataError

CONTROL_MOA = "DMSO"  # the class of the negative control, whatever the compound is called
UNKNOWN = "unknown"  # a compound or MoA of this name (any case) is no class: BBBC021 has 64 such fields
KEYS = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
SITE = r"_s(\d+)(?=_|\.|$)"  # the site in BBBC021's file names, as in `G10_s1_w1BEDC….tif`


def find_csv(root: Path, kind: str) -> Path | None:
    """Return the file in `root` whose name ends in `_<kind>.csv` or `_<kind>.csv.gz` in any case; None if there is none.

    Raises
    ------
    DataError : there are two.
    """
    endings = (f"_{kind}.csv", f"_{kind}.csv.gz")
    found = sorted(path for path in root.iterdir() if path.name.lower().endswith(endings) and path.is_file())
    if len(found) > 1:
        raise DataError(
            f"plates.root must hold one file named *_{kind}.csv or *_{kind}.csv.gz: {root} has {len(found)}, "
            f"{', '.join(path.name for path in found)}. Move all but one elsewhere."
        )
    return found[0] if found else None


def read_table(root: Path, *, control: str, moa: bool) -> tuple[pd.DataFrame, tuple[str, ...], list[str]]:
    """Read the CSV files of a screen.

    Parameters
    ----------
    root : folder with the files.
    control : compound name of the negative control.
    moa : whether to open the MoA file.

    Returns
    -------
    The table of `hcsdl.plates.index.Index`, paths as in the CSV; the channel names; sentences on what was assumed, with counts.

    Raises
    ------
    DataError : a file or column is missing, a value cannot be read, a field or an image occurs twice.
    """
    path = find_csv(root, "image")
    if path is None:
        raise DataError(f"plates.root must hold the list of images, *_image.csv or *_image.csv.gz. Found none in {root}.")
    raw = _read_csv(path)
    notes: list[str] = []
    channels = tuple(column.removeprefix("Image_FileName_") for column in raw if column.startswith("Image_FileName_"))
    table = _metadata(raw, path, channels, notes)
    _refuse_duplicates(table, channels, path)
    is_control = table["Metadata_Compound"] == control
    doses = table["Metadata_Concentration"].map("{:g}".format)
    table["Metadata_Treatment"] = table["Metadata_Compound"].where(is_control, table["Metadata_Compound"] + " " + doses)
    table["Metadata_MoA"] = None
    if not is_control.any():
        notes.append(f"No field has the control compound {control!r} (plates.control): training needs data.intensity=none then.")
    elif bare := table["Metadata_Plate"].nunique() - table.loc[is_control, "Metadata_Plate"].nunique():
        notes.append(f"{bare} plates have no wells of the control compound {control!r}: their intensities are scaled as the others' are.")
    if unknown := int((table["Metadata_Compound"].str.lower() == UNKNOWN).sum()):
        notes.append(f"{unknown} fields have a compound called UNKNOWN: they have no label for any target.")
    if moa:
        table["Metadata_MoA"] = _mechanisms(table, root, is_control, notes)
    if (smiles := find_csv(root, "compound")) is not None:
        table["Metadata_SMILES"] = _smiles(table, smiles, notes)
    ordered = [column for column in table if column.startswith("Metadata_")] + [f"Path_{channel}" for channel in channels]
    return table[ordered].sort_values(KEYS, kind="stable", ignore_index=True), channels, notes


def _read_csv(path: Path) -> pd.DataFrame:
    """Return a CSV file as text, every cell stripped; an empty cell is an empty text."""
    try:
        raw = pd.read_csv(
            path,
            dtype=str,
            index_col=False,
            keep_default_na=False,
            skipinitialspace=True,
            compression="gzip" if path.name.lower().endswith(".gz") else None,
        )
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pandas' parser errors and Unicode errors are ValueErrors
        raise DataError(f"A list must be a CSV file in UTF-8: {path} cannot be read ({' '.join(str(error).split())}).") from error
    raw.columns = raw.columns.str.strip()
    if raw.empty:
        raise DataError(f"A list must have at least one row below its column names: {path} has none.")
    return raw.apply(lambda column: column.astype(str).str.strip())


def _column(raw: pd.DataFrame, path: Path, *names: str) -> pd.Series:
    """Return the first of the columns `names` that exists; a row whose cell is empty is an error."""
    present = [name for name in names if name in raw]
    if not present:
        raise DataError(f"{path} must have a column {' or '.join(names)}. Its columns are {', '.join(raw.columns)}.")
    column = raw[present[0]]
    if (column == "").any():
        raise DataError(f"Every row of {path} must have a {present[0]}. {_rows(column == '')} no value.")
    return column


def _numbers(raw: pd.DataFrame, path: Path, name: str) -> pd.Series:
    column = _column(raw, path, name)
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise DataError(f"{name} in {path} must be a number. {_rows(bad)} {column[bad].iloc[0]!r}.")
    return numbers


def _rows(bad: pd.Series) -> str:
    """Return "Line 7 has" or "3 lines, the first is 7, have", counting the line of column names as 1."""
    first = int(np.flatnonzero(bad)[0]) + 2
    return f"Line {first} has" if bad.sum() == 1 else f"{int(bad.sum())} lines, the first is {first}, have"


def _metadata(raw: pd.DataFrame, path: Path, channels: tuple[str, ...], notes: list[str]) -> pd.DataFrame:
    """Return the columns that the image list alone decides."""
    if not channels:
        raise DataError(f"{path} must have a column Image_FileName_<channel> for every channel. Its columns are {', '.join(raw.columns)}.")
    table = pd.DataFrame(index=raw.index)
    for word in ("Plate", "Well"):
        names = [f"Image_Metadata_{word}", *(f"Image_Metadata_{word}_{channel}" for channel in channels)]
        table[f"Metadata_{word}"] = _column(raw, path, *names)
    table["Metadata_Batch"] = table["Metadata_Plate"].str.split("_").str[0].astype(str)
    table["Metadata_Compound"] = _column(raw, path, "Image_Metadata_Compound")
    table["Metadata_Concentration"] = _numbers(raw, path, "Image_Metadata_Concentration")
    table["Metadata_Replicate"] = 1
    if "Replicate" in raw:
        table["Metadata_Replicate"] = _whole(raw, path, "Replicate")
    else:
        notes.append(f"{path.name} has no column Replicate: 1 is assumed for all {len(raw)} fields.")
    for channel in channels:
        folder = _column(raw, path, f"Image_PathName_{channel}").str.replace("\\", "/").str.strip("/")
        table[f"Path_{channel}"] = folder + "/" + _column(raw, path, f"Image_FileName_{channel}")
    table.insert(2, "Metadata_Site", _sites(raw, path, table, channels[0]))
    return table


def _whole(raw: pd.DataFrame, path: Path, name: str) -> pd.Series:
    """Return a column of whole numbers as int64."""
    values = _numbers(raw, path, name)
    wrong = (values % 1 != 0) | (values.abs() > 2**31)
    if wrong.any():
        raise DataError(f"{name} of {path} must be whole numbers. {_rows(wrong)} {values[wrong].iloc[0]:g}.")
    return values.astype("int64")


def _sites(raw: pd.DataFrame, path: Path, table: pd.DataFrame, channel: str) -> pd.Series:
    """Return the number of each field within its well: from a column, or else from the file name."""
    for name in ("Image_Metadata_Site", f"Image_Metadata_Site_{channel}"):
        if name in raw:
            return _whole(raw, path, name)
    sites = table[f"Path_{channel}"].str.extract(SITE, expand=False)
    if sites.isna().any():
        raise DataError(
            f"{path} must have a column Image_Metadata_Site, or file names with `_s<number>_` as `G10_s1_w1.tif`. "
            f"{_rows(sites.isna())} {table.loc[sites.isna(), f'Path_{channel}'].iloc[0]!r}."
        )
    return sites.astype(int)


def _refuse_duplicates(table: pd.DataFrame, channels: tuple[str, ...], path: Path) -> None:
    again = table.duplicated(KEYS)
    if again.any():
        plate, well, site = table.loc[again, KEYS].iloc[0]
        raise DataError(
            f"A field must stand once in {path}. {_rows(again)} a plate, well and site that stand above, "
            f"such as {plate}/{well}/{site}: remove one, or correct its site."
        )
    images = table[[f"Path_{channel}" for channel in channels]].stack().str.lower()
    if images.duplicated().any():
        line, column = images.index[images.duplicated()][0]
        raise DataError(
            f"An image must belong to one field and one channel. {path} names {table.at[line, column]} more than once, "
            f"again in line {line + 2}: correct the file name."
        )


def _pairs(compounds: pd.Series, concentrations: pd.Series) -> pd.Series:
    """Return texts that are equal where compound and concentration are; six digits, so that 0.3 and 0.30000001 are one."""
    return compounds + "\n" + concentrations.map("{:g}".format)


def _mechanisms(table: pd.DataFrame, root: Path, is_control: pd.Series, notes: list[str]) -> pd.Series:
    """Return the MoA of every field, None where there is none, by compound and concentration."""
    path = find_csv(root, "moa")
    if path is None:
        raise DataError(
            f"plates.root must hold *_moa.csv or *_moa.csv.gz (compound, concentration, moa) where MoAs are needed. "
            f"Found none in {root}: add it, or learn another target, such as training.target=Compound."
        )
    raw = _read_csv(path)
    raw.columns = raw.columns.str.lower()
    compounds, labels = _column(raw, path, "compound"), _column(raw, path, "moa")
    keys = _pairs(compounds, _numbers(raw, path, "concentration"))
    labels = labels.where(labels.str.lower() != UNKNOWN, None)
    known = pd.DataFrame({"key": keys, "moa": labels}).drop_duplicates()
    again = known["key"].duplicated()
    if again.any():
        pair = known.loc[again, "key"].iloc[0].replace("\n", " at ")
        raise DataError(f"A treatment must have one MoA. {path} has two for {pair}: {_both(known, again)}. Remove one.")
    fields = _pairs(table["Metadata_Compound"], table["Metadata_Concentration"])
    found = fields.map(dict(zip(known["key"], known["moa"], strict=True))).astype(object)
    found = found.where(found.notna(), None)
    strangers = ~known["key"].isin(set(fields))
    treated = known["moa"] != CONTROL_MOA
    if treated.any() and strangers[treated].all():
        raise DataError(
            f"Some treatment of {path} must occur in the images. None of its {len(known)} does (the first is "
            f"{known['key'].iloc[0].replace(chr(10), ' at ')}): check names and the concentrations' unit."
        )
    if strangers.any():
        names = [key.replace("\n", " at ") for key in known.loc[strangers, "key"]]
        notes.append(f"{path.name} has {len(names)} treatments that no field has: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}.")
    found[is_control] = CONTROL_MOA
    bare = int(found.isna().sum())
    if 0 < bare < len(table):
        notes.append(f"{bare} of {len(table)} fields have no MoA: they are not used where the MoA is learnt.")
    return found


def _both(known: pd.DataFrame, again: pd.Series) -> str:
    key = known.loc[again, "key"].iloc[0]
    return " and ".join(repr(label) for label in known.loc[known["key"] == key, "moa"])


def _smiles(table: pd.DataFrame, path: Path, notes: list[str]) -> pd.Series:
    """Return the SMILES text of every field's compound, None where the compound list has none."""
    raw = _read_csv(path)
    raw.columns = raw.columns.str.lower()
    if "smiles" not in raw:
        raise DataError(f"{path} must have a column smiles. Its columns are {', '.join(raw.columns)}.")
    known = dict(zip(_column(raw, path, "compound"), raw["smiles"], strict=True))
    found = table["Metadata_Compound"].map(known).astype(object)
    found = found.where(found.notna() & (found != ""), None)
    bare = int(found.isna().sum())
    if 0 < bare < len(table):
        notes.append(f"{bare} of {len(table)} fields have no SMILES in {path.name}.")
    return found
