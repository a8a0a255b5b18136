"""How good the predictions are: accuracy, macro-F1, a table per class and a confusion matrix, for fields and for wells.

In: logits, labels, wells, class names. Out: `Scores`, and text for people. Promised: plain functions; nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from hcsdl.config import DataError

MOST_PRINTED_CLASSES = 30
"""With more classes the confusion matrix would not fit a screen; the most frequent confusions are printed instead. A guess."""


@dataclass(frozen=True)
class Scores:
    """Scores of one set of predictions.

    Attributes
    ----------
    unit : what was scored, "fields" or "wells".
    accuracy : share of the fields (wells) whose largest logit is that of their label, 0 … 1.
    macro_f1 : mean F1 of the classes that occur among the labels, 0 … 1. A class that does not occur has no F1 of its own and is left
        out of the mean; fields wrongly given to it still count against their own class. The same as scikit-learn's
        `f1_score(labels=np.unique(labels), average="macro")`.
    per_class : a row per class: class, fields (wells): how many have that label, precision, recall, f1. All three are nan for a class
        that does not occur; precision is 0 for one that was never predicted.
    confusion : (K, K) int64, counts; rows are labels, columns predictions.
    """

    unit: str
    accuracy: float
    macro_f1: float
    per_class: pd.DataFrame
    confusion: np.ndarray


def score_fields(logits: Tensor, labels: Tensor, classes: Sequence[str], unit: str = "fields") -> Scores:
    """Return the scores of `logits` (N, K), any float, against `labels` (N,), int64 in 0 … K - 1; `classes` are the K names.

    Raises `DataError` when there is nothing to score.
    """
    if len(labels) == 0:
        raise DataError(f"Scoring needs at least one of the {unit}. Got none: is the split's held-out part empty?")
    count = len(classes)
    predicted, labels = logits.float().argmax(dim=1).cpu(), labels.cpu()
    precision, recall, f1 = (
        score(predicted, labels, count, average="none").numpy() for score in (multiclass_precision, multiclass_recall, multiclass_f1_score)
    )
    confusion = multiclass_confusion_matrix(predicted, labels, count).numpy()
    support = confusion.sum(axis=1)
    per_class = pd.DataFrame({"class": list(classes), unit: support, "precision": precision, "recall": recall, "f1": f1})
    per_class.loc[support == 0, ["precision", "recall", "f1"]] = np.nan
    return Scores(
        unit=unit,
        accuracy=float(multiclass_accuracy(predicted, labels, count, average="micro")),
        macro_f1=float(per_class["f1"].mean()),
        per_class=per_class,
        confusion=confusion,
    )


def score_wells(logits: Tensor, labels: Tensor, wells: Sequence[Hashable], classes: Sequence[str]) -> Scores:
    """Return the scores of wells: the logits of a well are the mean of those of its sites.

    Parameters
    ----------
    logits, labels, classes : as in `score_fields`, a row per field.
    wells : N keys, equal for the sites of one well. Well names repeat from plate to plate, so a key holds the plate as well.

    Raises `DataError` when the sites of a well do not have one label.
    """
    codes, names = pd.factorize(pd.Index(list(wells), tupleize_cols=False))
    well = torch.from_numpy(codes.astype(np.int64))
    if len(well) != len(labels):
        raise DataError(f"Every field needs its well. Got {len(well)} wells for {len(labels)} fields.")
    # Only the largest logit counts, and it is the same one in the sum as in the mean.
    sums = torch.zeros(len(names), logits.shape[1]).index_add_(0, well, logits.float().cpu())
    well_labels = torch.zeros(len(names), dtype=torch.int64).index_copy_(0, well, labels.cpu())
    torn = (well_labels[well] != labels.cpu()).nonzero().flatten()
    if len(torn):
        raise DataError(f"The sites of a well must have one label. Well {names[codes[torn[0]]]} has several.")
    return score_fields(sums, well_labels, classes, unit="wells")


def format_scores(scores: Scores, split: str, *, leaky: bool = False, baseline: float | None = None) -> str:
    """Return the scores as text: one line with the split named in it, the table per class, the confusion matrix.

    Parameters
    ----------
    split : the split's name, as in `plates.split`.
    leaky : say that sister fields of a well stand on both sides of the split.
    baseline : accuracy of the baseline on the same fields or wells, printed beside the network's.
    """
    line = f"{scores.unit} held out by {split}{' (leaky: sister fields on both sides)' if leaky else ''}: accuracy {scores.accuracy:.3f}"
    if baseline is not None:
        line += f" (baseline {baseline:.3f})"
    line += f", macro-F1 {scores.macro_f1:.3f}, {int(scores.confusion.sum())} {scores.unit}"
    table = scores.per_class.copy()
    count = len(table)
    if count <= MOST_PRINTED_CLASSES:
        table = pd.concat([table, pd.DataFrame(scores.confusion, columns=[f"→{number}" for number in range(count)])], axis=1)
    text = table.to_string(float_format=lambda value: f"{value:.3f}", na_rep="-")
    return "\n".join([line, text, *_confusions(scores)]) if count > MOST_PRINTED_CLASSES else f"{line}\n{text}"


def _confusions(scores: Scores) -> list[str]:
    wrong = scores.confusion * (1 - np.eye(len(scores.confusion), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PRINTED_CLASSES]
    names = scores.per_class["class"]
    pairs = [np.unravel_index(place, wrong.shape) for place in order]
    return [f"{wrong[label, given]} × {names[label]} taken for {names[given]}" for label, given in pairs if wrong[label, given] > 0]
