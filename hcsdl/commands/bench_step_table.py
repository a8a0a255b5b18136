"""What `hcsdl bench step` makes of its turns: rows, tables, and whether each target is met. Nothing is measured or read in here.

In: turns, seconds. Out: dicts for the JSON, text for the terminal.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hcsdl.commands.bench_profile import pointwise_gain
from hcsdl.commands.bench_step_variants import VARIANTS, Variant
from hcsdl.config import TrainingConfig

PRODUCT = "matrix product"
PUBLISHED_PER_CORE = 0.375
"""Images a second and core of M-CNN: Datta et al. 2019, arXiv:1910.04852: more than 120 images/s on 8 nodes × 4 ranks × 10 cores; fp32."""
MEMORIES_GIB = {"cpu": (64, 192, 512), "cuda": (24, 80, 141)}  # of servers, of GPUs
MEMORY_SHARE = TrainingConfig().memory_share  # what training.mini_batch_size=auto would fill
OTHERS = ("fp32", "bf16", "ipex_recipe", "bf16_preloaded", "ipex_recipe_preloaded", "compiled")


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def summarise(
    variants: Sequence[Variant],
    turns: Sequence[dict],
    started: dict[str, dict],
    ended: dict[str, dict],
    images: int,
    flop: int,
    product: dict,
    ranks: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a row per variant, and the matrix product's.

    Parameters
    ----------
    turns : `variant`, `step_s` (list), `peak_rss_gib` of each.
    started : seconds to the end of the first step and what the variant told, by name.
    ended : `status` (missing or failed) and `reason`, by name. What fails after some turns counts as failed.
    images : images a step, of all ranks.
    flop : operations of an image's share of a step.
    product : what the matrix product told: `flop` of one, `precision`.
    ranks : processes that multiply at the same time.
    """
    products_s = [s for one in turns if one["variant"] == PRODUCT for s in one["step_s"]]
    rates = [ranks * product["flop"] / s for s in products_s]
    matrix = dict(zip(("q1", "median", "q3"), (rate / 1e9 for rate in quartiles(rates)), strict=True))
    rows = []
    for variant in variants:
        own = [one for one in turns if one["variant"] == variant.name]
        row: dict[str, Any] = {
            "variant": variant.name,
            "letter": variant.letter,
            "title": variant.title,
            "status": "measured",
            "reason": "",
        }
        row |= ended.get(variant.name, {})
        if row["status"] == "measured":
            q1, median, q3 = quartiles([images / s for one in own for s in one["step_s"]])
            row |= {
                "images_per_s": median,
                "q1_images_per_s": q1,
                "q3_images_per_s": q3,
                "steps": sum(len(one["step_s"]) for one in own),
                "rounds": len(own),
                "gflop_per_s": median * flop / 1e9,
                "mfu": median * flop / 1e9 / matrix["median"],
                "peak_rss_gib": max(one["peak_rss_gib"] for one in own),
                "peak_device_gib": max(one.get("peak_device_gib", 0.0) for one in own),
                "start_s": started[variant.name]["seconds"],
                "told": started[variant.name]["told"],
            }
        rows.append(row)
    for row in rows:
        for key, base in (("to_ipex_recipe", "ipex_recipe"), ("to_bf16", "bf16")):
            row[key] = _ratio(rate_of(rows, row["variant"]), rate_of(rows, base))
    return rows, {"unit": "GFLOP/s", "precision": product["precision"], "products": len(rates)} | matrix


def rate_of(rows: Sequence[dict], variant: str) -> float | None:
    """Return a variant's median images/s; None where it was not measured."""
    return next((row.get("images_per_s") for row in rows if row["variant"] == variant), None)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def memory_row(images: Sequence[int], peaks_gib: Sequence[float], device: str = "cpu") -> dict[str, Any]:
    """Return GiB per image from the peaks of a small and a large mini-batch, and the largest one of a rank that has a server, or a GPU, to itself."""
    per_image = (peaks_gib[1] - peaks_gib[0]) / (images[1] - images[0])
    base = peaks_gib[0] - images[0] * per_image
    fits = {str(gib): int((gib * MEMORY_SHARE - base) / per_image) if per_image > 0 else None for gib in MEMORIES_GIB[device]}
    return {"images": list(images), "peaks_gib": list(peaks_gib), "gib_per_image": per_image, "base_gib": base, "largest_mini_batch": fits}


def format_model(model: str, found: dict, ranks: int, threads: int, processor: str) -> str:
    """Return the table of one network."""
    matrix = found["matrix_product"]
    titles = {row["variant"]: _title(row) for row in found["rows"]}
    wide = max(48, *(len(title) + 1 for title in titles.values()))
    lines = [
        f"{model} on {processor}, {ranks} rank{'s' * (ranks > 1)} × {threads} thread{'s' * (threads > 1)}: {found['training_flop'] / 1e9:.1f} GFLOP an "
        f"image; {matrix['precision']} matrix product {matrix['median']:.0f} GFLOP/s ({matrix['q1']:.0f} – {matrix['q3']:.0f})",
        f"    {'variant':<{wide}s}{'images/s':>9s}  {'(quartiles)':<18s}{'steps':>6s}{'GFLOP/s':>9s}{'mfu':>7s}{'÷ c':>7s}{'÷ b':>7s}"
        f"{'GPU, GiB' if found['device'] == 'cuda' else 'RSS, GiB':>10s}{'start, s':>10s}",
    ]
    for row in found["rows"]:
        if row["status"] != "measured":
            what = "not installed or not there" if row["status"] == "missing" else "failed"
            lines.append(f"  {row['letter']} {row['title']:<{wide}s}{what}: {row['reason']}")
            continue
        spread = f"({row['q1_images_per_s']:.3f} – {row['q3_images_per_s']:.3f})"
        lines.append(
            f"  {row['letter']} {titles[row['variant']]:<{wide}s}{row['images_per_s']:9.3f}  {spread:<18s}{row['steps']:6d}{row['gflop_per_s']:9.0f}{row['mfu']:7.3f}"
            f"{_two(row['to_ipex_recipe'])}{_two(row['to_bf16'])}{row['peak_device_gib'] or row['peak_rss_gib']:10.2f}{row['start_s']:10.1f}"
        )
    if found["profile"]:
        ceiling = found["profile"]["ceiling"]
        lines.append(
            f"    ceiling {ranks * ceiling['images_per_s']:.3f} images/s: best measured convolutions + bytes that must move ÷ copy rate"
        )
    return "\n".join(lines)


def _title(row: dict) -> str:
    told = row.get("told", {}).get("kernels", "")
    return row["title"] + (f" ({told})" if told and told not in row["title"] else "")


def legend(device: str) -> str:
    """Return what the columns of `format_model`'s tables mean."""
    memory = "GPU: the most memory of a GPU" if device == "cuda" else "RSS: the most memory of a rank"
    return (
        "images/s: median of all steps timed, `steps` of them; mfu: GFLOP/s ÷ the matrix product's; ÷ c, ÷ b: images/s against rows c and b;\n"
        f"{memory}; start: to the end of the first step. `hcsdl train` runs as row g with nothing set"
    )


def _two(ratio: float | None) -> str:
    return f"{'–':>7s}" if ratio is None else f"{ratio:7.2f}"


def format_memory(memory: dict[str, dict]) -> str:
    """Return the table of memory per image and of the largest mini-batches."""
    lines = []
    for name, row in memory.items():
        if "reason" in row:
            lines.append(f"  memory of {name}: failed: {row['reason']}")
            continue
        fits = ", ".join(f"{'?' if number is None else number} in {gib} GiB" for gib, number in row["largest_mini_batch"].items())
        lines.append(
            f"  {VARIANTS[name].letter} {VARIANTS[name].title}: memory {row['base_gib']:.2f} GiB + {row['gib_per_image']:.3f} an image; "
            f"largest mini-batch of one rank in {MEMORY_SHARE:.0%} of a machine's memory: {fits}"
        )
    return "\n".join(lines)


def targets(found: dict[str, dict], cores: int) -> list[dict[str, Any]]:
    """Return a row per target of this project: what, `target`, `measured` (None: not measured), `met` (None), `reason`; `cores`: compute threads."""
    rows: list[dict[str, Any]] = []

    def judge(what: str, target: float, measured: float | None, reason: str = "", least: bool = True, note: str = "") -> None:
        met = None if measured is None else (measured >= target if least else measured <= target)
        said = note if measured is not None else f"not measured: {reason}"
        rows.append({"what": what, "target": target, "least": least, "measured": measured, "met": met, "reason": said})

    def rate(model: str, variant: str) -> float | None:
        return rate_of(found[model]["rows"], variant) if model in found else None

    def why(model: str, *variants: str) -> str:
        if model not in found:
            return f"{model} is not in bench.models"
        for name in variants:
            row = next((row for row in found[model]["rows"] if row["variant"] == name), None)
            if row is None:
                return f"{name} is not in bench.variants"
            if row["status"] != "measured":
                return f"{name}: {row['reason']}"
        return "bench.memory=false"

    for model, least in (("resnet50", 1.7), ("mcnn", 2.0)):
        ratio = _ratio(rate(model, "hcsdl_best"), rate(model, "ipex_recipe"))
        judge(f"{model}: hcsdl ÷ IPEX as documented (c)", least, ratio, why(model, "ipex_recipe", "hcsdl_best"))
    per_core = _ratio(rate("mcnn", "hcsdl_best"), cores * PUBLISHED_PER_CORE)
    judge("mcnn: images/s per core ÷ the published 0.375", 5.0, per_core, why("mcnn", "hcsdl_best"))
    for model, least in (("resnet50", 1.10), ("mcnn", 1.10), ("resnet18", 1.03), ("resnet34", 1.03)):
        others = {name: value for name in OTHERS if (value := rate(model, name)) is not None}
        fastest = max(others, key=others.get, default="")  # type: ignore[arg-type]
        judge(
            f"{model}: hcsdl ÷ the fastest of all others{f' ({fastest})' * bool(fastest)}",
            least,
            _ratio(rate(model, "hcsdl_best"), others.get(fastest)),
            why(model, "hcsdl_best", *OTHERS),
            note=f"without {', '.join(name for name in OTHERS if name not in others)}" if len(others) < len(OTHERS) else "",
        )
    for model in ("resnet18", "resnet34", "resnet50", "mcnn"):
        profile = (found.get(model) or {}).get("profile")
        reason = why(model) if model not in found else found[model]["profile_reason"]
        ranks = found[model].get("ranks", 1) if model in found else 1
        ceiling = profile and ranks * profile["ceiling"]["images_per_s"]
        best = rate(model, "hcsdl_best")
        judge(f"{model}: hcsdl ÷ its own ceiling", 0.93, _ratio(best, ceiling), reason if best is not None else why(model, "hcsdl_best"))
        judge(
            f"{model}: all but convolutions and products ÷ (bytes ÷ copy rate)",
            1.5,
            profile and profile["others_to_bytes"],
            reason,
            least=False,
        )
        gain = pointwise_gain(profile) if profile else None
        if model == "resnet50":
            judge(f"{model}: weight gradients of deep 1×1 convolutions ÷ stock", 1.25, gain, reason)
    memory = found["resnet50"]["memory"] if "resnet50" in found else {}
    for name, most in (("hcsdl_best", 1.0), ("hcsdl_lean", 0.6)):
        ratio = _ratio(memory.get(name, {}).get("gib_per_image"), memory.get("bf16", {}).get("gib_per_image"))
        judge(f"resnet50: memory per image, {VARIANTS[name].title} ÷ b", most, ratio, why("resnet50", "bf16", name), least=False)
    lean = _ratio(rate("resnet50", "hcsdl_lean"), rate("resnet50", "hcsdl_best"))
    judge("resnet50: lean mode's speed ÷ hcsdl's", 0.9, lean, why("resnet50", "hcsdl_best", "hcsdl_lean"))
    for model in ("resnet18", "resnet34", "resnet50", "mcnn"):
        start = {row["variant"]: row.get("start_s") for row in found[model]["rows"]} if model in found else {}
        both = start.get("hcsdl_best"), start.get("bf16")
        more = both[0] - both[1] if None not in both else None  # type: ignore[operator]
        judge(f"{model}: start-up to first step, seconds beyond b's", 20.0, more, why(model, "hcsdl_best", "bf16"), least=False)
    return rows


def format_targets(rows: Sequence[dict]) -> str:
    """Return the table of targets."""
    wide = max(76, *(len(row["what"]) + 1 for row in rows))
    lines = [f"{'target':<{wide}s}{'wanted':>9s}{'measured':>10s}"]
    for row in rows:
        said = "; ".join(word for word in ({True: "met", False: "NOT MET", None: ""}[row["met"]], row["reason"]) if word)
        value = "–" if row["measured"] is None else f"{row['measured']:.2f}"
        lines.append(f"{row['what']:<{wide}s}{'≥' if row['least'] else '≤'}{row['target']:8.2f}{value:>10s}  {said}")
    return "\n".join(lines)
