"""Whether a training under a real memory limit takes what fits, and is refused, not killed, where it asks for more."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hcsdl.config import SimulateConfig
from hcsdl.simulation import simulate
from tests import runs

LIMIT_GIB = 1.6
GROUPS = (  # version 1, version 2: where, what limits, this process's line in /proc/self/cgroup
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", r"^\d+:memory:/(.*)$"),
    (Path("/sys/fs/cgroup"), "memory.max", r"^0::/(.*)$"),
)
WORDS = ["model=resnet18", "model.width=1", "kernels=native", "distributed.ranks=1", "training.global_batch_size=8"]


@pytest.fixture
def group() -> Iterator[tuple[Path, Path]]:
    """A control group that holds its processes to `LIMIT_GIB`, and the group we are in."""
    for above, setting, line in GROUPS:
        found = re.search(line, Path("/proc/self/cgroup").read_text(), re.M)
        made = above / f"hcsdl-tests-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            (made / setting).write_text(str(int(LIMIT_GIB * 2**30)))
            yield made, above / (found[1] if found else "")
            return
        except OSError:
            continue
        finally:
            made.rmdir()
    pytest.skip("no control group of memory can be made here")


@contextmanager
def inside(group: tuple[Path, Path]) -> Iterator[None]:
    """Let what is started inside be in the group."""
    limited, ours = group
    (limited / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (ours / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture(scope="module")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fields of 512 × 640 pixels, whose activations weigh something."""
    root = tmp_path_factory.mktemp("plates") / "plates"
    simulate(
        SimulateConfig(preset="tiny", height_px=512, width_px=640, moas=2, compounds_per_moa=1, sites=1, workers=1), root, 0, progress=False
    )
    return root


def test_the_predicted_peak_is_that_of_a_whole_training(plates: Path, tmp_path: Path) -> None:
    """Of M-CNN with 24 million weights, whose checkpoint is large beside a step: steps, scores in the middle and at the end, checkpoints."""
    words = [
        "model=mcnn",
        "model.width=1.5",
        "kernels=native",
        "distributed.ranks=1",
        "plates.val_fraction=0.6",
        "training=adamw",
        "training.global_batch_size=2",
    ]
    words += ["training.max_steps=4", "training.mini_batch_size=auto", f"plates.root={plates}", f"run_dir={tmp_path / 'run'}"]
    said = runs.run("train", *runs.TINY, *words).stderr
    [(fields, predicted)] = re.findall(r"mini-batches of (\d) fields a rank, 1 a step: predicted to fill ([\d.]+) of", said)
    summary = runs.summary(tmp_path / "run")
    assert int(fields) == 2 and len(summary["history"]) > 1
    assert abs(float(predicted) / summary["peak_rss_gib"] - 1) < 0.1, (predicted, summary["peak_rss_gib"])


def test_auto_trains_within_a_limit_and_what_is_beyond_it_is_refused(group: tuple[Path, Path], plates: Path, tmp_path: Path) -> None:
    """The mini-batch is smaller than the step's fields, its prediction holds within 10 %, and going on without the limit keeps it."""
    train = ["train", *runs.TINY, *WORDS, f"plates.root={plates}"]
    auto = [*train, f"run_dir={tmp_path / 'auto'}", "training.mini_batch_size=auto"]
    with inside(group):
        refused = runs.run(*train, f"run_dir={tmp_path / 'all'}", "training.mini_batch_size=8", code=2)
        said = runs.run(*auto, "training.max_steps=1").stderr
    assert re.search(
        r"must fit into its node's memory. With 8 fields a rank .* may hold 1.6: training.mini_batch_size=\d would fit", refused.stderr
    )
    [(fields, predicted)] = re.findall(r"mini-batches of (\d) fields? a rank, \d a step: predicted to fill ([\d.]+) of 1.6 GiB", said)
    assert int(fields) < 8
    peak = runs.summary(tmp_path / "auto")["peak_rss_gib"]
    assert peak < LIMIT_GIB and abs(float(predicted) / peak - 1) < 0.1, (predicted, peak)

    said = runs.run(*auto, "training.max_steps=2").stderr
    assert re.search(rf"mini-batches of {fields} fields? a rank, \d a step: as the run began with", said)
