"""Benchmarks' rows → PNG files.

In: rows as they stand in a benchmark's `result.json`. Out: one picture each. matplotlib is imported when a picture is drawn, with the
Agg renderer: no screen is needed and nothing global is set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_IN, HEIGHT_IN, DPI = 6.4, 4.4, 120


def _figure(columns: int, rows: int = 1) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN * columns, HEIGHT_IN * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_communication(rows: Sequence[dict], ranks: int, path: Path) -> None:
    """Draw time and bus bandwidth against size, a line per operation, dtype and backend with its quartiles shaded.

    Parameters
    ----------
    rows : `operation`, `dtype`, `backend`, `num_bytes`, `median_s`, `q1_s`, `q3_s` (s), `bus_gb_per_s` (GB/s) of each.
    ranks : how many ranks were measured, for the title.
    """
    figure = _figure(2)
    time_axes, bandwidth_axes = figure.subplots(1, 2)
    lines: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        lines.setdefault((row["operation"], row["dtype"], row["backend"]), []).append(row)
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for (operation, dtype, backend), found in lines.items():
        found = sorted(found, key=lambda row: row["num_bytes"])
        sizes = [row["num_bytes"] / 2**20 for row in found]
        style = {
            "color": f"C{backends.index(backend)}",
            "linestyle": "-" if dtype == "fp32" else "--",
            "label": f"{operation} {dtype}, {backend}",
        }
        style["marker"] = {"all_reduce": "o", "broadcast": "s", "all_gather": "^"}[operation]
        time_axes.plot(sizes, [row["median_s"] * 1e3 for row in found], **style)
        time_axes.fill_between(
            sizes, [row["q1_s"] * 1e3 for row in found], [row["q3_s"] * 1e3 for row in found], color=style["color"], alpha=0.15
        )
        bandwidth_axes.plot(sizes, [row["bus_gb_per_s"] for row in found], **style)
    time_axes.set(xscale="log", yscale="log", xlabel="size, MiB", ylabel="time, ms", title=f"{ranks} ranks: median and quartiles")
    bandwidth_axes.set(xscale="log", xlabel="size, MiB", ylabel="bus bandwidth, GB/s", title="bus bandwidth", ylim=(0, None))
    for axes in (time_axes, bandwidth_axes):
        axes.grid(alpha=0.3)
    bandwidth_axes.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def plot_scaling(rows: Sequence[dict], published: dict | None, path: Path) -> None:
    """Draw predicted images/s against nodes, a panel per network: a line per assumption, each with its ideal line.

    Parameters
    ----------
    rows : `model`, `assumption` (low, high or empty), `nodes`, `images_per_s`, `efficiency` of each.
    published : `nodes` and `images_per_s` of a published result to mark; None: no mark.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = _figure(len(models))
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for number, assumption in enumerate(dict.fromkeys(row["assumption"] for row in rows)):
            found = sorted((r for r in rows if (r["model"], r["assumption"]) == (model, assumption)), key=lambda row: row["nodes"])
            nodes, named = [row["nodes"] for row in found], f" ({assumption})" if assumption else ""
            axes.plot(nodes, [row["images_per_s"] for row in found], color=f"C{number}", marker="o", label=f"predicted{named}")
            ideal = [row["images_per_s"] / row["efficiency"] for row in found]
            axes.plot(nodes, ideal, color=f"C{number}", linestyle=":", label=f"if communication took no time{named}")
        if published:
            axes.plot(
                published["nodes"], published["images_per_s"], marker="*", markersize=13, color="k", linestyle="none", label="published"
            )
        axes.set(xlabel="nodes", ylabel="images/s", title=f"{model}: predicted, not measured", xlim=(0, None), ylim=(0, None))
        axes.set_xticks(sorted({row["nodes"] for row in rows}))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=DPI)


def plot_steps(rows: Mapping[str, Sequence[dict]], processor: str, path: Path) -> None:
    """Draw images/s of every way to run a training step, a panel per network, two in a row: a bar each with its quartiles, hcsdl's own in another colour.

    Parameters
    ----------
    rows : by network: `letter`, `title`, `status`, `images_per_s`, `q1_images_per_s`, `q3_images_per_s`, `mfu` of each; only `status` measured is drawn.
    processor : its name, for the title.
    """
    columns = min(2, len(rows))
    lines = -(-len(rows) // columns)
    figure = _figure(columns, lines)
    for axes, (model, all_rows) in zip_longest(figure.subplots(lines, columns, squeeze=False).flat, rows.items(), fillvalue=("", [])):
        if not model:
            axes.set_axis_off()
            continue
        found = [row for row in all_rows if row["status"] == "measured"]
        rates = [row["images_per_s"] for row in found]
        spread = [
            [row["images_per_s"] - row["q1_images_per_s"] for row in found],
            [row["q3_images_per_s"] - row["images_per_s"] for row in found],
        ]
        colours = ["C1" if "hcsdl" in row["title"] else "C0" for row in found]
        axes.barh(range(len(found)), rates, xerr=spread, color=colours, error_kw={"ecolor": "0.3", "capsize": 2})
        for place, row in enumerate(found):
            said = f"{row['images_per_s']:.3g}  (mfu {row['mfu']:.2f})"
            axes.annotate(said, (row["q3_images_per_s"], place), (5, 0), textcoords="offset points", va="center", fontsize="small")
        axes.set_yticks(range(len(found)), [f"{row['letter']}  {row['title']}" for row in found], fontsize="small")
        axes.invert_yaxis()
        axes.set(xlabel="images/s", title=model, xlim=(0, 1.6 * max((row["q3_images_per_s"] for row in found), default=1)))
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(f"training steps on {processor}: medians and quartiles\nmfu: share of the matrix product's GFLOP/s")
    figure.savefig(path, dpi=DPI)
