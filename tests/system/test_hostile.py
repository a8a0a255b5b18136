"""Circumstances that must not decide the fate of a training: no terminal, a reader that goes away, an old locale, an absurd optimizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs

HOW = {
    "closed output": ">&- 2>&-",
    "no reader": "2>&1 | head -1 >/dev/null; exit ${PIPESTATUS[0]}",
    "full disk for output": ">/dev/full 2>&1",
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_training_ends_well_whatever_happens_to_its_output(tiny_plates: Path, tmp_path: Path, how: str) -> None:
    words = " ".join(
        [*runs.TINY, f"plates.root={tiny_plates}", f"run_dir={tmp_path}/run", "training.epochs=1", "kernels=native", "distributed.ranks=2"]
    )
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m hcsdl train {words} {how}"], env=runs.environment(), check=False, timeout=200
    )
    assert done.returncode == 0
    assert runs.summary(tmp_path / "run")["steps"] == 8


def test_an_ascii_locale_is_enough(tiny_plates: Path, tmp_path: Path) -> None:
    words = [
        *runs.TINY,
        f"plates.root={tiny_plates}",
        f"run_dir={tmp_path / 'run'}",
        "training.epochs=1",
        "kernels=native",
        "distributed.ranks=1",
    ]
    ascii_only = runs.environment() | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-m", "hcsdl", "train", *words], env=ascii_only, capture_output=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert b"accuracy" in done.stdout


def test_weights_that_are_not_numbers_are_neither_scored_nor_saved(tiny_plates: Path, tmp_path: Path) -> None:
    words = ["training.max_steps=1", "training.weight_decay=1e38", "training.learning_rate=1e38", "training.warmup_epochs=0"]
    done = runs.train(tiny_plates, tmp_path / "run", *words, "kernels=reference", "distributed.ranks=1", code=4)
    assert "the weights must be finite. After step 1 they are not" in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [] and not (tmp_path / "run" / "summary.json").exists()
