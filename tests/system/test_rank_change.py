"""A run that goes on with another number of ranks goes on with the same fields in the same order and batches, equal to rounding."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hcsdl.commands.compose import compose_command, from_yaml, to_yaml
from hcsdl.commands.run import Run
from hcsdl.commands.train import open_run_folder, prepare_run
from hcsdl.distributed.identity import Identity
from tests import runs
from tests.forked import train_on

# No batch norm: its statistics are those of a rank's own share.
WORDS = ["model=mcnn", "model.head=pool", "model.width=0.5", "kernels=reference", "training.epochs=3", "training.global_batch_size=4",
         "training.learning_rate=0.02", "training.warmup_epochs=0", "training.checkpoint_every_steps=2", "distributed.backend=gloo"]  # fmt: skip


def alone(plates: Path, folder: Path, until: int) -> None:
    """Begin or go on until step `until` as the only rank, in this process, which has torch already."""
    config = compose_command("train", [*runs.TINY, *WORDS, f"plates.root={plates}", f"run_dir={folder}", f"training.max_steps={until}"])
    held = open_run_folder(config)
    prepare_run(config, held)
    run = Run(from_yaml("train", to_yaml(config)), held, Identity(), lambda: False, "system")
    run.train()
    run.finish(0.0)
    held.release()


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in runs.journal(folder) if line["event"] == "step"}


def test_losses_go_on_as_if_the_number_of_ranks_had_never_changed(tiny_plates: Path, tmp_path: Path) -> None:
    """1 → 2 → 4 ranks, and from the same 2 → 1, reading from the disk the ranks share, against one rank that reads the plates themselves."""
    stage = f"data.stage={tmp_path / 'disk'}"
    alone(tiny_plates, tmp_path / "alone", 8)
    alone(tiny_plates, tmp_path / "run", 2)
    two = train_on(2, tiny_plates, tmp_path / "run", *WORDS, "training.max_steps=4", stage)
    assert "resuming on 2 ranks what 1 began: same order and batch, equal to rounding." in two
    assert two.count(", 0 were there: ") == 1  # one rank copies for both
    shutil.copytree(tmp_path / "run", tmp_path / "shrunk")
    four = train_on(4, tiny_plates, tmp_path / "run", *WORDS, "training.max_steps=8", stage)
    assert "resuming on 4 ranks what 2 began" in four and "staged 0 files, " in four
    alone(tiny_plates, tmp_path / "shrunk", 8)

    expected = losses(tmp_path / "alone")
    assert sorted(expected) == list(range(1, 9)) and len(set(expected.values())) == 8
    for name in ("run", "shrunk"):
        found = losses(tmp_path / name)
        print(f"{name}: largest relative difference of a loss", max(abs(found[step] / loss - 1) for step, loss in expected.items()))
        assert found == pytest.approx(expected, rel=2e-6), name
