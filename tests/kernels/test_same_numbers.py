"""A training with our operators goes the way a training in fp32 without them goes: no farther from it than another seed."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from tests import runs
from tests.forked import train_on

SEEDS, STEPS, WINDOW = range(5), 200, 20


@pytest.mark.slow  # ten trainings, 75 s here
def test_losses_of_200_steps_stay_among_those_of_five_reference_seeds(tiny_plates: Path, tmp_path: Path) -> None:
    """One run lies outside the range of five others somewhere by chance, whatever its kernels: of the fast runs the means over the seeds are compared."""
    words = [f"training.max_steps={STEPS}", "training.epochs=100", "training.validate_every_epochs=100", "data.workers=0"]
    losses: dict[str, list[list[float]]] = {"reference": [], "fused": []}
    accuracies: dict[str, list[float]] = {"reference": [], "fused": []}
    for kernels in ("reference", "fused"):
        for seed in SEEDS:
            folder = tmp_path / f"{kernels}-{seed}"
            train_on(1, tiny_plates, folder, f"kernels={kernels}", f"seed={seed}", *words)
            steps = [event["loss"] for event in runs.journal(folder) if event["event"] == "step"]
            assert len(steps) == STEPS
            losses[kernels].append([mean(steps[start : start + WINDOW]) for start in range(0, STEPS, WINDOW)])
            accuracies[kernels].append(runs.summary(folder)["history"][-1]["val_accuracy"])
    for number, (fast, reference) in enumerate(
        zip(*(zip(*losses[kernels], strict=True) for kernels in ("fused", "reference")), strict=True)
    ):
        print(f"steps {number * WINDOW + 1} …: fused {mean(fast):.3f}, reference {min(reference):.3f} to {max(reference):.3f}")
        assert min(reference) <= mean(fast) <= max(reference)
    print(f"accuracy of held-out fields: {accuracies}")
    assert mean(accuracies["fused"]) >= min(accuracies["reference"])
