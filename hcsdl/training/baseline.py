"""The figure a network has to beat: logistic regression on simple intensity features.

In: features and index table, a row per field, and the split. Out: field and well accuracy on the held-out part. Promised: no network, no
torch, and only the training part's labels are learned from.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from hcsdl.config import DataError


def baseline_scores(features: pd.DataFrame, table: pd.DataFrame, split: pd.Series, target: str, control: str) -> tuple[float, float]:
    """Return the accuracy (fields, wells), 0 … 1, of scikit-learn's `LogisticRegression(C=1)` on standardised features.

    A well gets the class with the largest mean log-probability over its sites.

    Parameters
    ----------
    features : `Intensity_*` and `Count_Nuclei` columns, float, in the order of `table`.
    table : `Metadata_Plate`, `Metadata_Well`, `Metadata_Compound` and the target's column.
    split : "train" or "val" for each field; fields with anything else, or with no label, only help to standardise.
    target : the column to learn, with or without `Metadata_`.
    control : compound whose wells standardise a plate.

    Raises
    ------
    DataError : no labelled field in one of the parts, or a single class in "train".
    """
    column = target if target in table else f"Metadata_{target}"
    labels = table[column].reset_index(drop=True)
    part = pd.Series(np.asarray(split), index=labels.index)
    values = standardised(features, table["Metadata_Plate"], table["Metadata_Compound"] == control)
    train, val = ((part == name) & labels.notna() for name in ("train", "val"))
    if labels[train].nunique() < 2 or not val.any():
        raise DataError(
            f"The baseline needs two classes of {column} in train and a labelled field in val. "
            f"Got {labels[train].nunique()} classes and {int(val.sum())} fields: change plates.split or plates.query."
        )
    model = LogisticRegression(C=1.0, max_iter=5000).fit(values[train], labels[train].astype(str))
    logs = pd.DataFrame(model.predict_log_proba(values[val]), columns=model.classes_)
    truth = labels[val].astype(str).reset_index(drop=True)
    wells = [table[name].reset_index(drop=True)[val].to_numpy() for name in ("Metadata_Plate", "Metadata_Well")]
    well_logs, well_truth = logs.groupby(wells).mean(), truth.groupby(wells).first()
    return float((logs.idxmax(axis=1) == truth).mean()), float((well_logs.idxmax(axis=1) == well_truth).mean())


def standardised(features: pd.DataFrame, plates: pd.Series, controls: pd.Series) -> np.ndarray:
    """Return `features` (N, F) as float64, each plate's columns shifted and scaled to mean 0 and sd 1 over its control fields.

    A plate with fewer than two control fields is standardised on all its fields; a feature that does not vary there is only shifted.
    """
    values = features.to_numpy(dtype=np.float64, copy=True)
    plates, controls = np.asarray(plates), np.asarray(controls, dtype=bool)
    for plate in pd.unique(plates):
        rows = plates == plate
        reference = values[rows & controls] if (rows & controls).sum() >= 2 else values[rows]
        mean, sd = reference.mean(axis=0), reference.std(axis=0)
        constant = sd <= 1e-9 * np.abs(mean)  # rounding alone gives about 1e-16
        values[rows] = (values[rows] - mean) / np.where(constant, 1.0, sd)
    return values
