"""By hand: how long does `hcsdl score` take on a large screen, and how much memory?

    python tests/bench_score.py [wells] [features]

Draws a screen of 200,000 wells × 512 features in single precision (520 plates in 10 batches, 28,000 treatments of 7,000 compounds, all with one of 50
mechanisms) as a parquet file; then, in a process each, times reading it, the default normalisation, NSC, NSCB and the bootstrap; mean average
precision with p-values; and the whole command, ladder included. Prints seconds and peak memory of each.
"""

from __future__ import annotations

import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

PLATES, BATCHES, WELLS_PER_TREATMENT, DOSES, MOAS, CONTROL_SHARE = 520, 10, 6, 4, 50, 1 / 12


def draw(path: Path, wells: int, features: int) -> None:
    """Write the table: a treatment's wells are on plates of one batch, a compound's doses mostly too."""
    rng = np.random.default_rng(0)
    plate, well = np.arange(wells) % PLATES, np.arange(wells) // PLATES
    batch, control = plate * BATCHES // PLATES, well < CONTROL_SHARE * wells / PLATES
    treatment = np.full(wells, -1)
    treated = np.flatnonzero(~control)
    treatment[treated[np.argsort(batch[treated], kind="stable")]] = np.arange(len(treated)) // WELLS_PER_TREATMENT
    compound, dose = treatment // DOSES, treatment % DOSES
    moa = rng.permutation(compound.max() + 1)[compound] % MOAS
    meta = {
        "Metadata_Plate": [f"P{p:04d}" for p in plate],
        "Metadata_Well": [f"W{w:03d}" for w in well],
        "Metadata_Compound": np.where(control, "DMSO", np.char.add("c", compound.astype(str))).astype(object),
        "Metadata_Concentration": np.where(control, 0.0, 10.0**dose),
        "Metadata_MoA": np.where(control, "DMSO", np.char.add("m", moa.astype(str))).astype(object),
        "Metadata_Batch": [f"B{b}" for b in batch],
    }
    values = rng.standard_normal((wells, features), dtype=np.float32)
    values += rng.standard_normal((BATCHES, features), dtype=np.float32)[batch]
    values += 0.3 * rng.standard_normal((MOAS, features), dtype=np.float32)[moa] * ~control[:, None]
    table = pd.concat([pd.DataFrame(meta), pd.DataFrame(values, columns=[f"Embedding_{i:04d}" for i in range(features)])], axis=1)
    table.to_parquet(path)


def nearest(path: Path) -> dict[str, float]:
    """Time reading, normalisation, neighbours and bootstrap."""
    from hcsdl.profiles.neighbours import nearest_neighbours
    from hcsdl.profiles.normalise import normalise, usable_features
    from hcsdl.profiles.tables import read_profiles
    from hcsdl.profiles.treatments import treatment_profiles
    from hcsdl.profiles.uncertainty import cluster_bootstrap

    clock = Clock()
    wells = read_profiles(path).wells
    clock("read")
    wells = normalise(usable_features(wells)[0], ["standardise_control"], control="DMSO", regularisation=0.01)
    treatments = treatment_profiles(wells, "DMSO")
    clock("normalise")
    found = nearest_neighbours(treatments)
    clock("NSC and NSCB")
    for one in found.values():
        cluster_bootstrap(one.hit, treatments.compounds)
    clock("bootstrap")
    return clock.seconds


def precision(path: Path) -> dict[str, float]:
    """Time mean average precision of mechanisms and of replicates, with p-values."""
    from hcsdl.profiles.normalise import normalise
    from hcsdl.profiles.precision import moa_precision, replicate_precision
    from hcsdl.profiles.tables import read_profiles
    from hcsdl.profiles.treatments import treatment_profiles

    wells = normalise(read_profiles(path).wells, ["standardise_control"], control="DMSO", regularisation=0.01)
    clock = Clock()
    replicate_precision(wells, "DMSO")
    clock("mAP of replicates")
    moa_precision(treatment_profiles(wells, "DMSO"))
    clock("mAP of MoA")
    return clock.seconds


def command(path: Path) -> dict[str, float]:
    """Time `hcsdl score`, whole."""
    clock = Clock()
    subprocess.run([sys.executable, "-m", "hcsdl", "score", f"profiles={path}", f"score.output={path.parent}/scores"], check=True)
    clock("whole command")
    return clock.seconds


class Clock:
    """Seconds since the last call, by what they went into."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, what: str) -> None:
        """Take a time."""
        now = time.perf_counter()
        self.seconds[what], self.last = now - self.last, now


def alone(work: Callable[[Path], dict[str, float]], path: Path, results: multiprocessing.Queue) -> None:
    """Run one part in this process and hand back its times and the peak memory of this process and its children."""
    seconds = work(path)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    results.put((seconds, peak / 2**20))


def main() -> None:
    """Draw, measure, print."""
    wells, features = (int(word) for word in (*sys.argv[1:3], 200_000, 512)[:2]) if len(sys.argv) in (1, 3) else sys.exit(__doc__)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "screen.parquet"
        drawing = context.Process(target=draw, args=(path, wells, features))
        drawing.start()
        drawing.join()
        for part in (nearest, precision, command):
            results = context.Queue()
            process = context.Process(target=alone, args=(part, path, results))
            process.start()
            seconds, peak_gib = results.get()
            process.join()
            told = ", ".join(f"{what} {value:.1f} s" for what, value in seconds.items())
            print(f"{part.__name__}: {told}; {sum(seconds.values()):.1f} s in all, peak {peak_gib:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
