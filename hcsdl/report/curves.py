"""How a run went: loss and accuracy against epochs, where its time went, and the facts that make it repeatable.

In: journal lines and a summary. Out: `Picture`s and rows of a table. Promised: nothing is smoothed without the raw values beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from hcsdl.report.picture import COLOURS, GREY, WIDTH_IN, Picture, styled

FLAT = 0.02  # accuracy gained over the last third of the evaluations below which a curve is called flat. A guess
PARTS = {
    "forward_backward_s": "network, forward and backward",
    "data_s": "waiting for fields",
    "exposed_communication_s": "waiting for other ranks",
    "optimizer_s": "optimizer",
}
FIGURES = {"well_accuracy": "wells", "val_accuracy": "fields"}


@styled()
def loss_picture(steps: Sequence[dict], *, name: str = "loss") -> Picture:
    """Return training loss and learning rate against epochs.

    Parameters
    ----------
    steps : journal lines of event "step": epoch, loss, learning_rate; at least one.
    """
    epochs, loss = np.array([s["epoch"] for s in steps]), np.array([s["loss"] for s in steps], dtype=float)
    figure = Figure(figsize=(WIDTH_IN, 4.6))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot(epochs, loss, color=COLOURS[5], linewidth=0.8, alpha=0.8, label="mini-batches, as journalled")
    width = max(1, len(loss) // 20)
    padded = np.pad(loss, (width // 2, width - 1 - width // 2), mode="edge")
    upper.plot(epochs, np.convolve(padded, np.ones(width) / width, mode="valid"), color=COLOURS[0], label=f"mean of {width}")
    upper.set(ylabel="loss (cross-entropy)", ylim=(0, None))
    upper.legend()
    lower.plot(epochs, [s["learning_rate"] for s in steps], color=COLOURS[2])
    lower.set(xlabel="epochs (passes over the training fields)", ylabel="learning\nrate", ylim=(0, None))
    third = max(1, len(loss) // 10)
    first, last = loss[:third].mean(), loss[-third:].mean()
    title = f"The training loss fell from {first:.2f} to {last:.2f} in {epochs[-1]:.3g} epochs"
    if last >= first:
        title = f"The network did not learn: its training loss went from {first:.2f} to {last:.2f} in {epochs[-1]:.3g} epochs"
    reading = (
        "Loss is how badly the network predicts the fields it trains on; it should fall and level off as the learning rate goes to its end."
    )
    return Picture(name, title, reading, figure)


@styled()
def accuracy_picture(history: Sequence[dict], summary: dict, *, name: str = "accuracy") -> Picture:
    """Return accuracy of held-out fields and wells against epochs, beside the baseline.

    Parameters
    ----------
    history : evaluations: epoch, val_accuracy, well_accuracy; at least one.
    summary : baseline_accuracy, baseline_well_accuracy (None where not made), split, leaky.
    """
    epochs = [e["epoch"] for e in history]
    figure = Figure(figsize=(WIDTH_IN, 3.9))
    axes = figure.subplots()
    for number, (key, label) in enumerate(FIGURES.items()):
        axes.plot(epochs, [e[key] for e in history], "o-" if number == 0 else "s--", color=COLOURS[number], label=f"{label}, network")
        baseline = summary.get("baseline_well_accuracy" if key == "well_accuracy" else "baseline_accuracy")
        if baseline is not None:
            axes.axhline(baseline, color=COLOURS[number], linestyle=":", linewidth=1.4, label=f"{label}, baseline")
    axes.axhline(1 / max(1, len(summary["classes"])), color=GREY, linewidth=0.8, label="chance")
    leaky = "  [LEAKY]" if summary.get("leaky") else ""
    axes.set(
        xlabel="epochs (passes over the training fields)",
        ylabel=f"accuracy on held-out fields\nand wells (split {summary['split']}){leaky}",
        ylim=(0, 1.02),
    )
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    last, before = history[-1]["well_accuracy"], [e["well_accuracy"] for e in history[: -max(1, len(history) // 3)]]
    title = f"{last:.0%} of the held-out wells are right after {epochs[-1]:.3g} epochs"
    baseline = summary.get("baseline_well_accuracy")
    if baseline is not None:
        title += f", {100 * abs(last - baseline):.0f} points {'above' if last >= baseline else 'BELOW'} the baseline"
    if before:
        title += ", still rising" if last - max(before) > FLAT else ", no longer rising"
    reading = (
        "Each point is an evaluation on fields the network does not train on; the figure that counts is the last point, fixed beforehand, and "
        "the dotted lines are what simple intensity features reach."
    )
    return Picture(name, title, reading, figure)


def _share(value: float) -> str:
    return "below 1%" if 0 < value < 0.01 else f"{value:.0%}"


@styled()
def speed_picture(steps: Sequence[dict], summary: dict, *, name: str = "speed") -> Picture:
    """Return images/s against epochs, and what a step's time is spent on.

    Parameters
    ----------
    steps : journal lines of event "step": epoch, images_per_s; at least one.
    summary : step_seconds, images_per_s, world_size.
    """
    figure = Figure(figsize=(WIDTH_IN, 4.2))
    upper, lower = figure.subplots(2, 1, height_ratios=[2.4, 1])
    upper.plot([s["epoch"] for s in steps], [s["images_per_s"] for s in steps], color=COLOURS[0], linewidth=1.2)
    upper.axhline(summary["images_per_s"], color=GREY, linestyle=":", label=f"the whole run: {summary['images_per_s']:.3g}")
    upper.set(xlabel="epochs", ylabel="images/s", ylim=(0, None))
    upper.legend(loc="lower right")
    spent = {label: summary["step_seconds"].get(key) or 0.0 for key, label in PARTS.items()}
    total, left = sum(spent.values()) or 1.0, 0.0
    for number, (label, value) in enumerate(spent.items()):
        lower.barh(0, value / total, left=left, color=COLOURS[number], edgecolor="white", label=f"{label}, {_share(value / total)}")
        left += value / total
    lower.set(xlabel=f"share of a step ({total:.3g} s)", yticks=[], xlim=(0, 1))
    lower.spines["left"].set_visible(False)
    figure.legend(*lower.get_legend_handles_labels(), loc="outside lower left", ncols=1)
    waits = [(spent[PARTS[key]] / total, PARTS[key]) for key in ("data_s", "exposed_communication_s")]
    share, what = max(waits)
    title = f"{summary['images_per_s']:.3g} images/s on {summary['world_size']} rank{'s' * (summary['world_size'] > 1)}; " + (
        f"{share:.0%} of a step is {what}"
        if share >= 0.1
        else f"{spent[PARTS['forward_backward_s']] / total:.0%} of a step is the network itself"
    )
    reading = "Above, throughput as the run went on (dips are checkpoints or other work on the machine); below, what the first rank did in a step."
    return Picture(name, title, reading, figure)


def facts(summary: dict, command: str) -> list[tuple[str, str]]:
    """Return speed, memory, machine, versions and the exact command as pairs of what and value."""
    height, width = summary["image_size"]
    ranks, threads = summary["world_size"], summary["threads_per_rank"]
    minutes = summary["training_seconds"] / 60
    rows = [
        ("exact command", f"`{command}`"),
        ("network", f"{summary['model']}, {summary['num_parameters'] / 1e6:.3g} M parameters"),
        ("fields", f"{len(summary['channels'])} × {height} × {width} pixels, whole ({', '.join(summary['channels'])})"),
        (
            "trained on",
            f"{summary['num_train_fields']} of {summary['num_fields']} fields, {summary['epochs']:.3g} epochs, {summary['steps']} steps",
        ),
        ("held out", summary["split_sentence"]),
        ("speed", f"{summary['images_per_s']:.3g} images/s; {minutes:.3g} minutes of training, {summary['attempts']} attempt(s)"),
        ("memory", f"{summary['peak_rss_gib']:.3g} GiB at most in a rank"),
        ("machine", f"{summary['processor']}; {ranks} rank(s) × {threads} thread(s)"),
        ("kernels", f"{summary['kernels']}, {summary['precision']}: {summary['kernels_reason']}"),
        ("ranks talk by", f"{summary['backend']}: {summary['backend_reason']}" if ranks > 1 else "one rank, nothing to say"),
        ("versions", ", ".join(f"{package} {version}" for package, version in summary["versions"].items())),
        ("commit", str(summary["git_commit"] or "not from a checkout")),
        ("seed, hashes", f"seed {summary['seed']}, configuration {summary['config_hash']}, index {summary['index_hash']}"),
    ]
    if summary["skipped_fields"]:
        rows.append(
            ("skipped fields", f"{len(summary['skipped_fields'])} unreadable: {', '.join(map(str, summary['skipped_fields'][:5]))}")
        )
    return rows
