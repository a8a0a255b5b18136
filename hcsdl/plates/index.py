"""Folders and CSV files in BBBC021's layout → one index table, a row per field of view.

In: `ScreenConfig`, whose root holds `*_image.csv`, `*_moa.csv` and (optional) `*_compound.csv`, plain or `.gz`, and the images.
Out: an `Index`: the table (`Metadata_*` and `Path_*` columns, sorted by plate, well and site), its channels, its content hash.
Promised: the same screen gives the same table and hash wherever and in whichever folder layout it lies; a field never occurs
twice; every image of an index read with `files=True` is on disk; nothing is dropped silently (`Index.notes`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from hcsdl.config import ConfigError, DataError, ScreenConfig
from hcsdl.plates.tables import KEYS, read_table

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class Index:
    """What was imaged, a row per field of view.

    Attributes
    ----------
    table : `Metadata_Plate, _Well, _Site` (int), `_Batch, _Compound, _Concentration` (float, the unit is the CSV's), `_MoA` (None where
        unknown), `_Treatment, _Replicate` (int), `Path_<channel>` (posix, relative to root); maybe `QC_*`. RangeIndex.
    channels : channel names, in the CSV's order.
    root : folder the paths are relative to.
    hash : first 16 hex digits of the SHA-256 of the metadata and the file names; folders and QC columns do not count.
    notes : sentences on what was dropped or assumed, with counts.
    """

    table: pd.DataFrame
    channels: tuple[str, ...]
    root: Path
    hash: str
    notes: tuple[str, ...] = ()

    def paths(self, row: int) -> list[Path]:
        """Return the image files of row `row`, one per channel."""
        return [self.root / self.table[f"Path_{channel}"].iat[row] for channel in self.channels]

    def field_name(self, row: int) -> str:
        """Return "plate/well/site" of row `row`, the name messages use."""
        return "/".join(str(self.table[key].iat[row]) for key in KEYS)

    def select(self, rows: pd.Series | np.ndarray | list[int]) -> Index:
        """Return the index of some rows: a boolean mask or row numbers, kept in the order given; the hash is new."""
        chosen = np.asarray(rows)
        picked = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(int)
        table = self.table.iloc[picked].reset_index(drop=True)
        return replace(self, table=table, hash=content_hash(table, self.channels))

    def save(self, folder: Path) -> Path:
        """Write `index.parquet` and `index.json` (hash, schema version, channels, root, notes) and return the former's path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "index.parquet"
        about = {
            "schema_version": SCHEMA_VERSION,
            "hash": self.hash,
            "channels": list(self.channels),
            "root": str(self.root.absolute()),
            "fields": len(self.table),
            "notes": list(self.notes),
        }
        _replace(path, lambda new: self.table.to_parquet(new, index=False))
        _replace(
            path.with_suffix(".json"), lambda new: new.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        )
        return path


def load_index(path: Path) -> Index:
    """Read what `Index.save` wrote; `path` is the parquet file or its folder.

    Raises
    ------
    DataError : a file is missing or unreadable, of another schema version, or the table does not have the hash that stands beside it.
    """
    path = Path(path)
    path = path / "index.parquet" if path.is_dir() else path
    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"An index must be a parquet file with a .json beside it: {path} cannot be read ({error}).") from error
    if about.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"An index must have schema version {SCHEMA_VERSION}: {path} has {about.get('schema_version')}. Write it anew.")
    table["Metadata_MoA"] = _with_none(table["Metadata_MoA"])
    index = Index(table, tuple(about["channels"]), Path(about["root"]), content_hash(table, about["channels"]), tuple(about["notes"]))
    if index.hash != about["hash"]:
        raise DataError(f"An index must have the hash beside it: {path} has {index.hash}, its .json {about['hash']}. Write it anew.")
    return index


def content_hash(table: pd.DataFrame, channels: tuple[str, ...]) -> str:
    """Return the first 16 hex digits of the SHA-256 of a table's `Metadata_*` columns, file names (lower case) and channel names."""
    content = table[sorted(column for column in table if column.startswith("Metadata_"))].copy()
    for channel in channels:
        content[f"Path_{channel}"] = table[f"Path_{channel}"].str.rsplit("/", n=1).str[-1].str.lower()
    return hashlib.sha256(content.to_csv(index=False, lineterminator="\n").encode()).hexdigest()[:16]


def read_index(config: ScreenConfig, *, moa: bool = True, files: bool = True) -> Index:
    """Read a screen.

    Parameters
    ----------
    config : `root`, `control` and `query` are used, `cache` where the query asks for QC columns.
    moa : False never opens the MoA file; `Metadata_MoA` is then None throughout.
    files : True finds every image on disk; False needs no image folder, and paths are as in the CSV.

    Raises
    ------
    ConfigError : plates.root is not given, or plates.query is no expression over the columns.
    DataError : a CSV file, a column or an image is missing, a field occurs twice, a value cannot be read, or no field is left.
    """
    root = root_folder(config)
    table, channels, notes = read_table(root, control=config.control, moa=moa)
    if config.query is not None:
        if not moa and "Metadata_MoA" in config.query:
            raise ConfigError(
                "plates.query must not ask for Metadata_MoA where no MoA is read, as with training.target=Compound. "
                f"Got {config.query!r} instead."
            )
        chosen = _queried(table, config)
        notes.append(f"plates.query keeps {int(chosen.sum())} of {len(table)} fields.")
        table = table[chosen].reset_index(drop=True)
    index = Index(table, channels, root, content_hash(table, channels), tuple(notes))
    if not files:
        return index
    index, missing = find_images(index)
    if missing.any():
        raise DataError(_missing_words(index, missing))
    return index


def root_folder(config: ScreenConfig) -> Path:
    """Return plates.root, which must be an existing folder."""
    if config.root is None:
        raise ConfigError("plates.root must be given: the folder with the CSV files and the images. Got null instead.")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(f"plates.root must be a folder with the CSV files and the images. Found none at {root}.")
    return root


def cache_folder(config: ScreenConfig) -> Path:
    """Return the folder for what is computed once: plates.cache, or `.hcsdl` in plates.root; it need not exist."""
    return Path(config.cache).expanduser() if config.cache is not None else root_folder(config) / ".hcsdl"


def find_images(index: Index) -> tuple[Index, np.ndarray]:
    """Find every image of an index on disk, ignoring the case of names, with one scan per folder.

    The CSV's folder `Week4/Week4_27481` is looked for under the root as it stands, then without its first part, and so on to the root
    itself. BBBC021's CSV says the first, its zip files unpack to the second.

    Returns
    -------
    The index with the paths on disk (the CSV's where there is none), and a mask (rows, channels), bool, True where an image is missing.
    """
    folders = _Folders(index.root)
    missing = np.zeros((len(index.table), len(index.channels)), bool)
    table = index.table.copy()
    for number, channel in enumerate(index.channels):
        found = [folders.find(path) for path in table[f"Path_{channel}"]]
        missing[:, number] = [path is None for path in found]
        table[f"Path_{channel}"] = [new or old for new, old in zip(found, table[f"Path_{channel}"], strict=True)]
    return replace(index, table=table), missing


class _Folders:
    """Folders under a root, each scanned at most once: lower-case name → name on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.listed: dict[str, dict[str, str]] = {}
        self.places: dict[str, list[str]] = {}

    def find(self, path: str) -> str | None:
        """Return the path on disk, relative to the root, of an image that the CSV calls `path`; None if there is none."""
        folder, _, name = path.rpartition("/")
        if folder not in self.places:
            parts = PurePosixPath(folder).parts
            tried = [self._walk(parts[start:]) for start in range(len(parts) + 1)]
            self.places[folder] = [place for place in tried if place is not None]
        for place in self.places[folder]:
            if (actual := self._list(place).get(name.lower())) is not None:
                return f"{place}/{actual}" if place else actual
        return None

    def _walk(self, parts: tuple[str, ...]) -> str | None:
        place = ""
        for part in parts:
            actual = self._list(place).get(part.lower())
            if actual is None:
                return None
            place = f"{place}/{actual}" if place else actual
        return place

    def _list(self, place: str) -> dict[str, str]:
        if place not in self.listed:
            try:
                with os.scandir(self.root / place) as entries:
                    self.listed[place] = {entry.name.lower(): entry.name for entry in sorted(entries, key=lambda entry: entry.name)}
            except NotADirectoryError:
                self.listed[place] = {}
            except OSError as error:
                raise DataError(f"The folder {self.root / place} must be readable. It is not: {error.strerror}.") from error
        return self.listed[place]


def _missing_words(index: Index, missing: np.ndarray) -> str:
    rows, numbers = np.nonzero(missing)
    first = [
        f"{index.field_name(row)} {index.channels[number]}: {index.table[f'Path_{index.channels[number]}'].iat[row]}"
        for row, number in zip(rows[:3], numbers[:3], strict=True)
    ]
    dots = "; …" if len(rows) > 3 else ""
    fields = int(missing.any(axis=1).sum())
    return (
        f"Every image in the list must be under plates.root, {index.root}, in its folder there or in that folder's last part: "
        f"missing are {len(rows)} of {missing.size} images, of {fields} of {len(missing)} fields ({'; '.join(first)}{dots}). "
        "Copy them there, or leave these fields out with data.on_bad_image=skip or plates.query; `hcsdl check` lists all."
    )


def _queried(table: pd.DataFrame, config: ScreenConfig) -> np.ndarray:
    """Return a mask (rows,), bool, of the fields that plates.query keeps."""
    query = str(config.query)
    if any(word in query for word in ("QC_", "Intensity_", "Count_")):
        table = _with_measurements(table, config)
    try:
        mask = table.eval(query, engine="python")
    except Exception as error:  # pandas raises what the expression raises
        names = ", ".join(column for column in table if column.startswith("Metadata_"))
        raise ConfigError(
            f"plates.query must be a pandas expression over the columns of the index ({names}, …). "
            f"Got {query!r}, which fails: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(mask, pd.Series) or not mask.dropna().isin([True, False]).all():
        raise ConfigError(f"plates.query must be true or false for every field. Got {query!r}, which is not.")
    mask = mask.astype(object).where(mask.notna(), False).astype(bool)  # what is asked of an unknown value is not so
    if not mask.any():
        raise DataError(f"plates.query must keep at least one field. {query!r} keeps none of {len(table)}: check names and spelling.")
    return mask.to_numpy()


def _with_measurements(table: pd.DataFrame, config: ScreenConfig) -> pd.DataFrame:
    """Return the table with the columns that `hcsdl check check.level=pixels` measured and left in the cache."""
    path = cache_folder(config) / "index.parquet"
    advice = f"plates.query={config.query!r} asks for measurements: run `hcsdl check check.level=pixels` on all fields first."
    if not path.is_file():
        raise DataError(f"{advice} There are none at {path}.")
    measured = load_index(path).table
    wanted = [column for column in measured if column not in table]
    joined = table.merge(measured[KEYS + wanted], on=KEYS, how="left", indicator=True)
    lacking = int((joined.pop("_merge") == "left_only").sum())
    if lacking:
        raise DataError(f"{advice} {path} lacks {lacking} of {len(table)} fields.")
    return joined


def _with_none(column: pd.Series) -> pd.Series:
    return column.astype(object).where(column.notna(), None)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    write(new)
    os.replace(new, path)
