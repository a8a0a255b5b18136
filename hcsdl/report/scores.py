"""Scores with intervals beside baselines, the normalisation ladder, and paired differences.

In: the tables and comparisons of scores.json. Out: `Picture`s. Promised: a leaky score is named so in its own row; no score stands without an interval
where one could be had.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hcsdl.report.picture import COLOURS, GREY, WARNING, WIDTH_IN, Picture, styled

RULES = {
    "NSC": "nearest neighbour of another compound (NSC)",
    "NSCB": "of another compound and batch (NSCB)",
}
STEPS = {
    "none": "as they are",
    "standardise_all": "standardised, all wells",
    "standardise_control": "standardised, DMSO",
    "robust_all": "robust, all wells",
    "robust_control": "robust, DMSO",
    "sphere_pca": "sphered (PCA)",
    "sphere_zca": "sphered (ZCA)",
    "tvn": "TVN",
    "combat": "ComBat",
    "select": "selected features",
}


def score_rows(tables: Sequence[dict], rule: str) -> list[dict]:
    """Return a row per scored table and baseline: label, of (the table), mark, baseline (bool), accuracy, low, high, treatments, compounds."""
    rows = []
    for table in tables:
        own = table.get("nearest", {}).get(rule)
        if not own or not own["treatments"]:
            continue
        rows.append({"label": table["name"], "of": table["name"], "mark": table["leak"]["mark"], "baseline": False, **own})
        for name, figures in table.get("baselines", {}).items():
            row = {"label": f"baseline: {name}", "of": table["name"], "mark": "", "baseline": True, **figures[rule]}
            if not any(other["label"] == row["label"] and other["accuracy"] == row["accuracy"] for other in rows):
                rows.append(
                    row
                    if not any(other["label"] == row["label"] for other in rows)
                    else row | {"label": f"{row['label']} ({table['name']})"}
                )
    return rows


def headline_rule(table: dict) -> str | None:
    """Return the stricter rule that `table` is scored by: NSCB, else NSC; None where neither."""
    return next((rule for rule in ("NSCB", "NSC") if (table.get("nearest", {}).get(rule) or {}).get("treatments")), None)


def _bars(row: dict) -> list[list[float]]:
    low, high = (row["accuracy"] if row[key] is None else row[key] for key in ("low", "high"))
    return [[max(0.0, row["accuracy"] - low)], [max(0.0, high - row["accuracy"])]]


def _draw_scores(axes: Axes, rows: Sequence[dict], title: str) -> None:
    for place, row in enumerate(rows):
        colour = GREY if row["baseline"] else WARNING if row["mark"] == "LEAKY" else COLOURS[0]
        face = "white" if row["mark"] else colour
        axes.errorbar([row["accuracy"]], [place], xerr=_bars(row), fmt="s" if row["baseline"] else "o", color=colour, markerfacecolor=face,
                      markersize=7, elinewidth=1.8)  # fmt: skip
        axes.annotate(
            f"{row['accuracy']:.2f}", (row["accuracy"], place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_yticks(range(len(rows)), [r["label"] + (f"  [{r['mark']}]" if r["mark"] else "") for r in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(WARNING if row["mark"] else "black")
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xlim(-0.02, 1.02)
    axes.set_title(f"{title}: {rows[0]['treatments']} treatments, {rows[0]['compounds']} compounds", loc="left")
    axes.grid(axis="x")


@styled()
def scores_picture(tables: Sequence[dict], *, name: str = "scores") -> Picture:
    """Return accuracy with 95 % intervals of every table and its baselines, a panel per rule.

    Parameters
    ----------
    tables : of scores.json; at least one of them with a score. The first such gives the title.
    """
    found = {rule: rows for rule in RULES if (rows := score_rows(tables, rule))}
    heights = [0.42 * len(rows) + 0.7 for rows in found.values()]
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.5))
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (rule, rows) in zip(panels, found.items(), strict=True):
        _draw_scores(axes, rows, rule)
    panels[-1].set_xlabel("share of treatments whose nearest\nneighbour has their mechanism")
    rule, rows = list(found.items())[-1]
    first, baselines = rows[0], [r for r in rows if r["baseline"] and r["of"] == rows[0]["of"]]
    title = f"{rule} {first['accuracy']:.2f}" + _interval(first)
    if baselines:
        best = max(baselines, key=lambda r: r["accuracy"])
        gap = first["accuracy"] - best["accuracy"]
        title += f", {abs(gap):.2f} {'above' if gap >= 0 else 'BELOW'} the best baseline ({best['label'].removeprefix('baseline: ')})"
    if first["mark"]:
        title += f" — {first['mark']}"
    reading = (
        "A dot is the share of treatments whose most similar treatment of another compound (NSC), and also of another batch (NSCB), has the same "
        "mechanism; the line is the 95 % interval over compounds"
        + ("; hollow dots: the network saw the answers, or that is unknown." if any(r["mark"] for r in rows) else ".")
    )
    return Picture(name, title, reading, figure)


def _interval(row: dict) -> str:
    return "" if row["low"] is None else f" (95 % {row['low']:.2f} … {row['high']:.2f})"


def _rung(pipeline: str, joint: str = " + ") -> str:
    return joint.join(STEPS.get(step, step) for step in pipeline.split(" + "))


@styled()
def ladder_picture(table: dict, *, name: str = "ladder") -> Picture:
    """Return the scores, and the plate and batch effect, on each rung of the normalisation ladder.

    Parameters
    ----------
    table : of scores.json, with a ladder of at least one possible rung.
    """
    rungs = [r for r in table["ladder"] if not r.get("problem")]
    figure = Figure(figsize=(WIDTH_IN, 0.4 * len(rungs) + 1.6))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1])
    rules = [rule for rule in RULES if any(r.get(rule) is not None for r in rungs)]
    for number, rule in enumerate(rules):
        for place, rung in enumerate(rungs):
            if rung.get(rule) is not None:
                row = {"accuracy": rung[rule], "low": rung.get(f"{rule}_low"), "high": rung.get(f"{rule}_high")}
                left.errorbar([rung[rule]], [place + 0.3 * number - 0.15], xerr=_bars(row), fmt="os"[number], color=COLOURS[number],
                              elinewidth=1.5, label=rule if place == 0 else None)  # fmt: skip
    left.set(xlim=(-0.03, 1.03), xlabel="share of treatments right,\n95 % interval")
    for number, (key, label) in enumerate({"plate_effect": "plate effect", "batch_effect": "batch effect"}.items()):
        values = [np.nan if r.get(key) is None else r[key] for r in rungs]
        if not np.isnan(values).all():
            right.plot(values, range(len(rungs)), "^D"[number], color=COLOURS[2 + number], markersize=7, label=label)
    right.axvline(0, color=GREY, linewidth=1)
    right.set(xlabel="nearest well shares plate or\nbatch; 0: chance, 1: always")
    left.set_yticks(range(len(rungs)), [_rung(r["pipeline"], "\n+ ") + ("  ◄" if r["chosen"] else "") for r in rungs])
    left.set_ylim(len(rungs) - 0.5, -0.5)
    for axes in (left, right):
        axes.grid(axis="x")
    figure.legend(*[a + b for a, b in zip(left.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True)],
                  loc="outside upper right", ncols=4)  # fmt: skip
    mark = f" — {table['leak']['mark']}" if table["leak"]["mark"] else ""
    reading = (
        "Each row is one way of making plates comparable, ◄ the one all other figures of this report use, fixed beforehand: left the scores, right how "
        "much more often than by chance a well's nearest well is of its plate or batch."
    )
    return Picture(name, _ladder_title(rungs, rules) + mark, reading, figure)


def _ladder_title(rungs: Sequence[dict], rules: Sequence[str]) -> str:
    start, chosen = rungs[0], next((r for r in rungs if r["chosen"]), rungs[0])
    if not rules:
        return f"{_rung(chosen['pipeline']).capitalize()}: what normalisation does to plate and batch effects"
    rule = rules[-1]
    change = chosen[rule] - start[rule]
    how = f"{'lifts' if change > 0.005 else 'lowers' if change < -0.005 else 'leaves'} {rule}"
    title = f"Standardising on the controls {how}" if chosen["pipeline"] == "standardise_control" else f"{_rung(chosen['pipeline'])} {how}"
    title += f" from {start[rule]:.2f} to {chosen[rule]:.2f}" if abs(change) > 0.005 else f" at {chosen[rule]:.2f}"
    effect = [r.get("batch_effect") for r in (start, chosen)]
    if None not in effect:
        title += f" and takes the batch effect from {effect[0]:.2f} to {effect[1]:.2f}"
    return title


@styled()
def difference_picture(comparisons: Sequence[dict], *, name: str = "differences") -> Picture:
    """Return the paired differences with their 95 % intervals, a row per rule and pair.

    Parameters
    ----------
    comparisons : of scores.json; at least one.
    """
    figure = Figure(figsize=(WIDTH_IN, 0.45 * len(comparisons) + 1.3))
    axes = figure.subplots()
    sure = []
    for place, one in enumerate(comparisons):
        known = one["low"] is not None
        clear = known and (one["low"] > 0 or one["high"] < 0)
        sure.append(clear and one["value"] > 0)
        row = {"accuracy": one["value"], "low": one["low"], "high": one["high"]}
        axes.errorbar([one["value"]], [place], xerr=_bars(row), fmt="o", color=COLOURS[0] if clear else GREY, elinewidth=1.8, markersize=7)
        axes.annotate(
            f"p {one['p_value']:.3g}", (one["value"], place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8.5
        )
    axes.axvline(0, color="black", linewidth=1)
    leaks = [f"  [{c['second_leak']}]" if c.get("second_leak") else "" for c in comparisons]
    against = [f"{c['rule']}: against {c['second'].removeprefix('baseline: ')}" for c in comparisons]
    axes.set_yticks(range(len(comparisons)), [label + leak for label, leak in zip(against, leaks, strict=True)])
    for label, leak in zip(axes.get_yticklabels(), leaks, strict=True):
        label.set_color(WARNING if leak else "black")
    axes.set_ylim(len(comparisons) - 0.5, -0.7)
    mark = comparisons[0].get("first_leak")
    axes.set(xlabel=f"share right of {comparisons[0]['first']}{f' [{mark}]' if mark else ''}\nminus that of the other")
    axes.grid(axis="x")
    fair = [better for better, leak in zip(sure, leaks, strict=True) if not leak] or sure
    apart = ", those with leaky scores apart" if len(fair) < len(sure) else ""
    title = f"{comparisons[0]['first']} is surely better in {sum(fair)} of {len(fair)} comparisons{apart}" + (f" — {mark}" if mark else "")
    reading = (
        "A dot is the difference on the same treatments and its line the 95 % interval over compounds: right of 0 the first is better, and surely so "
        "(blue) where the line stays clear of 0; p is of a sign-flip test."
    )
    return Picture(name, title, reading, figure)
