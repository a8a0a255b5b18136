"""Which mechanisms are recognised: confusion matrix, recall per class, and whether errors follow the batch or the phenotype.

In: counts and per-treatment results. Out: `Picture`s and plain tables. Promised: every share stands beside the number it is of.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hcsdl.report.picture import COLOURS, WIDTH_IN, Picture, styled

MOST_NAMED = 20  # classes in a confusion matrix with names and numbers; beyond, the most frequent confusions are listed instead. A guess
MOST_LISTED = 15
OUTCOMES = {
    "right": ("right by either rule", COLOURS[0]),
    "batch": ("depends on the batch: right by one rule only", COLOURS[4]),
    "other": ("looks like another mechanism, in other batches too", COLOURS[1]),
    "no effect": ("wrong, and its wells do not stand out from the controls", "#BBBBBB"),
}
SIGNIFICANT = 0.05  # corrected p-value up to which a treatment's wells stand out, as in `hcsdl score`


def wilson(hits: np.ndarray | float, total: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval of shares `hits` / `total` (Wilson 1927); nan where `total` is 0.

    It takes the units as independent; treatments of one compound are not, so that the truth is, if anything, less sure.
    """
    z, hits, total = 1.959964, np.asarray(hits, dtype=float), np.asarray(total, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = hits / total
        middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
        half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def largest_confusion(counts: np.ndarray, classes: Sequence[str]) -> tuple[str, str, int] | None:
    """Return the class most often taken for another, that other, and how often; None where nothing is confused."""
    wrong = np.asarray(counts) * (1 - np.eye(len(classes), dtype=int))
    if not wrong.any():
        return None
    label, given = np.unravel_index(wrong.argmax(), wrong.shape)
    return classes[label], classes[given], int(wrong[label, given])


def _confusion_title(counts: np.ndarray, classes: Sequence[str], unit: str) -> str:
    right, total, worst = int(np.trace(counts)), int(counts.sum()), largest_confusion(counts, classes)
    if worst is None:
        return f"All {total} {unit} are recognised"
    return f"{worst[0]} are most often taken for {worst[1]} ({worst[2]} of {int(counts[list(classes).index(worst[0])].sum())} {unit}); {right} of {total} are right"


@styled()
def confusion_picture(
    counts: np.ndarray, classes: Sequence[str], *, unit: str, name: str = "confusion", given: str = "predicted"
) -> Picture:
    """Return the confusion matrix; with more than 20 classes the most frequent confusions as bars.

    Parameters
    ----------
    counts : (K, K) int; rows are labels, columns what was given to them.
    classes : K names.
    unit : what is counted: "wells", "treatments", …
    given : what a column is: "predicted", "nearest neighbour".
    """
    counts = np.asarray(counts)
    title = _confusion_title(counts, classes, unit)
    if len(classes) > MOST_NAMED:
        return _confusion_list(counts, classes, unit, name, title)
    size = max(3.6, 0.36 * len(classes) + 2.9)
    figure = Figure(figsize=(WIDTH_IN, size))
    axes = figure.subplots()
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, column in np.argwhere(counts > 0):
        axes.text(
            column, row, counts[row, column], ha="center", va="center", fontsize=9, color="white" if share[row, column] > 0.5 else "black"
        )
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), [f"{c} ({n})" for c, n in zip(classes, totals[:, 0], strict=True)])
    axes.set_xticks(np.arange(len(classes) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(classes) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#E3E3E3", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set(xlabel=given, ylabel=f"class of the {unit} (number)")
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.7, pad=0.02, aspect=30)
    reading = (
        f"A row holds the {unit} of one class, a column what they were {'taken for' if given == 'predicted' else 'nearest to'}: numbers on the "
        "diagonal are right, each number beside it is a confusion."
    )
    return Picture(name, title, reading, figure)


def _confusion_list(counts: np.ndarray, classes: Sequence[str], unit: str, name: str, title: str) -> Picture:
    wrong = counts * (1 - np.eye(len(classes), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_LISTED]
    pairs = [(*np.unravel_index(place, wrong.shape),) for place in order]
    pairs = [(row, column) for row, column in pairs if wrong[row, column]]
    figure = Figure(figsize=(WIDTH_IN, 0.32 * max(3, len(pairs)) + 1))
    axes = figure.subplots()
    axes.barh(range(len(pairs)), [wrong[pair] for pair in pairs], color=COLOURS[1])
    axes.set_yticks(range(len(pairs)), [f"{classes[row]} → {classes[column]}" for row, column in pairs])
    axes.invert_yaxis()
    axes.set(xlabel=f"{unit} confused")
    axes.xaxis.get_major_locator().set_params(integer=True)
    reading = f"Each bar counts the {unit} of the first class that were taken for the second; the {len(pairs)} most frequent of {len(classes)} classes."
    return Picture(name, title, reading, figure)


def _names(found: Sequence[str]) -> str:
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def recall_title(table: pd.DataFrame, unit: str) -> str:
    """Return the finding of a recall table (columns class, hits, total): who fails worst."""
    known = table[table["total"] > 0].assign(recall=lambda t: t["hits"] / t["total"])
    if known.empty:
        return f"No {unit} could be scored"
    if (known["recall"] == 1).all():
        return f"Every class is recognised in all of its {unit}"
    worst = known[known["recall"] == known["recall"].min()]
    first = worst.iloc[0]
    of = f"{int(first['hits'])} of {int(first['total'])}" if len(worst) == 1 else f"{first['recall']:.0%} of"
    right = int((known["recall"] == 1).sum())
    rest = f"{right} of {len(known)} classes are" if right else f"none of {len(known)} classes is"
    return f"{_names(list(worst['class']))}: recognised least, {of} {unit}; {rest} always right"


def _judged(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the last table; a class that it does not score stands as the first table that does has it, whose name is in column `by`."""
    rows = []
    for number, name in enumerate(list(tables.values())[-1]["class"]):
        found = [(rule, table.iloc[number]) for rule, table in tables.items() if table["total"].iloc[number] > 0]
        rule, row = found[-1] if found else ("", list(tables.values())[-1].iloc[number])
        rows.append({"class": name, "hits": row["hits"], "total": row["total"], "by": "" if rule == list(tables)[-1] else rule})
    return pd.DataFrame(rows)


def _recall_label(row: tuple) -> str:
    if not row.total:
        return f"{row.Index} (not scored)"
    return f"{row.Index} ({int(row.hits)}/{int(row.total)}{f' by {row.by}' if row.by else ''})"


@styled()
def recall_picture(tables: dict[str, pd.DataFrame], *, unit: str, name: str = "recall", mark: str = "") -> Picture:
    """Return the recall of each class with its 95 % interval, the worst on top.

    Parameters
    ----------
    tables : by rule ("wells", "NSC", "NSCB"): columns class, hits, total, the same classes in the same order. The last that scores a class decides its
        place and the title.
    mark : "LEAKY" or "leak unknown", written into the axis; empty where nothing leaks.
    """
    last = _judged(tables)
    share = last["hits"] / last["total"].where(last["total"] > 0)
    order = list(last.assign(share=share).sort_values(["share", "class"], na_position="last")["class"])
    figure = Figure(figsize=(WIDTH_IN, (0.34 + 0.08 * len(tables)) * len(order) + 1.3))
    axes = figure.subplots()
    offsets = np.linspace(-0.16, 0.16, len(tables)) if len(tables) > 1 else [0.0]
    for number, (offset, (rule, table)) in enumerate(zip(offsets, tables.items(), strict=True)):
        rows = table.set_index("class").reindex(order)
        hits, total = rows["hits"].to_numpy(dtype=float), rows["total"].to_numpy(dtype=float)
        with np.errstate(invalid="ignore"):
            values = np.where(total > 0, hits / np.maximum(total, 1), np.nan)
        low, high = wilson(hits, total)
        places = np.arange(len(order)) + offset
        axes.errorbar(values, places, xerr=[np.maximum(values - low, 0), np.maximum(high - values, 0)], fmt="os"[number % 2], color=COLOURS[number],
                      elinewidth=1.6, markersize=6, label=rule)  # fmt: skip
    axes.set_yticks(range(len(order)), [_recall_label(row) for row in last.set_index("class").loc[order].itertuples()])
    axes.invert_yaxis()
    axes.set(xlim=(-0.02, 1.02), xlabel=f"share of a class's {unit}\nthat is right" + (f"  [{mark}]" if mark else ""))
    axes.grid(axis="x")
    if len(tables) > 1:
        figure.legend(loc="outside upper right", ncols=len(tables))
    reading = f"A dot is the share of a class's {unit} that is recognised, its line the 95 % interval" + (
        f"; in brackets the counts by {list(tables)[-1]}."
        if len(tables) > 1
        else ", in brackets the counts; the worst class stands on top."
    )
    return Picture(name, recall_title(last, unit), reading, figure)


def telling_replicates(treatments: pd.DataFrame, replicates: pd.DataFrame) -> pd.DataFrame:
    """Return `replicates` where they can tell treatments without an effect, else an empty table.

    They can where most treatments whose neighbours are right stand out from the controls. Where even these do not, wells or controls are too few for the test,
    and that a wrong treatment does not stand out says nothing.

    Parameters
    ----------
    treatments : Metadata_Treatment, NSC_Hit of one table.
    replicates : Metadata_Treatment, corrected_p_value of the same table; may be empty.
    """
    if replicates.empty or "NSC_Hit" not in treatments:
        return replicates.head(0)
    right = treatments.loc[treatments["NSC_Hit"] == 1, "Metadata_Treatment"]
    stands_out = replicates.loc[replicates["Metadata_Treatment"].isin(right), "corrected_p_value"] < SIGNIFICANT
    return replicates if len(stands_out) and stands_out.mean() > 0.5 else replicates.head(0)


def outcomes(treatments: pd.DataFrame, replicates: pd.DataFrame) -> pd.DataFrame:
    """Return, of the treatments that both rules score, what decides their result.

    Parameters
    ----------
    treatments : Metadata_Treatment, _Compound, _MoA, NSC_Hit, NSCB_Hit, … of one table.
    replicates : of `telling_replicates`.

    Returns
    -------
    The rows with a column Outcome: "right" by both rules; "batch": right by one rule only, so that what shares the batch decides; "other": wrong by both
    though its wells stand out from the controls; "no effect": wrong by both and they do not.
    """
    if not {"NSC_Hit", "NSCB_Hit"} <= set(treatments.columns):
        return pd.DataFrame(columns=[*treatments.columns, "Outcome"])
    table = treatments[treatments["NSC_Hit"].notna() & treatments["NSCB_Hit"].notna()].copy()
    weak: set[str] = set()
    if not replicates.empty:
        weak = set(replicates.loc[~(replicates["corrected_p_value"] < SIGNIFICANT), "Metadata_Treatment"])
    both = table["NSC_Hit"] + table["NSCB_Hit"]
    no_effect = table["Metadata_Treatment"].isin(weak)
    table["Outcome"] = np.select([both == 2, both == 1, no_effect], ["right", "batch", "no effect"], "other")
    return table


@styled()
def outcome_picture(table: pd.DataFrame, *, name: str = "batch_or_biology") -> Picture:
    """Return stacked bars: for each mechanism, how many treatments are right, depend on the batch, look like another mechanism, or show no effect.

    Parameters
    ----------
    table : of `outcomes`, not empty.
    """
    counts = pd.crosstab(table["Metadata_MoA"], table["Outcome"]).reindex(columns=list(OUTCOMES), fill_value=0)
    counts = counts.assign(wrong=lambda t: t.sum(axis=1) - t["right"]).sort_values(["wrong", "right"], ascending=[False, True])
    figure = Figure(figsize=(WIDTH_IN, 0.36 * len(counts) + 2.1))
    axes = figure.subplots()
    edges = np.cumsum(np.hstack([np.zeros((len(counts), 1)), counts[list(OUTCOMES)].to_numpy()]), axis=1).T
    for (kind, (label, colour)), (left, right) in zip(OUTCOMES.items(), pairwise(edges), strict=True):
        bars = axes.barh(range(len(counts)), right - left, left=left, color=colour, label=label, edgecolor="white")
        axes.bar_label(bars, [f"{int(n)}" if n else "" for n in counts[kind]], label_type="center", fontsize=9,
                       color="black" if kind in ("no effect", "batch") else "white")  # fmt: skip
    axes.set_yticks(range(len(counts)), counts.index)
    axes.invert_yaxis()
    axes.set(xlabel="treatments")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower left", ncols=1)
    totals = counts.sum()
    wrong = int(totals["wrong"])
    if not wrong:
        title = f"No error to explain: all {int(totals['right'])} treatments are right with and without their own batch"
    else:
        kind, words = max(
            (
                ("batch", "depend on the batch"),
                ("other", "look like another mechanism in other batches too"),
                ("no effect", "show no effect"),
            ),
            key=lambda pair: totals[pair[0]],
        )
        title = f"{int(totals[kind])} of {wrong} treatments that are not always right {words}"
    reading = (
        "A bar is a mechanism's treatments, by whether their nearest neighbour is right when their own batch may be used (NSC) and when it may not "
        "(NSCB); orange errors stay in other batches, so they are the phenotype's or the network's, yellow ones are the batch's, grey treatments do nothing that shows."
    )
    return Picture(name, title, reading, figure)
