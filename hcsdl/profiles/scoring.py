"""One profile table → all its scores.

In: a `ProfileTable` and settings. Out: `TableScores`, plain data for text, JSON and CSV. Promised: no file is read or written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from hcsdl.config import DataError
from hcsdl.profiles import precision
from hcsdl.profiles.effects import same_group_effect
from hcsdl.profiles.neighbours import NearestNeighbours, confusion, nearest_neighbours, per_moa
from hcsdl.profiles.normalise import LADDER, Dropped, normalise, usable_features
from hcsdl.profiles.predictions import Predicted, find_target, predict
from hcsdl.profiles.tables import Profiles, ProfileTable, is_scored
from hcsdl.profiles.treatments import Treatments, treatment_profiles, with_treatments
from hcsdl.profiles.uncertainty import cluster_bootstrap

BASELINES = {"cell count": ("Count_",), "intensity": ("Intensity_",)}
MOST_NAMED = 3  # treatments in a note
RANDOM = "random network"  # the baseline that is a table of its own: a network of the same shape that was never trained


@dataclass(frozen=True)
class Settings:
    """What `score.*` and `seed` say about scoring; see `ScoreConfig`."""

    control: str = "DMSO"
    pipeline: tuple[str, ...] = ("standardise_control",)
    regularisation: float = 0.01
    target: str | None = None
    draws: int = 10_000
    null_size: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """Nearest neighbours of one set of features.

    Attributes
    ----------
    name : of the table, or "<table>: <baseline>".
    treatments : what was scored.
    nearest : by rule, "NSC" and "NSCB".
    """

    name: str
    treatments: Treatments
    nearest: dict[str, NearestNeighbours]

    def hits(self, rule: str) -> pd.Series:
        """Return hit or miss by treatment name; nan where not scored."""
        return pd.Series(self.nearest[rule].hit, index=self.treatments.names)


@dataclass
class TableScores:
    """Everything that is known of one table.

    Attributes
    ----------
    name, method : the table's name, and what it shares with other runs of its method.
    main : nearest neighbours after `score.pipeline`; None where the table knows no mechanism.
    baselines : the same of the simple features in the table.
    ladder : a row per rung: pipeline, features, NSC, NSCB, intervals, plate and batch effect; or why the rung cannot be.
    precision : by "replicates" and "MoA": the table of groups.
    predictions : by split, fields and wells.
    figures : the numbers for scores.json.
    notes : sentences, counts in and out among them.
    """

    name: str
    method: str = ""
    main: Method | None = None
    baselines: list[Method] = field(default_factory=list)
    ladder: pd.DataFrame = field(default_factory=pd.DataFrame)
    precision: dict[str, pd.DataFrame] = field(default_factory=dict)
    predictions: list[dict] = field(default_factory=list)
    figures: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def score_table(name: str, table: ProfileTable, settings: Settings) -> TableScores:
    """Return all scores of one table.

    Raises
    ------
    DataError : no feature is usable, or `settings.pipeline` cannot be done on this table.
    """
    scores = TableScores(name, name, notes=list(table.notes))
    scores.figures["counts"] = dict(table.counts)
    wells, dropped = usable_features(table.wells)
    _note_features(scores, table, dropped, len(wells.names))
    scores.ladder = _climb(scores, wells, settings)
    if scores.main is not None:
        if table.simple is None:
            scores.notes.append("There are no Intensity_* and Count_* columns: no baselines.")
        else:
            scores.baselines = _baselines(scores, table.simple, settings)
        scores.figures["baselines"] = {m.name: _nearest_figures(m, settings) for m in scores.baselines}
    if table.probabilities is not None:
        scores.predictions = _predictions(scores, table, settings)
    return scores


def add_random_baselines(scores: TableScores, random: Sequence[TableScores]) -> None:
    """Put the scores of networks that were never trained beside those of a table."""
    if scores.main is None:
        return
    for one in random:
        if one.main is not None:
            scores.figures["baselines"][RANDOM if len(random) == 1 else f"{RANDOM} ({one.name})"] = one.figures["nearest"]


def _note_features(scores: TableScores, table: ProfileTable, dropped: Dropped, kept: int) -> None:
    scores.figures["counts"] |= {"features_missing": dropped.missing, "features_constant": dropped.constant, "features_used": kept}
    if dropped.missing or dropped.constant:
        total = len(table.wells.names)
        scores.notes.append(
            f"{dropped.missing} of {total} features miss a value somewhere (or hold one too large to reckon with) and {dropped.constant} are constant: dropped, {kept} kept."
        )


def _climb(scores: TableScores, wells: Profiles, settings: Settings) -> pd.DataFrame:
    """Score every rung of the ladder; fill in what belongs to the chosen pipeline."""
    rungs = list(LADDER) if settings.pipeline in LADDER else [*LADDER, settings.pipeline]
    rows = []
    for steps in rungs:
        chosen = steps == settings.pipeline
        row: dict = {"pipeline": " + ".join(steps) or "none", "chosen": chosen}
        try:
            normal = normalise(wells, steps, control=settings.control, regularisation=settings.regularisation)
        except DataError as error:
            if chosen:
                raise
            rows.append(row | {"problem": str(error)})
            continue
        row["features"] = len(normal.names)
        row["plate_effect"] = same_group_effect(normal, "Metadata_Plate", settings.control, seed=settings.seed).score
        if "Metadata_Batch" in normal.meta:
            batch = same_group_effect(normal, "Metadata_Batch", settings.control, apart="Metadata_Plate", seed=settings.seed)
            row["batch_effect"] = batch.score
        if _has_moas(normal, settings.control):
            treatments = treatment_profiles(normal, settings.control)
            method = Method(scores.name, treatments, nearest_neighbours(treatments))
            for rule, figures in _nearest_figures(method, settings).items():
                row |= {rule: figures["accuracy"], f"{rule}_low": figures["low"], f"{rule}_high": figures["high"]}
        if chosen:
            if len(normal.names) < len(wells.names) and not {"select"} & set(steps):
                fewer = len(wells.names) - len(normal.names)
                scores.notes.append(
                    f"{fewer} of {fewer + len(normal.names)} features do not vary in some plate's reference wells: dropped, {len(normal.names)} kept."
                )
            if _has_moas(normal, settings.control):
                _score_chosen(scores, method, settings)
            _score_replicates(scores, normal, settings)
        rows.append(row)
    return pd.DataFrame(rows)


def _has_moas(wells: Profiles, control: str) -> bool:
    return bool(is_scored(wells.meta, control).any())


def _score_chosen(scores: TableScores, method: Method, settings: Settings) -> None:
    scores.main = method
    scores.figures["nearest"] = _nearest_figures(method, settings)
    everywhere = list(method.treatments.names[method.treatments.everywhere])
    if everywhere and len(everywhere) < len(method.treatments):
        scores.figures["nearest"]["NSCB"]["in_every_batch"] = everywhere
        named = ", ".join(everywhere[:MOST_NAMED]) + (f", … ({len(everywhere)} in all)" if len(everywhere) > MOST_NAMED else "")
        scores.notes.append(
            f"{named} {'is' if len(everywhere) == 1 else 'are'} in every batch. For NSCB such a treatment is compared with those that are not, and is "
            "nobody's neighbour; taken literally it would share a batch with all others and drop out."
        )
    table, left_out = precision.moa_precision(method.treatments, null_size=settings.null_size, seed=settings.seed)
    _note_precision(scores, "MoA", table, left_out, "treatments")


def _score_replicates(scores: TableScores, wells: Profiles, settings: Settings) -> None:
    table, left_out = precision.replicate_precision(wells, settings.control, null_size=settings.null_size, seed=settings.seed)
    _note_precision(scores, "replicates", table, left_out, "wells")


def _note_precision(scores: TableScores, kind: str, table: pd.DataFrame, left_out: int, unit: str) -> None:
    scores.precision[kind] = table
    mean = float(table["mAP"].mean()) if len(table) else float("nan")
    figures = {"mAP": mean, "groups": len(table), "significant": precision.found_share(table), f"{unit}_left_out": left_out}
    scores.figures.setdefault("mean_average_precision", {})[kind] = figures


def _nearest_figures(method: Method, settings: Settings) -> dict[str, dict]:
    """Return, by rule, accuracy with interval, and which treatments drop out."""
    compounds, names = method.treatments.compounds, method.treatments.names
    figures = {}
    for rule, nearest in method.nearest.items():
        interval = cluster_bootstrap(nearest.hit, compounds, draws=settings.draws, seed=settings.seed)
        figures[rule] = {
            "accuracy": nearest.accuracy,
            "low": interval.low,
            "high": interval.high,
            "treatments": int(nearest.scored.sum()),
            "compounds": interval.compounds,
            "dropped": list(names[~nearest.scored]),
        }
    return figures


def _baselines(scores: TableScores, simple: Profiles, settings: Settings) -> list[Method]:
    """Return the same scores of the table's simple features, through the same pipeline."""
    found = []
    for title, beginnings in BASELINES.items():
        mask = np.array([n.startswith(beginnings) for n in simple.names])
        if not mask.any():
            continue
        try:
            usable, _ = usable_features(simple.keep(mask))
            normal = normalise(usable, settings.pipeline, control=settings.control, regularisation=settings.regularisation)
        except DataError as error:
            scores.notes.append(f"No baseline from {title}: {error}")
            continue
        treatments = treatment_profiles(normal, settings.control)
        found.append(Method(title, treatments, nearest_neighbours(treatments)))
    return found


def _predictions(scores: TableScores, table: ProfileTable, settings: Settings) -> list[dict]:
    """Return accuracy, macro-F1 and calibration, of every split in the table."""
    try:
        target = find_target(table.rows, list(table.probabilities.columns), settings.target)
    except DataError as error:  # plates without labels
        scores.notes.append(f"Predictions are not scored: {error}")
        return []
    splits = table.rows["Metadata_Split"].fillna("none") if "Metadata_Split" in table.rows else pd.Series("all", index=table.rows.index)
    found = []
    for split in sorted(splits.unique()):
        mask = (splits == split).to_numpy()
        predicted, left_out = predict(table.rows[mask], table.probabilities[mask], target)
        if left_out:
            scores.notes.append(
                f"{left_out} of {mask.sum()} rows of split {split} have no {target} among the predicted classes: not in their accuracy."
            )
        found += [prediction_figures(one, split, target, settings) for one in predicted.values()]
    return found


def prediction_figures(predicted: Predicted, split: str, target: str, settings: Settings) -> dict:
    """Return the figures of one kind of unit as plain data."""
    interval = cluster_bootstrap(predicted.hit, predicted.compounds, draws=settings.draws, seed=settings.seed)
    return {
        "split": split,
        "unit": predicted.unit,
        "target": target,
        "number": len(predicted.labels),
        "compounds": interval.compounds,
        "accuracy": interval.value,
        "low": interval.low,
        "high": interval.high,
        "macro_f1": predicted.macro_f1,
        "calibration_error": predicted.calibration_error,
    }


def treatment_table(method: Method) -> pd.DataFrame:
    """Return a row per treatment: its metadata, and per rule its neighbour, that one's mechanism, their cosine, hit (1, 0 or empty)."""
    meta = method.treatments.profiles.meta
    columns = {}
    for rule, nearest in method.nearest.items():
        there = nearest.scored
        for title, source in (("Neighbour", "Metadata_Treatment"), ("Neighbour_MoA", "Metadata_MoA")):
            columns[f"{rule}_{title}"] = np.where(there, meta[source].to_numpy(dtype=object)[nearest.neighbour], None)
        columns |= {f"{rule}_Cosine": nearest.similarity, f"{rule}_Hit": nearest.hit}
    table = with_treatments(pd.DataFrame(columns), method.treatments)
    table.insert(0, "Method", method.name)
    return table


def moa_tables(method: Method) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Return, by rule, the table per mechanism and the confusion matrix."""
    return {rule: (per_moa(method.treatments, nearest), confusion(method.treatments, nearest)) for rule, nearest in method.nearest.items()}
