"""`hcsdl bench scale`: how fast a cluster would train, predicted from what is measured on these ranks.

In: a `BenchScaleCommand`. Out: tables on standard output; `result.json` and `scaling.png` in the benchmark's folder. The formulas and their sources
stand in `hcsdl.distributed.scaling`. With `bench.verify` the step over these very ranks is predicted and taken, in interleaved rounds.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hcsdl.commands.bench_ranks import RESULT, head, run_on_ranks
from hcsdl.config import BenchScaleCommand, BenchScaleConfig, ConfigError
from hcsdl.distributed import scaling
from hcsdl.distributed.identity import Identity
from hcsdl.training.run_folder import write_json

if TYPE_CHECKING:
    from hcsdl.distributed.group import Group

log = logging.getLogger(__name__)

COMMAND = "bench scale"
ORIGINAL = {"nodes": 8, "ranks_per_node": 4, "cores_per_rank": 10, "image_px": [1024, 1280], "images": 10104, "epochs": 22.0}
PUBLISHED = {"nodes": 8, "images_per_s": 120.0, "time_to_train_s": 31 * 60.0}
"""The result that started the project: 8 two-socket servers, 32 workers, more than 120 images/s, 31 minutes; fp32, 2018."""


def run(config: BenchScaleCommand) -> int:
    """Start the ranks, or be one; return the exit code."""
    return run_on_ranks(COMMAND, config, config.bench.output, least_ranks=2)


@dataclass(frozen=True)
class Here:
    """What one round measured on these ranks, or the medians of several: seconds of an all_reduce by bytes; by network, the steps by
    mini-batch size and how computing and communicating hold each other up."""

    ranks: int
    hosts: int
    threads: int
    all_reduces: Mapping[int, float]
    timelines: Mapping[str, Mapping[int, scaling.Timeline]]
    overlaps: Mapping[str, scaling.Overlap]

    def all_reduce(self) -> scaling.AllReduce:
        """Return the all_reduce over these ranks."""
        sizes = sorted(self.all_reduces)
        return scaling.measured_s(sizes, [self.all_reduces[size] for size in sizes])


def typical(rounds: Sequence[Here]) -> Here:
    """Return the medians of several rounds, of each figure by itself."""
    common = set.intersection(*(set(one.all_reduces) for one in rounds))
    return dataclasses.replace(
        rounds[0],
        all_reduces={size: statistics.median(one.all_reduces[size] for one in rounds) for size in sorted(common)},
        timelines={
            name: {fields: scaling.median_timeline([one.timelines[name][fields] for one in rounds]) for fields in steps}
            for name, steps in rounds[0].timelines.items()
        },
        overlaps={
            name: scaling.Overlap(
                statistics.median(one.overlaps[name].compute_rate for one in rounds),
                statistics.median(one.overlaps[name].communication_rate for one in rounds),
            )
            for name in rounds[0].overlaps
        },
    )


@dataclass
class Taken:
    """Steps taken to check predictions, a figure a round: one rank alone while the others wait, and real steps of all."""

    alone_s: list[float] = field(default_factory=list)
    real_s: list[float] = field(default_factory=list)


def measure(config: BenchScaleCommand, identity: Identity, folder: Path | None) -> None:
    """Measure as one rank; rank 0, which has the folder, predicts, prints and saves."""
    from hcsdl.distributed.group import Group

    group = Group(identity, config.distributed)
    hosts = len(set(group.all_gather_object(identity.host)))
    check_link(config.bench, group.world_size, hosts)
    rounds, taken = measure_rounds(config, group, hosts)
    if folder is not None:
        bench, here = config.bench, typical(rounds)
        rows = [row for name in bench.models for row in predictions(name, here, bench)]
        verified = [verify(name, rounds, taken[name], bench) for name in taken]
        published = PUBLISHED if all(_of_original(bench, here, key) for key in ORIGINAL) else None
        save(folder, config, group, rounds, rows, verified, published)
        print(format_predictions(rows, bench, here, published))
        if verified:
            print(format_verified(verified, here))
        print(f"saved in {folder}", flush=True)
    group.close()


def check_link(bench: BenchScaleConfig, ranks: int, hosts: int) -> None:
    """Raise ConfigError where the link between nodes is neither given nor measured, or both; or nothing can be predicted from what is."""
    if hosts > 1 and bench.bandwidth_gbit_s is not None:
        raise ConfigError(
            f"over several hosts the link between them is measured. These ranks are on {hosts} and bench.bandwidth_gbit_s={bench.bandwidth_gbit_s:g}: "
            "set it and bench.latency_us to null."
        )
    if hosts == 1 and bench.bandwidth_gbit_s is None and max(bench.nodes) > 1:
        raise ConfigError(
            "bench.bandwidth_gbit_s and bench.latency_us must be given where all ranks are on one host, or bench.nodes be [1]. Got null."
        )
    if not predictable_nodes(bench, ranks, hosts):
        raise ConfigError(
            f"bench.nodes must have more than one node where {ranks} ranks measure on {hosts} hosts: a node's ranks talk through its memory. "
            "Got [1]; for that, start all ranks on one host."
        )


def predictable_nodes(bench: BenchScaleConfig, ranks: int, hosts: int) -> list[int]:
    """Return the `bench.nodes` of which what these ranks measure tells: on several hosts that is the link, not what the ranks of one node share."""
    alone = hosts == 1 or (bench.ranks_per_node or ranks // hosts) == 1
    return [nodes for nodes in bench.nodes if nodes > 1 or alone]


def measure_rounds(config: BenchScaleCommand, group: Group, hosts: int) -> tuple[list[Here], dict[str, Taken]]:
    """Measure everything `bench.rounds` times, in turn, after a round that is not counted; real steps in between with `bench.verify`."""
    import torch

    from hcsdl.commands.bench_scale_measure import SIZES, Workload, choose_backend, measure_overlap, slowest, time_all_reduces
    from hcsdl.kernels import choose_kernels

    bench, kernels = config.bench, choose_kernels(config.kernels.name)
    group.check_equal("kernels", kernels)
    choose_backend(config, group)
    silent = {name: Workload(name, config, group, kernels, silent=True) for name in bench.models}
    real = {name: Workload(name, config, group, kernels, silent=False) for name in bench.models if bench.verify}
    say = log.info if group.rank == 0 else log.debug
    say("%d ranks on %d host%s, %s, kernels %s", group.world_size, hosts, "s" * (hosts > 1), group.backend, kernels.name)
    largest, sizes = max(bench.mini_batches), set(SIZES)
    for workload in (*silent.values(), *real.values()):
        for fields in (*bench.mini_batches, largest):  # the second step is the first with the final buckets
            num_bytes = workload.step(fields).num_bytes
        sizes |= {size for size in num_bytes if size >= min(SIZES)}
    rounds, taken = [], {name: Taken() for name in real}
    for number in range(bench.rounds):
        say("round %d of %d", number + 1, bench.rounds)
        all_reduces = time_all_reduces(sizes, next(iter(silent.values())).dtype, group)
        timelines, overlaps = {}, {}
        for name, workload in silent.items():
            steps: dict[int, list[scaling.Timeline]] = {fields: [] for fields in bench.mini_batches}
            real_s = []
            for _ in range(bench.steps):
                for fields in bench.mini_batches:
                    steps[fields].append(slowest(workload.step(fields), group))
                if name in real:
                    real_s.append(slowest(real[name].step(largest), group).step_s)
            timelines[name] = {fields: scaling.median_timeline(many) for fields, many in steps.items()}
            overlaps[name] = measure_overlap(workload, largest, timelines[name][largest].backward_s, all_reduces)
            if name in real:
                taken[name].real_s.append(statistics.fmean(real_s))
                taken[name].alone_s.append(group.largest(workload.step(largest, together=False).step_s if group.rank == 0 else 0.0))
        rounds.append(Here(group.world_size, hosts, torch.get_num_threads(), all_reduces, timelines, overlaps))
    return rounds, taken


def cluster_all_reduce(here: Here, bench: BenchScaleConfig, nodes: int, efficiency: float) -> scaling.AllReduce | None:
    """Return the all_reduce over `nodes` nodes; None where one rank is all there is.

    With a given link: measured here among the ranks of a node, by the formula between the nodes. Without one, over several hosts: what was measured
    here, as a ring over all ranks.
    """
    ranks_per_node = bench.ranks_per_node or here.ranks // here.hosts
    if nodes * ranks_per_node == 1:
        return None
    if bench.bandwidth_gbit_s is None:
        return scaling.on_peers(here.all_reduce(), here.ranks, nodes * ranks_per_node)
    within = scaling.on_peers(here.all_reduce(), here.ranks, ranks_per_node) if ranks_per_node > 1 else None
    latency_s, bytes_per_s = bench.latency_us * 1e-6, bench.bandwidth_gbit_s * 1e9 / 8 * efficiency  # type: ignore[operator]
    return scaling.hierarchical(within, lambda num_bytes: scaling.ring_s(num_bytes, nodes, latency_s, bytes_per_s))


def predictions(name: str, here: Here, bench: BenchScaleConfig) -> list[dict]:
    """Return a row per number of nodes and assumption for one network: what is predicted for the cluster that `bench` describes."""
    ranks_per_node, cores = bench.ranks_per_node or here.ranks // here.hosts, bench.cores_per_rank or here.threads
    mini_batch = bench.mini_batch or max(bench.mini_batches)
    rows = []
    for nodes in predictable_nodes(bench, here.ranks, here.hosts):
        for assumption, speed, efficiency in zip(("low", "high"), bench.core_speed, bench.network_efficiency, strict=False):
            timeline = scaling.at_mini_batch(here.timelines[name], mini_batch).times(here.threads / (cores * speed))
            overlap = here.overlaps[name].with_cores(here.threads, cores)
            all_reduce = cluster_all_reduce(here, bench, nodes, efficiency)
            found = scaling.predict(timeline, all_reduce, overlap, nodes * ranks_per_node, mini_batch)
            rows.append(
                {
                    "model": name,
                    "assumption": assumption if len(bench.core_speed) > 1 else "",
                    "nodes": nodes,
                    "ranks": nodes * ranks_per_node,
                    "step_s": found.step_s,
                    "exposed_s": found.exposed_s,
                    "images_per_s": found.images_per_s,
                    "efficiency": found.efficiency,
                    "time_to_train_s": bench.images * bench.epochs / found.images_per_s,
                }
            )
    return rows


def verify(name: str, rounds: Sequence[Here], taken: Taken, bench: BenchScaleConfig) -> dict:
    """Return the step that each round predicts for these very ranks, the median of them, beside that of the real steps taken in the same rounds."""
    fields = max(bench.mini_batches)
    found = [scaling.predict(one.timelines[name][fields], one.all_reduce(), one.overlaps[name], one.ranks, fields) for one in rounds]
    predicted_s, measured_s = statistics.median(one.step_s for one in found), statistics.median(taken.real_s)
    ranks = rounds[0].ranks
    return {
        "model": name,
        "mini_batch": fields,
        "ranks": ranks,
        "hosts": rounds[0].hosts,
        "one_rank_images_per_s": fields / statistics.median(taken.alone_s),
        "predicted_step_s": predicted_s,
        "predicted_exposed_s": statistics.median(one.exposed_s for one in found),
        "predicted_images_per_s": ranks * fields / predicted_s,
        "measured_step_s": measured_s,
        "measured_images_per_s": ranks * fields / measured_s,
        "predicted_runs_s": [one.step_s for one in found],
        "measured_runs_s": taken.real_s,
        "predicted_to_measured": predicted_s / measured_s,
    }


def _of_original(bench: BenchScaleConfig, here: Here, key: str) -> bool:
    if key == "nodes":
        return ORIGINAL[key] in bench.nodes
    default = {"ranks_per_node": here.ranks // here.hosts, "cores_per_rank": here.threads}.get(key)
    return (getattr(bench, key) or default) == ORIGINAL[key]


def save(
    folder: Path, config: BenchScaleCommand, group: Group, rounds: Sequence[Here], rows: list[dict], verified: list[dict], published: dict | None
) -> None:  # fmt: skip
    """Write `result.json` and the picture."""
    from hcsdl.report.plots import plot_scaling

    result = head(COMMAND, config, group.world_size, rounds[0].hosts) | {
        "backend": group.backend,
        "measured": [dataclasses.asdict(one) for one in rounds],
        "predicted": rows,
        "verified": verified,
        "published": published,
    }
    write_json(folder / RESULT, result)
    plot_scaling(rows, published, folder / "scaling.png")


def format_predictions(rows: list[dict], bench: BenchScaleConfig, here: Here, published: dict | None) -> str:
    """Return the table of predictions: a line per network, number of nodes and assumption."""
    ranks, cores = bench.ranks_per_node or here.ranks // here.hosts, bench.cores_per_rank or here.threads
    left_out = (
        "; not of 1 node, whose ranks talk through its memory"
        if len(predictable_nodes(bench, here.ranks, here.hosts)) < len(bench.nodes)
        else ""
    )
    link = "link as measured" if bench.bandwidth_gbit_s is None else f"{bench.bandwidth_gbit_s:g} Gbit/s, {bench.latency_us:g} µs"
    lines = [
        f"PREDICTED, not measured: {ranks} ranks a node × {cores} cores, {link}, {bench.mini_batch or max(bench.mini_batches)} fields a rank and step; "
        f"time for {bench.images} fields × {bench.epochs:g} epochs, without evaluations{left_out}",
        f"{'model':<10s}{'nodes':>6s}{'ranks':>6s}  {'assumed':<8s}{'step, s':>9s}{'exposed, s':>11s}{'images/s':>10s}{'efficiency':>11s}{'train, min':>11s}",
    ]
    for row in rows:
        lines.append(
            f"{row['model']:<10s}{row['nodes']:6d}{row['ranks']:6d}  {row['assumption']:<8s}{row['step_s']:9.3f}{row['exposed_s']:11.3f}"
            f"{row['images_per_s']:10.2f}{row['efficiency']:11.3f}{row['time_to_train_s'] / 60:11.1f}"
        )
    if published:
        lines.append(f"published, 8 nodes, 32 ranks: {published['images_per_s']:.0f} images/s, {published['time_to_train_s'] / 60:.0f} min")
    speed, share = (" to ".join(f"{value:g}" for value in values) for values in (bench.core_speed, bench.network_efficiency))
    reached = f"; {share} of the link is reached" if bench.bandwidth_gbit_s is not None else ""
    rows_px, columns_px = bench.image_px
    lines += [
        f"assumed, low to high: a core is {speed} × as fast as one here{reached}; all from steps measured here on fields of {rows_px} × {columns_px}",
        "exposed: communication that a step waits for; efficiency: share of a step that is none of it",
    ]
    return "\n".join(lines)


def format_verified(rows: list[dict], here: Here) -> str:
    """Return the table of real steps over these ranks against their prediction."""
    lines = [
        f"over these {here.ranks} ranks on {here.hosts} host{'s' * (here.hosts > 1)}: medians of the rounds, each in brackets; images/s of all ranks",
        f"{'model':<10s}{'1 rank':>9s}{'predicted':>10s}{'measured':>10s}  {'step predicted, s':>30s}  {'measured, s':>30s}{'ratio':>7s}",
    ]
    for row in rows:
        predicted, measured = (
            f"{row[what + '_step_s']:.3f} ({', '.join(f'{one:.3f}' for one in row[what + '_runs_s'])})"
            for what in ("predicted", "measured")
        )
        lines.append(
            f"{row['model']:<10s}{row['one_rank_images_per_s']:9.3f}{row['predicted_images_per_s']:10.3f}{row['measured_images_per_s']:10.3f}"
            f"  {predicted:>30s}  {measured:>30s}{row['predicted_to_measured']:7.3f}"
        )
    return "\n".join(lines)
