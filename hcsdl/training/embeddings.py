"""What a network says of every field → the table that leaves the program, and the folder where it stands until it is whole. No torch.

In: an index with measurements, and arrays, a row per field. Out: a table with Cytomining's `Metadata_*` columns, `Embedding_0000` …, `Prob_<class>`,
`Intensity_*` and `Count_Nuclei`, as a parquet file whose schema metadata tells under the key `hcsdl`, as JSON, where it comes from. Promised: the same
arrays give the same bytes; a file is whole or not there.

    <table>.work/    config.yaml, plan.json, index.parquet, preprocessing.npz, lock and logs/ as in a run folder
                     checkpoint.pt   the one that was asked for, kept though the run may drop it
                     parts/          what is computed so far
                     ran_on.json     kernels, threads and processor it was begun with
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import softmax

from hcsdl.config import DataError
from hcsdl.plates.tables import KEYS
from hcsdl.training.run_folder import RunFolder, write_atomically

SCHEMA_VERSION = 1
ABOUT = b"hcsdl"  # key of the parquet metadata
SIMPLE = ("Intensity_", "Count_")


class WorkFolder(RunFolder):
    """The folder beside a table in the making: locked as a run folder is, gone when the table is written."""

    kind, setting = "folder of an embedding", "embed.output"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.checkpoint, self.parts, self.ran_on = self.path / "checkpoint.pt", self.path / "parts", self.path / "ran_on.json"
        self.folders = (self.parts, self.logs)

    def last_saved(self) -> int:
        """Return how many parts are on disk."""
        return len(self._parts())

    def load(self) -> list[dict[str, np.ndarray]]:
        """Return the parts that were saved, each `rows` int64 (n,), `embedding` float32 (n, F) and `logits` float32 (n, K)."""
        found = []
        for path in self._parts():
            with np.load(path, allow_pickle=False) as stored:
                found.append(dict(stored))
        return found

    def save(self, **arrays: np.ndarray) -> None:
        """Write one more part. Raises ConfigError where another command has taken the folder over, OSError."""
        self.check_newest()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomically(self.parts / f"{self.last_saved():06d}.npz", buffer.getvalue())

    def remove(self) -> None:
        """Remove the folder with all that is in it, as far as that can be done."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _parts(self) -> list[Path]:
        return sorted(self.parts.glob("[0-9]*.npz"))


def field_table(fields: pd.DataFrame, embedding: np.ndarray, logits: np.ndarray, classes: list[str]) -> pd.DataFrame:
    """Return the table of fields.

    Parameters
    ----------
    fields : (N, …) rows of an index: `Metadata_*`, `Intensity_*` and `Count_*` are taken over, in this order.
    embedding : (N, F) float32.
    logits : (N, K) float32; their softmax is `Prob_<class>`.
    classes : K names; none where the classes mean nothing, as of random weights.
    """
    meta = fields[[c for c in fields if c.startswith("Metadata_")]].reset_index(drop=True)
    simple = fields[[c for c in fields if c.startswith(SIMPLE)]].reset_index(drop=True)
    learned = pd.DataFrame(embedding, columns=[f"Embedding_{number:04d}" for number in range(embedding.shape[1])])
    probabilities = softmax(logits.astype(np.float64), axis=1).astype(np.float32)[:, : len(classes)]
    return pd.concat([meta, learned, pd.DataFrame(probabilities, columns=[f"Prob_{name}" for name in classes]), simple], axis=1)


def well_table(fields: pd.DataFrame, embedding: np.ndarray, logits: np.ndarray, classes: list[str]) -> pd.DataFrame:
    """Return the table of wells: means of their fields (of logits, before the softmax), `Metadata_Site_Count` instead of `Metadata_Site`.

    A well of which any field was trained on is "train". Parameters as of `field_table`, the fields of a well one after the other.
    """
    wells = fields.groupby(KEYS[:2], sort=False).ngroup().to_numpy()
    count = np.bincount(wells)
    first = np.flatnonzero(np.diff(wells, prepend=-1))
    meta = fields.iloc[first].copy()
    meta.insert(list(meta).index("Metadata_Site"), "Metadata_Site_Count", count)
    trained = np.bincount(wells, fields["Metadata_Split"] == "train") > 0
    meta["Metadata_Split"] = np.where(trained, "train", meta["Metadata_Split"].to_numpy(dtype=object))
    simple = [c for c in fields if c.startswith(SIMPLE)]
    meta[simple] = _means(fields[simple].to_numpy(), first, count)
    return field_table(meta.drop(columns="Metadata_Site"), _means(embedding, first, count), _means(logits, first, count), classes)


def _means(values: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the means of groups of rows (their `first` and `count`) in the type of `values` (N, F), summed in float64."""
    return (np.add.reduceat(values, first, axis=0, dtype=np.float64) / count[:, None]).astype(values.dtype)


def write_table(table: pd.DataFrame, about: dict, path: Path) -> None:
    """Write `table` as parquet with `about` (plain values) in its metadata. Raises OSError, and then leaves what was there before."""
    columns = pa.Table.from_pandas(table, preserve_index=False)
    text = json.dumps({"schema_version": SCHEMA_VERSION} | about, ensure_ascii=False)
    buffer = io.BytesIO()
    columns = columns.replace_schema_metadata(columns.schema.metadata | {ABOUT: text.encode()})
    pq.write_table(columns, buffer, write_page_checksum=True)  # so that `hcsdl score` notices bytes that a disk or a copy has changed
    write_atomically(path, buffer.getvalue())


def read_about(path: Path) -> dict | None:
    """Return what `write_table` was told about a table; None where it is no parquet file or none of ours. Reads the file's end only.

    Raises
    ------
    DataError : it is ours, of another schema version.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    if ABOUT not in metadata:
        return None
    about = json.loads(metadata[ABOUT])
    if about["schema_version"] != SCHEMA_VERSION:
        raise DataError(
            f"A table of embeddings must have schema version {SCHEMA_VERSION}. {path} has {about['schema_version']}: embed anew."
        )
    return about
