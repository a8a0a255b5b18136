"""How good the network's own predictions are: accuracy, macro-F1 and calibration of fields and wells, and the merged folds of compounds.

In: the rows of profile tables and their `Prob_*`. Out: figures. Promised: plain functions; every row that is not scored is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hcsdl.config import ConfigError, DataError
from hcsdl.profiles.tables import WELL, is_scored

BINS = 15  # of the expected calibration error, as in Guo 2017
TARGETS = ("MoA", "Treatment", "Compound")


@dataclass(frozen=True)
class Predicted:
    """What was predicted of one kind of unit.

    Attributes
    ----------
    unit : "fields" or "wells".
    labels, predicted : (N,) class numbers.
    confidence : (N,) probability of the predicted class.
    compounds : (N,) names.
    """

    unit: str
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    compounds: np.ndarray

    @property
    def hit(self) -> np.ndarray:
        """Return 1.0 where the prediction is right, else 0.0 (N,)."""
        return (self.labels == self.predicted).astype(float)

    @property
    def macro_f1(self) -> float:
        """Return the mean F1 of the classes that occur among the labels."""
        f1 = []
        for label in np.unique(self.labels):
            true = np.sum((self.labels == label) & (self.predicted == label))
            f1.append(2 * true / (np.sum(self.labels == label) + np.sum(self.predicted == label)))
        return float(np.mean(f1))

    @property
    def calibration_error(self) -> float:
        """Return the expected calibration error (Guo 2017, arXiv:1706.04599): |accuracy − confidence| in 15 equal bins, weighted by their size."""
        bins = np.minimum((self.confidence * BINS).astype(int), BINS - 1)
        gaps = np.bincount(bins, weights=self.hit - self.confidence, minlength=BINS)
        return float(np.abs(gaps).sum() / len(bins))


def find_target(rows: pd.DataFrame, classes: Sequence[str], wanted: str | None) -> str:
    """Return the metadata column the classes are of: `wanted`, or that of MoA, Treatment and Compound in which most rows have one of the classes.

    Raises
    ------
    ConfigError : `wanted` is not in the table.
    DataError : no row has any of the classes.
    """
    columns = [f"Metadata_{(wanted or '').removeprefix('Metadata_')}"] if wanted else [f"Metadata_{name}" for name in TARGETS]
    if wanted and columns[0] not in rows:
        raise ConfigError(f"score.target must be a Metadata_* column of the table. Got {wanted!r} instead.")
    known = {column: int(rows[column].isin(list(classes)).sum()) for column in columns if column in rows}
    best = max(known, key=lambda column: known[column], default=None)
    if best is None or not known[best]:
        raise DataError(
            f"Prob_* columns must be named by classes of {' or '.join(columns)}. No row has any of the {len(classes)}, {classes[0]} the first."
        )
    return best


def predict(rows: pd.DataFrame, probabilities: pd.DataFrame, target: str) -> tuple[dict[str, Predicted], int]:
    """Return what was predicted of fields (where rows are fields) and of wells, and how many rows are left out: no class, or a probability missing.

    Parameters
    ----------
    rows : metadata (N, …).
    probabilities : (N, K), columns named by class.
    target : metadata column of the labels.
    """
    place = {name: number for number, name in enumerate(probabilities.columns)}
    labels = rows[target].map(place).to_numpy(dtype=float, na_value=np.nan)
    values = probabilities.to_numpy(dtype=np.float64)
    good = ~np.isnan(labels) & ~np.isnan(values).any(axis=1)
    if not good.any():
        return {}, len(rows)
    labels, values, rows = labels[good].astype(int), values[good], rows[good]
    found = {"fields": _predicted("fields", labels, values, rows["Metadata_Compound"])} if "Metadata_Site" in rows else {}
    _, first = np.unique(rows.groupby(WELL).ngroup().to_numpy(), return_index=True)
    joint = well_probabilities(rows, pd.DataFrame(values, columns=probabilities.columns))[1].to_numpy()
    found["wells"] = _predicted("wells", labels[first], joint, rows["Metadata_Compound"].iloc[first])
    return found, int((~good).sum())


def well_probabilities(rows: pd.DataFrame, probabilities: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the wells' metadata (W, …), those of each well's first row without its site, and their probabilities (W, K), sorted by plate and well.

    A well's probabilities are the geometric mean of its fields', scaled to sum 1: their logits' mean.

    Parameters
    ----------
    rows : metadata of fields or wells (N, …).
    probabilities : (N, K), without missing values.
    """
    wells = rows.groupby(WELL).ngroup().to_numpy()
    _, first = np.unique(wells, return_index=True)
    values = probabilities.to_numpy(dtype=np.float64)
    logs = np.zeros((len(first), values.shape[1]))
    np.add.at(logs, wells, np.log(np.maximum(values, 1e-30)))
    logs /= np.bincount(wells)[:, None]
    joint = np.exp(logs - logs.max(axis=1, keepdims=True))
    joint /= joint.sum(axis=1, keepdims=True)
    meta = rows.iloc[first].drop(columns="Metadata_Site", errors="ignore").reset_index(drop=True)
    return meta, pd.DataFrame(joint, columns=probabilities.columns)


def merge_folds(tables: Sequence[tuple[str, pd.DataFrame, pd.DataFrame]], control: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the held-out rows of all folds of `compound_folds`, and their probabilities.

    Parameters
    ----------
    tables : name, rows and probabilities of one run per fold; the rows have `Metadata_Split`.

    Raises
    ------
    DataError : a compound with a mechanism of action is held out in no table, or in two, or is held out and trained in one; the tables differ in
        their classes, or know no split.
    """
    held: dict[str, str] = {}
    everyone: set[str] = set()
    parts = []
    classes = list(tables[0][2].columns)
    for name, rows, probabilities in tables:
        if "Metadata_Split" not in rows:
            raise DataError(f"A fold's table must have a Metadata_Split. {name} has none.")
        if set(probabilities.columns) != set(classes):
            raise DataError(
                f"The folds must have the same classes. {name} has {len(probabilities.columns)}, {tables[0][0]} {len(classes)}."
            )
        labelled = is_scored(rows, control)
        val = labelled & (rows["Metadata_Split"] == "val").to_numpy()
        compounds = set(rows["Metadata_Compound"][val])
        both = compounds & set(rows["Metadata_Compound"][labelled & (rows["Metadata_Split"] == "train").to_numpy()])
        if both:
            raise DataError(
                f"A fold must hold compounds out whole. {name} also trains on {sorted(both)[0]}: was plates.split=compound_folds?"
            )
        for compound in sorted(compounds):
            if compound in held:
                raise DataError(f"A compound must be held out in one fold. {compound} is in {held[compound]} and in {name}: leave one out.")
            held[compound] = name
        everyone |= set(rows["Metadata_Compound"][labelled])
        parts.append((rows[val], probabilities[val][classes]))
    missing = sorted(everyone - set(held))
    if missing:
        raise DataError(
            f"Every compound must be held out in a fold. {len(missing)} of {len(everyone)} are in none ({', '.join(missing[:5])}): add the missing folds."
        )
    return pd.concat([p[0] for p in parts], ignore_index=True), pd.concat([p[1] for p in parts], ignore_index=True)


def _predicted(unit: str, labels: np.ndarray, values: np.ndarray, compounds: pd.Series) -> Predicted:
    return Predicted(unit, labels, values.argmax(axis=1), values.max(axis=1), compounds.to_numpy(dtype=str))
