"""Scores as text for the terminal.

In: `TableScores`, comparisons. Out: lines. Promised: every score of a leaky network is marked on its own line.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hcsdl.profiles.provenance import Leak
from hcsdl.profiles.scoring import TableScores, moa_tables

MOST_LISTED = 12  # of what drops out; scores.json has all


def format_table(scores: TableScores, leak: Leak) -> str:
    """Return everything on one table: counts, leak, scores beside baselines, the ladder, mechanisms, precision, predictions."""
    counts = scores.figures["counts"]
    lines = [
        f"{scores.name}",
        f"  rows      {counts['rows_in']} in, {counts['rows_used']} used, {counts['wells']} wells",
        f"  features  {counts['features_in']} in, {counts['features_used']} usable",
        *(f"  note      {note}" for note in scores.notes),
        f"  leakage   {leak.sentence}",
    ]
    mark = f"  [{leak.mark}]" if leak.mark else ""
    lines += _nearest(scores, mark)
    lines += ["", f"normalisation ladder of {scores.name}; * is score.pipeline{mark}", _indented(_ladder(scores.ladder))]
    if scores.main is not None:
        for rule, (table, counts_table) in moa_tables(scores.main).items():
            if scores.figures["nearest"][rule]["treatments"]:
                table = pd.concat([table, counts_table.set_axis(range(len(table)), axis=1).add_prefix("→").reset_index(drop=True)], axis=1)
                lines += [
                    "",
                    f"{rule} by mechanism; → counts treatments whose neighbour has that row's mechanism{mark}",
                    _indented(_text(table)),
                ]
    for kind, table in scores.precision.items():
        lines += ["", *_precision(scores, kind, table, mark)]
    if scores.predictions:
        lines += ["", f"predicted probabilities{mark}", _indented(_text(pd.DataFrame(scores.predictions)))]
    return "\n".join(lines)


def format_comparisons(differences: Sequence[dict], spreads: Sequence[dict], marks: dict[str, str]) -> str:
    """Return the paired differences and the spreads over runs; `marks` holds the leak's mark by method."""
    lines = []
    for one in differences:
        marked = [name + (f" [{marks[name]}]" if marks.get(name) else "") for name in (one["first"], one["second"])]
        lines.append(
            f"  {one['rule']:4s} {marked[0]} − {marked[1]}: {one['value']:+.3f} (95 % {one['low']:+.3f} … {one['high']:+.3f}), "
            f"sign-flip p {one['p_value']:.4f}, {one['treatments']} treatments of {one['compounds']} compounds"
            + (f", {one['treatments_not_in_second']} not in both" if one["treatments_not_in_second"] else "")
        )
    lines = ["paired differences on the same treatments", *lines] if lines else []
    for one in spreads:
        mark = f" [{marks[one['method']]}]" if marks.get(one["method"]) else ""
        lines.append(
            f"spread of {one['rule']} over {one['runs']} runs of {one['method']}{mark}: mean {one['mean']:.3f}, sd {one['sd']:.3f}, "
            f"{one['min']:.3f} … {one['max']:.3f}"
        )
    return "\n".join(lines)


def format_folds(figures: Sequence[dict], mark: str) -> str:
    """Return the merged accuracy over the folds of compounds."""
    return "\n".join(["compounds held out, all folds merged" + mark, _indented(_text(pd.DataFrame(figures)))])


def _nearest(scores: TableScores, mark: str) -> list[str]:
    if scores.main is None:
        return []
    lines = [""]
    for rule, own in scores.figures["nearest"].items():
        if own["treatments"]:
            lines.append(f"{rule:4s} {_score(own)}, {own['treatments']} treatments of {own['compounds']} compounds{mark}")
            lines += [f"     baseline {name}: {_score(figures[rule])}" for name, figures in scores.figures["baselines"].items()]
        else:
            lines.append(f"{rule:4s} cannot be: no treatment has a mechanism in common with another that may be its neighbour")
        if own["dropped"]:
            listed = ", ".join(own["dropped"][:MOST_LISTED]) + (", …" if len(own["dropped"]) > MOST_LISTED else "")
            lines.append(f"     {len(own['dropped'])} treatments drop out, no neighbour they may have has their mechanism: {listed}")
    return lines


def _score(figures: dict) -> str:
    return f"{figures['accuracy']:.3f} (95 % {figures['low']:.3f} … {figures['high']:.3f})"


def _ladder(ladder: pd.DataFrame) -> str:
    table = pd.DataFrame({"rung": np.where(ladder["chosen"], "* ", "  ") + ladder["pipeline"]})
    for column in ("features", "NSC", "NSCB", "plate_effect", "batch_effect"):
        if column not in ladder:
            continue
        if f"{column}_low" in ladder:
            shown = [f"{v:.3f} ({low:.3f} … {high:.3f})" if pd.notna(v) else "-" for v, low, high in
                     zip(ladder[column], ladder[f"{column}_low"], ladder[f"{column}_high"], strict=True)]  # fmt: skip
        else:
            shown = ["-" if pd.isna(v) else f"{v:.0f}" if column == "features" else f"{v:.3f}" for v in ladder[column]]
        table[column.replace("_", " ")] = shown
    text = table.to_string(index=False)
    if "problem" in ladder:
        text += "".join(
            f"\n{name}: not possible. {why}" for name, why in zip(ladder["pipeline"], ladder["problem"], strict=True) if pd.notna(why)
        )
    return text


def _precision(scores: TableScores, kind: str, table: pd.DataFrame, mark: str) -> list[str]:
    figures = scores.figures["mean_average_precision"][kind]
    left_out = next(f"{value} {key.removesuffix('_left_out')}" for key, value in figures.items() if key.endswith("_left_out"))
    against = (
        "wells of a treatment against controls of the plate" if kind == "replicates" else "treatments of a mechanism against the others"
    )
    if not figures["groups"]:
        return [f"mean average precision of {kind} ({against}): cannot be, {left_out} could be no query{mark}"]
    head = (
        f"mean average precision of {kind} ({against}): {figures['mAP']:.3f}, {figures['significant']:.0%} of {figures['groups']} with corrected "
        f"p < 0.05, {left_out} could be no query{mark}"
    )
    return [head, _indented(_text(table))] if kind == "MoA" and len(table) else [head]


def _text(table: pd.DataFrame) -> str:
    return table.to_string(float_format=lambda value: f"{value:.4f}", na_rep="-")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
