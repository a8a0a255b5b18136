"""Records → the report's sections: which pictures and tables stand in each, and what is missing.

In: `RunRecord`s, `ScoreRecord`s. Out: `Section`s. Promised: a section whose input is missing says which command makes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hcsdl.report.answer import Evidence, rank_compounds
from hcsdl.report.classes import confusion_picture, outcome_picture, outcomes, recall_picture, telling_replicates
from hcsdl.report.comparison import as_text, comparison_picture, comparison_table
from hcsdl.report.curves import accuracy_picture, facts, loss_picture, speed_picture
from hcsdl.report.page import Section, Table
from hcsdl.report.records import RunRecord, ScoreRecord
from hcsdl.report.scores import difference_picture, headline_rule, ladder_picture, scores_picture

NO_SCORES = "No scores were given. `hcsdl embed checkpoint=<run folder>`, then `hcsdl score profiles=<its table>`, makes them; give them as `scores=<folder>`."
NO_RUN = "No run was given. `hcsdl train` makes one; give its folder as `run=<run folder>`."
NO_NEIGHBOURS = "In the scores given no treatment has a mechanism in common with another that may be its neighbour."
NOT_FINISHED = "The run {} has no summary yet: the same `hcsdl train` command goes on with it."
MOST_COMPOUNDS = 15


def main_table(scores: Sequence[ScoreRecord]) -> tuple[ScoreRecord, dict] | None:
    """Return the first scored table that has nearest neighbours, and its record: the one the answers are about."""
    return next(((record, table) for record in scores for table in record.tables if headline_rule(table)), None)


def evidence_of(scores: Sequence[ScoreRecord]) -> Evidence | None:
    """Return what the answers rest on; None without scores of mechanisms."""
    found = main_table(scores)
    if found is None:
        return None
    record, table = found
    data = record.data
    treatments = record.rows_of(table["name"])
    replicates = telling_replicates(treatments, record.replicates_of(table["name"]))
    return Evidence(table, treatments, replicates, data["comparisons"], data["spreads"])


def scores_section(scores: Sequence[ScoreRecord]) -> Section:
    """Return scores beside baselines, paired differences, the ladder, what the network predicts, and what was counted."""
    section = Section("scores", "Scores", missing=[] if scores else [NO_SCORES])
    tables = [table for record in scores for table in record.tables]
    found = main_table(scores)
    if found is not None:
        record, main = found
        section.intro = (
            f"The answers are about the table “{main['name']}”: {main['counts']['wells']} wells, {main['counts']['features_used']} features, "
            f"normalised by {' + '.join(record.data['settings']['pipeline']) or 'nothing'}. {main['leak']['sentence']}"
        )
        section.pictures.append(scores_picture(tables))
        if record.data["comparisons"]:
            section.pictures.append(difference_picture(record.data["comparisons"]))
        section.pictures.append(ladder_picture(main))
    predictions = [{"table": _marked(table), **row} for table in tables for row in table["predictions"]]
    predictions += [{"table": "all folds of compounds merged", **row} for r in scores for row in r.data.get("folds", {}).get("figures", [])]
    if predictions:
        section.tables.append(_prediction_table(predictions))
    spreads = [one for record in scores for one in record.data["spreads"]]
    if spreads:
        rows = [[s["method"], s["rule"], str(s["runs"]), *(f"{s[key]:.3f}" for key in ("mean", "sd", "min", "max"))] for s in spreads]
        section.tables.append(Table("Spread over seeds", ["method", "rule", "runs", "mean", "sd", "least", "greatest"], rows))
    notes = [[table["name"], note] for table in tables for note in table["notes"]]
    if tables:
        counted = [[t["name"], ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in t["counts"].items())] for t in tables]
        section.tables.append(Table("What was counted, and what was left out", [], counted + notes))
    return section


def _marked(table: dict) -> str:
    return table["name"] + (f" [{table['leak']['mark']}]" if table["leak"]["mark"] else "")


def _prediction_table(rows: Sequence[dict]) -> Table:
    def interval(row: dict) -> str:
        return f"{row['accuracy']:.3f}" + ("" if row["low"] is None else f" ({row['low']:.3f} … {row['high']:.3f})")

    cells = [
        [r["table"], r["split"], r["unit"], r["target"].removeprefix("Metadata_"), str(r["number"]), str(r["compounds"]), interval(r)]
        + [f"{r['macro_f1']:.3f}", f"{r['calibration_error']:.3f}"]
        for r in rows
    ]
    heads = ["table", "split", "unit", "target", "number", "compounds", "accuracy (95 %)", "macro-F1", "calibration error"]
    return Table("What the network itself predicts; its training fields (train) tell nothing of new ones", heads, cells)


def mechanisms_section(evidence: Evidence | None, run: RunRecord | None, *, scored: bool) -> Section:
    """Return which classes are recognised: by nearest neighbours where there are scores (`scored`), and by the run on what it held out."""
    section = Section("mechanisms", "Mechanisms: which fail, and is it batch or biology")
    if evidence is None:
        section.missing.append(f"Whether errors follow the batch or the phenotype is left out. {NO_NEIGHBOURS if scored else NO_SCORES}")
    else:
        table = evidence.table
        rules = [rule for rule in ("NSC", "NSCB") if (table["nearest"].get(rule) or {}).get("treatments")]
        recalls = {rule: _recall(table["by_moa"][rule]["per_moa"]) for rule in rules}
        found = outcomes(evidence.treatments, evidence.replicates)
        section.pictures.append(recall_picture(recalls, unit="treatments", mark=table["leak"]["mark"]))
        if not found.empty:
            section.pictures.append(outcome_picture(found))
        by_moa = table["by_moa"][rules[-1]]
        given = f"mechanism of the nearest neighbour ({rules[-1]})"
        section.pictures.append(confusion_picture(np.array(by_moa["confusion"]), by_moa["moas"], unit="treatments", given=given))
    if run is not None and run.summary is not None:
        summary, counts = run.summary, np.array(run.summary["confusion_wells"])
        table = pd.DataFrame({"class": summary["classes"], "hits": np.diag(counts), "total": counts.sum(axis=1)})
        if len(table) <= MOST_COMPOUNDS:
            mark = "LEAKY" if summary["leaky"] else ""
            section.pictures.append(recall_picture({"wells": table}, unit="held-out wells", name="recall_network", mark=mark))
        section.pictures.append(confusion_picture(counts, summary["classes"], unit="held-out wells", name="confusion_network"))
        section.intro = f"Held-out wells are those of the run {run.name}: {summary['split_sentence']}"
    return section


def _recall(per_moa: Sequence[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        {"class": [r["MoA"] for r in per_moa], "hits": [r["hits"] for r in per_moa], "total": [r["treatments"] for r in per_moa]}
    )


def compound_table(evidence: Evidence) -> Table:
    """Return the compounds most worth a look, the first being the answer."""
    found = rank_compounds(evidence).head(MOST_COMPOUNDS)
    rows = [
        [r.compound, r.MoA, f"{r.wrong} of {r.treatments}", "–" if np.isnan(r.agrees) else f"{r.agrees:.0%}", r.taken_for or "–", f"{r.nearest} ({r.cosine:.2f})"]
        for r in found.itertuples()
    ]  # fmt: skip
    heads = ["compound", "mechanism", "treatments wrong", "with an effect", "taken for", "nearest treatment (cosine)"]
    return Table("Compounds most worth a look, the first on top: most often misread, its wells agreeing with each other", heads, rows)


def training_section(run: RunRecord | None) -> Section:
    """Return loss and accuracy of a run."""
    section = Section("training", "Training")
    if run is None:
        section.missing.append(NO_RUN)
        return section
    steps = run.events("step")
    if steps:
        section.pictures.append(loss_picture(steps))
    if run.summary is None:
        section.missing.append(NOT_FINISHED.format(run.name))
    elif run.summary["history"]:
        section.pictures.append(accuracy_picture(run.summary["history"], run.summary))
    return section


def machine_section(run: RunRecord | None, command: str) -> Section:
    """Return speed, memory, versions and the exact command of a run."""
    section = Section("machine", "Speed, machine and exact command")
    if run is None:
        section.missing.append(NO_RUN)
    elif run.summary is None:
        section.missing.append(NOT_FINISHED.format(run.name))
    else:
        if steps := run.events("step"):
            section.pictures.append(speed_picture(steps, run.summary))
        section.tables.append(Table(f"The run {run.name}", [], facts(run.summary, command)))
    return section


def comparison_section(runs: Sequence[RunRecord]) -> Section:
    """Return several runs beside each other; nothing where there are fewer than two."""
    section = Section("comparison", "Runs compared")
    if len(runs) > 1:
        section.intro = (
            "The other sections show the first run given. Columns with a dot in their name are settings in which the runs differ."
        )
        if any(run.summary for run in runs):
            section.pictures.append(comparison_picture(runs))
        table = comparison_table(runs)
        section.tables.append(Table("The best on top; runs that are not finished stand last", list(table.columns), as_text(table)))
    return section
