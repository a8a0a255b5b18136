"""A run that was killed and resumed ends with the weights of the run left alone, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from pathlib import Path

import pytest

from tests import forked, runs
from tests.forked import train_on

IPEX = pytest.param(
    "ipex", marks=pytest.mark.skipif(importlib.util.find_spec("intel_extension_for_pytorch") is None, reason="no IPEX here")
)
STEPS = ["training.epochs=3", "training.checkpoint_every_steps=1"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kernels", ["fused", IPEX])
def test_killed_and_resumed_run_ends_with_the_same_bits(tiny_plates: Path, tmp_path: Path, kernels: str, ranks: int) -> None:
    how = runs if (kernels, ranks) == ("native", 2) else forked  # once with each process as a user's shell starts it
    words = [f"kernels={kernels}", f"distributed.ranks={ranks}", *STEPS]
    train_on(ranks, tiny_plates, tmp_path / "alone", *words)
    folder = tmp_path / "killed"

    # The starter is killed, at a step; its ranks go with it.
    process = how.start_train(tiny_plates, folder, *words)
    runs.wait_for_step(process, folder, 3, attempt=1)
    ranks_of_it = runs.children(process)
    assert len(ranks_of_it) == ranks
    os.kill(process.pid, signal.SIGKILL)
    runs.wait_until_gone(ranks_of_it)
    runs.kill_session(process)

    # A rank is killed, at an odd moment; the starter ends with code 5.
    process = how.start_train(tiny_plates, folder, *words)
    runs.wait_for_step(process, folder, 9, attempt=2)
    time.sleep(0.03)
    victim = 0 if kernels == "ipex" else ranks - 1
    os.kill(runs.children(process)[victim], signal.SIGKILL)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 5, said
    assert f"rank {victim} was killed by SIGKILL" in said

    how.train(tiny_plates, folder, *words)
    assert runs.digest(folder) == runs.digest(tmp_path / "alone")
    found, alone = runs.summary(folder), runs.summary(tmp_path / "alone")
    assert found["resumed"] and not alone["resumed"]
    assert found["history"][-1]["well_accuracy"] == alone["history"][-1]["well_accuracy"]
    assert [e["step"] for e in found["history"]] == [e["step"] for e in alone["history"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_signal_finishes_the_step_saves_and_exits_75(tiny_plates: Path, tmp_path: Path, number: signal.Signals) -> None:
    words = ["kernels=native", "distributed.ranks=2", "training.epochs=3"]
    folder = tmp_path / "run"
    process = forked.start_train(tiny_plates, folder, *words)
    runs.wait_for_step(process, folder, 3)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 75, said
    assert "start the same command again" in said
    saved = sorted((folder / "checkpoints").glob("step-*.pt"))[-1]
    assert int(saved.stem.split("-")[1]) == runs.last_step(folder, attempt=1) >= 3
    assert not (folder / "summary.json").exists()

    forked.train(tiny_plates, folder, *words)
    train_on(2, tiny_plates, tmp_path / "alone", *words)
    assert runs.digest(folder) == runs.digest(tmp_path / "alone")


def test_three_ranks_resume_bit_for_bit(tiny_plates: Path, tmp_path: Path) -> None:
    # Not auto: two runs may find another backend faster, and from three ranks on each adds in an order of its own.
    words = ["kernels=native", "distributed.ranks=3", "distributed.backend=gloo", "training.global_batch_size=6", "training.epochs=2"]
    train_on(3, tiny_plates, tmp_path / "alone", *words)
    process = forked.start_train(tiny_plates, tmp_path / "stopped", *words)
    runs.wait_for_step(process, tmp_path / "stopped", 2)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 75
    forked.train(tiny_plates, tmp_path / "stopped", *words)
    assert runs.digest(tmp_path / "stopped") == runs.digest(tmp_path / "alone")
