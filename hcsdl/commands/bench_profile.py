"""`hcsdl bench profile`: where a training step's time goes, and the ceiling its convolutions and bytes set.

In: a `BenchProfileCommand`. Out: tables on standard output and `result.json` in the benchmark's folder. The ceiling of a network:

    seconds a step = sum over its convolutions of the best measured time of each product (stock, IPEX's, hcsdl's, or a matrix product)
                   + operations of fully connected layers ÷ matrix product's rate
                   + bytes that must move ÷ measured copy rate

The bytes are `hcsdl.models.counts.Counts.step_bytes`: what batch norm, ReLU, residual sums, pooling and the optimizer must read and write in bf16 when
every pass is fused that can be; ResNet-50: 5.7 GB an image of 3 × 1024 × 1280. Copy rate counts bytes read and bytes written.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from hcsdl.commands.bench_ranks import RESULT, head, open_folder
from hcsdl.commands.bench_step_variants import environments
from hcsdl.config import BenchProfileCommand, ExitCode
from hcsdl.distributed.workers import WorkerFailed, Workers
from hcsdl.machine.cores import processor
from hcsdl.machine.placement import Place, plan_places
from hcsdl.machine.preloading import TUNING
from hcsdl.machine.topology import read_machine
from hcsdl.training.run_folder import write_json

log = logging.getLogger(__name__)

COMMAND = "bench profile"
WORKER = "hcsdl.commands.bench_step_worker"


def run(config: BenchProfileCommand) -> int:
    """Profile each network in processes of its own; return the exit code."""
    places = plan_places(read_machine(), config.distributed.ranks or 1, config.machine)
    folder = open_folder(COMMAND, config, config.bench.output)
    profiles: dict[str, dict] = {}
    failed: dict[str, str] = {}
    for model in config.bench.models:
        log.info("%s …", model)
        try:
            profiles[model] = judged(profile_in_process(model, config, config.kernels.name, places, folder), config.bench.mini_batch_size)
        except WorkerFailed as error:
            failed[model] = str(error)
            print(f"{model}: failed: {error}")
            continue
        print(format_profile(model, profiles[model], places[0].threads, config.bench.operators), flush=True)
    result = head(COMMAND, config, len(places), 1) | {"threads_per_rank": places[0].threads, "profiles": profiles, "failed": failed}
    write_json(folder / RESULT, result)
    print(f"saved in {folder}", flush=True)
    return ExitCode.FAILED if failed else ExitCode.DONE


def profile_in_process(model: str, config: Any, kernels: str, places: tuple[Place, ...], folder: Path) -> dict:
    """Return what `bench_profile_measure.profile` finds for `model`: each rank measures at the same time, and the first one's figures count.

    `config` is that of `bench step` or `bench profile`. Raises WorkerFailed.
    """
    bench = config.bench
    task = {
        "kind": "profile",
        "device": config.machine.device,
        "variant": "",
        "model": model,
        "kernels": kernels,
        "rounds": bench.rounds,
        "width": bench.width,
        "mini_batch_size": bench.mini_batch_size,
        "image_size": bench.image_size,
        "seed": config.seed,
        "allocator": config.machine.allocator,
        "distributed": {"backend": "gloo"},
    }
    with tempfile.TemporaryDirectory() as cache:
        started = environments(None, places, None, Path(cache))
        workers = Workers(
            WORKER, task, places, started, without=TUNING, log=folder / "logs" / f"{model}_profile.log", bound=config.machine.pin
        )
        try:
            return workers.ask(do="profile")[0]
        finally:
            workers.close()


def judged(profile: dict, mini_batch_size: int) -> dict:
    """Return a profile with what follows from it: best times, the ceiling, and what everything else but convolutions and products costs."""
    for row in profile["convolutions"]:
        kinds = dict.fromkeys(kind for ways in row["seconds"].values() for kind in ways)
        best = {kind: min((ways[kind], way) for way, ways in row["seconds"].items() if kind in ways) for kind in kinds}
        row["best"] = {kind: {"way": way, "seconds": seconds} for kind, (seconds, way) in best.items()}
        row["flop_per_s"] = {
            kind: {way: mini_batch_size * row["flop"] / ways[kind] for way, ways in row["seconds"].items() if kind in ways}
            for kind in kinds
        }
    convolutions_s = sum(row["count"] * sum(one["seconds"] for one in row["best"].values()) for row in profile["convolutions"])
    linear_s = mini_batch_size * profile["linear_flop"] / profile["matrix_flop_per_s"]
    bytes_s = profile["step_bytes"] / profile["copy_bytes_per_s"]
    watched_s = sum(row["seconds"] for row in profile["operators"])
    others_s = sum(row["seconds"] for row in profile["operators"] if not row["product"])
    for row in profile["operators"]:
        row["share"] = row["seconds"] / watched_s
    ceiling_s = convolutions_s + linear_s + bytes_s
    return profile | {
        "ceiling": {
            "convolutions_s": convolutions_s,
            "linear_s": linear_s,
            "bytes_s": bytes_s,
            "step_s": ceiling_s,
            "images_per_s": mini_batch_size / ceiling_s,
            "reached": ceiling_s / profile["step_s"],
        },
        "others_s": others_s,
        "others_to_bytes": others_s / bytes_s,
    }


def pointwise_gain(profile: dict) -> float | None:
    """Return how much faster hcsdl's weight gradients of deep 1×1 convolutions are than the stock convolution's, time of all together; None without."""
    deep = [row for row in profile["convolutions"] if row["pointwise"] and row["deep"]]
    if not deep:
        return None
    stock, ours = (sum(row["count"] * row["seconds"][way]["weight_gradient"] for row in deep) for way in ("stock", "hcsdl"))
    return stock / ours


def format_profile(model: str, profile: dict, threads: int, operators: int) -> str:
    """Return the three tables of one network: operators, convolutions, ceiling."""
    ceiling, matrix = profile["ceiling"], profile["matrix_flop_per_s"]
    lines = [
        f"{model}, kernels {profile['kernels']}, {profile['precision']}, on {processor()}, {threads} thread{'s' * (threads > 1)}: a step takes "
        f"{profile['step_s']:.3f} s. Matrix product {matrix / 1e9:.0f} GFLOP/s, copy {profile['copy_bytes_per_s'] / 1e9:.1f} GB/s (read + written)",
        f"  {'operator':<44s}{'calls':>6s}{'ms':>9s}{'share':>7s}{'MB':>9s}{'GB/s':>7s}    MB: of the tensors it is given",
    ]
    for row in profile["operators"][:operators]:
        rate = row["bytes"] / row["seconds"] / 1e9 if row["seconds"] > 0 else 0.0
        lines.append(
            f"  {row['operator'][:43]:<44s}{row['calls']:6d}{row['seconds'] * 1e3:9.1f}{row['share']:7.1%}{row['bytes'] / 1e6:9.1f}{rate:7.1f}"
        )
    ways = list(dict.fromkeys(way for row in profile["convolutions"] for way in row["seconds"]))
    lines += [
        f"  convolutions: GFLOP/s by {', '.join(ways)}; * the best, – not to be had this way; the matrix product's is {matrix / 1e9:.0f}; n×: how many the network has",
        f"  {'':<32s}{'':>3s}"
        + "".join(f"  {kind.replace('_', ' '):<{8 * len(ways)}s}" for kind in ("forward", "input_gradient", "weight_gradient")),
    ]
    for row in profile["convolutions"]:
        cells = "".join("  " + "".join(_rate(row, kind, way) for way in ways) for kind in ("forward", "input_gradient", "weight_gradient"))
        lines.append(f"  {row['convolution']:<32s}{row['count']:>2d}×{cells}")
    lines += [
        f"  ceiling {ceiling['images_per_s']:.3f} images/s: convolutions {ceiling['convolutions_s']:.3f} s, fully connected {ceiling['linear_s']:.3f} s, "
        f"{profile['step_bytes'] / 1e9:.2f} GB ({profile['moved_bytes'] / 1e9:.2f} an image, the rest the optimizer's) {ceiling['bytes_s']:.3f} s; "
        f"this step reaches {ceiling['reached']:.2f} of it",
        f"  all that is no convolution or matrix product: {profile['others_s']:.3f} s, {profile['others_to_bytes']:.2f} × what its bytes take at the copy rate",
    ]
    return "\n".join(lines)


def _rate(row: dict, kind: str, way: str) -> str:
    rate = row["flop_per_s"].get(kind, {}).get(way)
    if rate is None:
        return f"{'–':>7s} "
    return f"{rate / 1e9:7.0f}{'*' if row['best'][kind]['way'] == way else ' '}"
