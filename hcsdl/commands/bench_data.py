"""`hcsdl bench data`: the loader alone, from TIFF files in the page cache to normalised tensors in channels_last, changes drawn at random included.

In: a `BenchDataCommand`. Out: a table on standard output and `result.json` in the benchmark's folder. The fields are drawn (`hcsdl simulate`) into a
temporary folder, once a compression; compressed sizes, hence speeds, of real plates differ with their noise. Compressions take turns in rounds; a turn has
a loader of its own, whose first mini-batches are not counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tifffile

from hcsdl.commands.bench_ranks import RESULT, head, open_folder
from hcsdl.config import BenchDataCommand, BenchDataConfig, ExitCode, ScreenConfig, SimulateConfig
from hcsdl.machine.cores import processor, usable_cores
from hcsdl.plates.index import Index, read_index
from hcsdl.training.run_folder import write_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

COMMAND = "bench data"
TARGETS = {
    "none": 60.0,
    "deflate": 25.0,
}  # fields of 3 × 1024 × 1280 a second and core: what this project set itself; LZW: whatever it gives
TIFFFILE = {"deflate": "zlib", "lzw": "lzw"}  # tifffile's names
FULL_SIZE = [1024, 1280]


@dataclass(frozen=True)
class Turn:
    """What a turn gave: fields, seconds, processor seconds of this process."""

    fields: int
    seconds: float
    processor_s: float


def run(config: BenchDataCommand) -> int:
    """Draw, measure, print and save; return the exit code."""
    from hcsdl.machine.memory import keep_freed_memory

    if config.machine.allocator == "keep":
        keep_freed_memory()
    bench = config.bench
    folder = open_folder(COMMAND, config, bench.output)
    with tempfile.TemporaryDirectory(prefix="hcsdl-bench-") as work:
        log.info("drawing fields of %d × %d", *bench.image_size)
        sources = {name: Source(root, config) for name, root in draw(bench, Path(work), config.seed).items()}
        turns: dict[str, list[Turn]] = {name: [] for name in sources}
        for number in range(bench.rounds + 1):  # the first is not counted: it fills the page cache
            for name, source in sources.items():
                turn = source.turn()
                if number:
                    turns[name].append(turn)
        megabytes = {name: source.field_mb for name, source in sources.items()}
    cores = min(max(1, config.data.workers), usable_cores())
    rows = [row_of(name, found, cores, megabytes[name], bench.image_size) for name, found in turns.items()]
    write_json(
        folder / RESULT,
        head(COMMAND, config, 1, 1) | {"loader_threads": config.data.workers, "image_dtype": str(image_dtype()), "rows": rows},
    )
    print(format_rows(rows, bench.image_size, config.data.workers))
    print(f"saved in {folder}", flush=True)
    return ExitCode.DONE


def image_dtype() -> torch.dtype:
    """Return the type training has images in on this processor."""
    from hcsdl.kernels import choose_kernels

    return choose_kernels("native").image_dtype


def draw(bench: BenchDataConfig, work: Path, seed: int) -> dict[str, Path]:
    """Draw one plate a compression below `work`, the same fields in each; return their folders."""
    from hcsdl.simulation import simulate

    rows, columns = bench.image_size
    asked = SimulateConfig(
        preset="tiny", height_px=rows, width_px=columns, moas=1, compounds_per_moa=1, replicates=1, plates_per_batch=1,
        sites=-(-bench.fields // 3),  # a treated well and two of DMSO
    )  # fmt: skip
    simulate(asked, work / "drawn", seed, progress=False)
    roots = {}
    for name in dict.fromkeys(bench.compressions):
        roots[name] = work / name
        shutil.copytree(work / "drawn", roots[name])
        for path in sorted(roots[name].rglob("*.tif")) if name != "none" else ():
            tifffile.imwrite(path, tifffile.imread(path), photometric="minisblack", metadata=None, compression=TIFFFILE[name])
    return roots


class Source:
    """A drawn plate, fitted, and loaders of it."""

    def __init__(self, root: Path, config: BenchDataCommand) -> None:
        from hcsdl.data.preprocessing import fit_preprocessing

        self.config = config
        self.index: Index = read_index(ScreenConfig(root=str(root), cache=str(root / "cache")))
        self.preprocessing = fit_preprocessing(self.index, config.data, "DMSO", None, progress=False, workers=1)
        self.field_mb = statistics.fmean(sum(p.stat().st_size for p in self.index.paths(row)) for row in range(len(self.index.table))) / 1e6

    def turn(self) -> Turn:
        """Load for `bench.seconds`, one mini-batch at least."""
        import numpy as np

        from hcsdl.data.loading import TrainLoader
        from hcsdl.data.sampling import Sampler

        config, table = self.config, self.index.table
        size, labels = config.bench.mini_batch_size, np.zeros(len(table), np.int64)
        names = [self.index.field_name(row) for row in range(len(table))]
        sampler = Sampler(
            range(len(table)), names, labels, table["Metadata_Treatment"].tolist(), sampling="all", cap=config.data.cap,
            global_batch_size=min(size, len(table)), seed=config.seed,
        )  # fmt: skip
        loader = TrainLoader(
            self.index, labels, self.preprocessing, sampler, dataclasses.replace(config.data, sampling="all"), seed=config.seed, rank=0, world_size=1,
            mini_batch_size=min(size, len(table)), first_step=0, last_step=10**9, dtype=image_dtype(),
        )  # fmt: skip
        steps = iter(loader)
        try:
            for _ in itertools.islice(
                steps, config.data.prefetch + 1
            ):  # those ready before the clock starts would count as made in no time
                pass
            begun, processor_s, fields = time.perf_counter(), time.process_time(), 0
            while fields == 0 or time.perf_counter() - begun < config.bench.seconds:
                fields += sum(len(batch.rows) for batch in next(steps))
            return Turn(fields, time.perf_counter() - begun, time.process_time() - processor_s)
        finally:
            loader.close()


def row_of(name: str, turns: list[Turn], cores: int, megabytes: float, image_size: list[int]) -> dict:
    """Return a compression's row: medians over the turns; the target counts at full resolution only."""
    from hcsdl.commands.bench_step_table import quartiles

    q1, median, q3 = quartiles([turn.fields / turn.seconds / cores for turn in turns])
    target = TARGETS.get(name) if list(image_size) == FULL_SIZE else None
    return {
        "compression": name,
        "fields_per_s_core": median,
        "q1_fields_per_s_core": q1,
        "q3_fields_per_s_core": q3,
        "fields_per_processor_s": statistics.median(turn.fields / turn.processor_s for turn in turns),
        "field_mb": megabytes,
        "fields": sum(turn.fields for turn in turns),
        "target": target,
        "met": None if target is None else median >= target,
    }


def format_rows(rows: list[dict], image_size: list[int], threads: int) -> str:
    """Return the table: a line per compression."""
    lines = [
        f"loader alone on {processor()}, {threads} thread{'s' * (threads != 1)}, fields of {image_size[0]} × {image_size[1]}, page cache, to {image_dtype()} channels_last",
        f"{'compression':<12s}{'MB a field':>11s}{'fields/s/core':>14s}  {'(quartiles)':<18s}{'a CPU second':>13s}{'target':>8s}"
        "    target: this project's own, fields/s/core at 1024 × 1280",
    ]
    for row in rows:
        spread = f"({row['q1_fields_per_s_core']:.1f} – {row['q3_fields_per_s_core']:.1f})"
        said = "       –" if row["target"] is None else f"{row['target']:8.0f}  {'met' if row['met'] else 'NOT MET'}"
        lines.append(
            f"{row['compression']:<12s}{row['field_mb']:11.2f}{row['fields_per_s_core']:14.1f}  {spread:<18s}{row['fields_per_processor_s']:13.1f}{said}"
        )
    return "\n".join(lines)
