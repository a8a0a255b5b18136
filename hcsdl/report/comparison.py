"""Several runs beside each other.

In: `RunRecord`s. Out: a table, a row per run, and a `Picture`. Promised: only what the runs differ in stands among the settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hcsdl.report.classes import wilson
from hcsdl.report.picture import COLOURS, GREY, WARNING, WIDTH_IN, Picture, styled
from hcsdl.report.records import RunRecord

WHERE = ("run_dir", "plates.root", "plates.cache", "data.stage")  # settings that say where, not what
MOST_SETTINGS = 6  # columns of settings; a guess


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """Return a nested config as {dotted key: value}."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differing_settings(runs: Sequence[RunRecord]) -> list[str]:
    """Return the dotted keys in which the runs differ, where they are apart from where things lie."""
    configs = [flatten(run.config) for run in runs]
    keys = sorted({key for config in configs for key in config} - set(WHERE))
    return [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]


def comparison_table(runs: Sequence[RunRecord]) -> pd.DataFrame:
    """Return a row per run, the best well accuracy first; runs that are not finished stand last, without figures."""
    keys = [key for key in differing_settings(runs) if key != "name"][:MOST_SETTINGS]
    rows = []
    for run in runs:
        config, summary = flatten(run.config), run.summary or {}
        rows.append(
            {
                "run": run.name,
                "split": f"{config['plates.split']}{' [LEAKY]' if summary.get('leaky') else ''}",
                "well accuracy": summary.get("well_accuracy"),
                "baseline": summary.get("baseline_well_accuracy"),
                "field accuracy": summary.get("val_accuracy"),
                "macro-F1": summary.get("val_macro_f1"),
                "epochs": summary.get("epochs"),
                "minutes": summary["training_seconds"] / 60 if summary else None,
                "images/s": summary.get("images_per_s"),
                "GiB a rank": summary.get("peak_rss_gib"),
            }
            | {key: config.get(key) for key in keys}
        )
    return pd.DataFrame(rows).sort_values("well accuracy", ascending=False, na_position="last", kind="stable").reset_index(drop=True)


@styled()
def comparison_picture(runs: Sequence[RunRecord], *, name: str = "comparison") -> Picture:
    """Return well accuracy of each finished run with its 95 % interval, beside its baseline. At least one run must be finished."""
    done = sorted((run for run in runs if run.summary), key=lambda run: -run.summary["well_accuracy"])
    figure = Figure(figsize=(WIDTH_IN, 0.45 * len(done) + 1.6))
    axes = figure.subplots()
    for place, run in enumerate(done):
        summary = run.summary
        total, share = summary["num_wells_val"], summary["well_accuracy"]
        low, high = wilson(share * total, total)
        colour = WARNING if summary["leaky"] else COLOURS[0]
        axes.errorbar([share], [place], xerr=[[max(0.0, share - float(low))], [max(0.0, float(high) - share)]], fmt="o", color=colour, elinewidth=1.8,
                      markerfacecolor="white" if summary["leaky"] else colour, markersize=7, label="network" if place == 0 else None)  # fmt: skip
        if summary["baseline_well_accuracy"] is not None:
            axes.plot(summary["baseline_well_accuracy"], place, "s", color=GREY, label="its baseline" if place == 0 else None)
    axes.set_yticks(range(len(done)), [run.name + ("  [LEAKY]" if run.summary["leaky"] else "") for run in done])
    axes.set_ylim(len(done) - 0.5, -0.5)
    axes.set(xlim=(-0.02, 1.02), xlabel="accuracy on held-out wells, 95 % interval")
    axes.grid(axis="x")
    figure.legend(loc="outside upper right", ncols=2)
    held_out = {(run.summary["split"], flatten(run.config)["plates.root"]) for run in done}
    best, worst = done[0], done[-1]
    title = f"{best.name} is best with {best.summary['well_accuracy']:.0%} of held-out wells, {worst.name} last with {worst.summary['well_accuracy']:.0%}"
    if len(done) == 1:
        title = f"Only {best.name} is finished"
    elif best.summary["well_accuracy"] == worst.summary["well_accuracy"]:
        title = f"All {len(done)} runs get {best.summary['well_accuracy']:.0%} of the held-out wells right"
    below = [run.name for run in done if run.summary["well_accuracy"] < (run.summary["baseline_well_accuracy"] or 0)]
    if below:
        title += f"; BELOW their baselines: {', '.join(below[:3])}" + (", …" if len(below) > 3 else "")
    reading = "A dot is a run's accuracy on the wells it was not trained on, its line the 95 % interval as if wells were independent, the square its baseline"
    reading += (
        "." if len(held_out) == 1 else "; the runs hold out different wells (another split, or other plates) and should not be ranked."
    )
    return Picture(name, title, reading, figure)


def as_text(table: pd.DataFrame) -> list[list[str]]:
    """Return a table's cells as text: shares with three digits, other numbers with three significant ones, nothing as "–"."""
    shares = {"well accuracy", "baseline", "field accuracy", "macro-F1"}

    def cell(column: str, value: object) -> str:
        if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
            return "–"
        if isinstance(value, float | np.floating):
            return f"{value:.3f}" if column in shares else f"{value:.3g}"
        return str(value)

    return [[cell(column, row[column]) for column in table.columns] for _, row in table.iterrows()]
