"""`hcsdl bench comm`: latency and bus bandwidth of the collectives, by size, through each backend.

In: a `BenchCommCommand`. Out: a table on standard output; `result.json` and `communication.png` in the benchmark's folder. All backends are
measured in the same ranks, in interleaved rounds, and every collective's result is checked once. One that cannot be used is listed with the reason.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from hcsdl.commands.bench_ranks import RESULT, head, run_on_ranks
from hcsdl.config import BenchCommCommand
from hcsdl.distributed.identity import Identity
from hcsdl.distributed.scaling import bus_bandwidth
from hcsdl.machine.process import held_back_output
from hcsdl.training.run_folder import write_json

if TYPE_CHECKING:
    import torch.distributed as dist

    from hcsdl.distributed.group import Group

log = logging.getLogger(__name__)

COMMAND = "bench comm"
REFERENCE = "gloo"
Key = tuple[str, str, int, str]  # operation, dtype, bytes, backend


def run(config: BenchCommCommand) -> int:
    """Start the ranks, or be one; return the exit code."""
    return run_on_ranks(COMMAND, config, config.bench.output, least_ranks=2)


def calls_per_round(num_bytes: int) -> int:
    """Return how often a size is timed in a round: often where a call takes microseconds, once where it takes tens of milliseconds."""
    return 20 if num_bytes <= 2**16 else 5 if num_bytes <= 2**22 else 1


def measure(config: BenchCommCommand, identity: Identity, folder: Path | None) -> None:
    """Measure as one rank; rank 0, which has the folder, prints and saves."""
    from hcsdl.distributed.group import Group

    group = Group(identity, dataclasses.replace(config.distributed, backend=REFERENCE))
    hosts = len(set(group.all_gather_object(identity.host)))
    backends, missing = open_backends(group, config)
    say = log.info if group.rank == 0 else log.debug
    say("%d ranks on %d host%s, backends %s", group.world_size, hosts, "s" * (hosts > 1), ", ".join(backends) or "none")
    for name, reason in missing.items():
        say("%s is left out: %s", name, reason)
    times = timed_rounds(group, backends, config, say)
    rows = summarise(group.all_gather_object(times), group.world_size)
    if folder is not None:
        from hcsdl.report.plots import plot_communication

        result = head(COMMAND, config, group.world_size, hosts) | {"missing": missing, "rows": rows}
        write_json(folder / RESULT, result)
        plot_communication(rows, group.world_size, folder / "communication.png")
        print(format_rows(rows, missing))
        print(f"saved in {folder}", flush=True)
    group.close()


def open_backends(group: Group, config: BenchCommCommand) -> tuple[dict[str, dist.ProcessGroup], dict[str, str]]:
    """Return a process group over all ranks for each backend that every rank can use, and for the others the reason."""
    import torch.distributed as dist

    from hcsdl.distributed.backends import missing as reason_missing

    found, missing = {}, {}
    for name in dict.fromkeys(config.bench.backends):
        reasons = {reason for reason in group.all_gather_object(reason_missing(name)) if reason}
        if reasons:
            missing[name] = " ".join(sorted(reasons))
            continue
        wait = timedelta(seconds=config.distributed.timeout_s)
        with held_back_output():
            found[name] = group.guard(f"start of {name}", lambda name=name, wait=wait: dist.new_group(backend=name, timeout=wait))
    return found, missing


def timed_rounds(
    group: Group, backends: dict[str, dist.ProcessGroup], config: BenchCommCommand, say: Callable[..., None]
) -> dict[Key, list[float]]:
    """Return the seconds of every timed call. Round 0 checks the results, opens connections and is not timed; rounds take turns in who is first."""
    bench = config.bench
    cells = [
        (operation, dtype, kib * 1024) for operation in bench.operations for dtype in bench.dtypes for kib in sorted(set(bench.sizes_kib))
    ]
    times: dict[Key, list[float]] = {(*cell, name): [] for cell in cells for name in backends}
    begun = time.perf_counter()
    for number in range(bench.rounds + 1):
        order = list(backends) if number % 2 else list(reversed(backends))
        for cell in cells:
            call = Collective(*cell, group.world_size)
            for name in order:
                what = f"{cell[0]} of {cell[2]} bytes {cell[1]} over {name}"
                if number == 0:
                    group.guard(what, lambda name=name, call=call: call.check(backends[name]))
                else:
                    times[(*cell, name)] += group.guard(what, lambda name=name, call=call: call.burst(backends[name]))
        if number == 0 and backends:
            say("%d rounds, about %.0f s", bench.rounds, bench.rounds * (time.perf_counter() - begun))
    return times


class Collective:
    """One operation on one size: `num_bytes` is the whole buffer, as in nccl-tests; of all_gather that is every rank's output."""

    def __init__(self, operation: str, dtype: str, num_bytes: int, world_size: int) -> None:
        import torch

        self.operation, self.world_size, self.num_bytes = operation, world_size, num_bytes
        kind = torch.float32 if dtype == "fp32" else torch.bfloat16
        count = max(1, num_bytes // kind.itemsize)
        self.share = torch.ones(-(-count // world_size) if operation == "all_gather" else count, dtype=kind)
        self.whole = torch.zeros(len(self.share) * world_size, dtype=kind) if operation == "all_gather" else self.share

    def __call__(self, backend: dist.ProcessGroup) -> None:
        """Run the collective."""
        import torch.distributed as dist

        if self.operation == "all_reduce":
            dist.all_reduce(self.whole, group=backend)
        elif self.operation == "broadcast":
            dist.broadcast(self.whole, 0, group=backend)
        else:
            dist.all_gather_into_tensor(self.whole, self.share, group=backend)

    def check(self, backend: dist.ProcessGroup) -> None:
        """Run it once on ones and compare. Raises ArithmeticError where the result is wrong."""
        self.share.fill_(1)
        self(backend)
        wanted = self.world_size if self.operation == "all_reduce" else 1
        if not bool((self.whole == wanted).all()):
            raise ArithmeticError(f"{self.operation} of ones over {self.world_size} ranks must give {wanted} everywhere. It does not.")

    def burst(self, backend: dist.ProcessGroup) -> list[float]:
        """Return the seconds of `calls_per_round` calls, after all ranks have met."""
        import torch
        import torch.distributed as dist

        self.share.zero_()  # ones would grow without bound
        dist.all_reduce(torch.zeros(1), group=backend)
        times = []
        for _ in range(calls_per_round(self.num_bytes)):
            begun = time.perf_counter()
            self(backend)
            times.append(time.perf_counter() - begun)
        return times


def summarise(times: list[dict[Key, list[float]]], world_size: int) -> list[dict]:
    """Return a row per operation, dtype, size and backend: median and quartiles over the calls of their mean over the ranks, and bus bandwidth.

    The mean over the ranks is what nccl-tests reports by default (its option -a 1).
    """
    rows = []
    for key in times[0]:
        operation, dtype, num_bytes, backend = key
        calls = [statistics.fmean(one) for one in zip(*(rank[key] for rank in times), strict=True)]
        q1, median, q3 = statistics.quantiles(calls, n=4, method="inclusive") if len(calls) > 1 else calls * 3
        rows.append(
            {
                "operation": operation,
                "dtype": dtype,
                "num_bytes": num_bytes,
                "backend": backend,
                "calls": len(calls),
                "median_s": median,
                "q1_s": q1,
                "q3_s": q3,
                "bus_gb_per_s": bus_bandwidth(operation, num_bytes, median, world_size) / 1e9,
            }
        )
    reference = {(r["operation"], r["dtype"], r["num_bytes"]): r["median_s"] for r in rows if r["backend"] == REFERENCE}
    for row in rows:
        base = reference.get((row["operation"], row["dtype"], row["num_bytes"]))
        row["time_to_gloo"] = row["median_s"] / base if base else None
    return rows


def format_rows(rows: list[dict], missing: dict[str, str]) -> str:
    """Return the table: a line per operation, dtype and size, for each backend the median time, quartiles, bus bandwidth and time against gloo."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    others = [name for name in backends if name != REFERENCE] if REFERENCE in backends else []
    wide = "".join(f"  {name + ': median (quartiles)':>34s}{'bus GB/s':>10s}" for name in backends)
    lines = [f"{'operation':<11s}{'dtype':<6s}{'size':>9s}{wide}" + "".join(f"  {name}/{REFERENCE}" for name in others)]
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["operation"], row["dtype"], row["num_bytes"]), {})[row["backend"]] = row
    for (operation, dtype, num_bytes), found in cells.items():
        line = f"{operation:<11s}{dtype:<6s}{_size(num_bytes):>9s}"
        for name in backends:
            row = found[name]
            spread = f"{_time(row['median_s'])} ({_time(row['q1_s'])} – {_time(row['q3_s'])})"
            line += f"  {spread:>34s}{row['bus_gb_per_s']:10.3f}"
        lines.append(line + "".join(f"{found[name]['time_to_gloo']:{len(name) + 3 + len(REFERENCE)}.2f}" for name in others))
    lines += [f"{name}: missing. {reason}" for name, reason in missing.items()]
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:g} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:g} KiB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
