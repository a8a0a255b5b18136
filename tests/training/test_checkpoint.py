"""Checkpoints survive what files go through."""

from __future__ import annotations

import logging
import os
import re
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from hcsdl.config import ConfigError, DataError
from hcsdl.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model_state,
    load_newest,
    save_checkpoint,
)


def checkpoint(step: int = 1, value: float = 0.0) -> Checkpoint:
    """A small one; `value` is its weight."""
    return Checkpoint(
        step=step, model={"weight": torch.full((3, 3), value), "bias": torch.zeros(3)}, optimizer={"state": {}, "param_groups": [{"lr": 0.1}]},
        ranks=[{"buffers": {}, "torch_rng": torch.get_rng_state()}], history=[{"step": step, "well_accuracy": 0.5}], elapsed_s=1.5,
        classes=["DMSO", "Eg5 inhibitors"], channels=["DAPI"], target="Metadata_MoA", image_size=[8, 8], model_config={"name": "resnet18"},
        preprocessing={}, config="seed: 0\n", config_hash="c", index_hash="i",
    )  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(checkpoint(7, 2.5), tmp_path, keep=2, best=False)
    found = load_checkpoint(path)
    assert (found.step, found.history, found.classes, found.elapsed_s) == (
        7,
        [{"step": 7, "well_accuracy": 0.5}],
        ["DMSO", "Eg5 inhibitors"],
        1.5,
    )
    assert torch.equal(found.model["weight"], torch.full((3, 3), 2.5))
    assert not (tmp_path / "best.pt").exists()


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(checkpoint(step, step), tmp_path, keep=2, best=step == 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000005.pt", "step-00000004.pt"]
    assert load_checkpoint(tmp_path / "best.pt").step == 2
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.pt.elsewhere-77.tmp").write_bytes(b"begun")
    save_checkpoint(checkpoint(3), tmp_path, keep=1, best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step-00000003.pt"]


def test_run_folder_gives_last_or_best(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (1, 2):
        save_checkpoint(checkpoint(step), folder, keep=2, best=step == 1)
    assert find_checkpoint(tmp_path).step == 2
    assert find_checkpoint(tmp_path, "best").step == 1
    assert find_checkpoint(folder / "step-00000001.pt").step == 1
    with pytest.raises(ConfigError, match="There is nothing at"):
        find_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "foreign"])
def test_a_broken_checkpoint_is_passed_over_and_said(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(checkpoint(1), tmp_path, keep=5, best=False)
    path = save_checkpoint(checkpoint(2), tmp_path, keep=5, best=False)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flip":
        place = data.find(torch.get_rng_state().numpy().tobytes()[:64]) + 10
        assert place > 10
        data[place] ^= 1
    elif damage == "empty":
        data = bytearray()
    elif damage == "text":
        data = bytearray(b"not a checkpoint")
    if damage == "foreign":
        torch.save({"anything": 1}, path)
    else:
        path.write_bytes(data)
    with pytest.raises(DataError, match=str(path)):
        load_checkpoint(path)
    with caplog.at_level(logging.WARNING):
        assert load_newest(list_checkpoints(tmp_path)).step == 1
    assert "Trying the one before" in caplog.text and path.name in caplog.text


def test_none_whole_is_an_error_and_none_at_all_is_a_fresh_start(tmp_path: Path) -> None:
    assert load_newest([]) is None
    (tmp_path / "step-00000001.pt").write_bytes(b"")
    with pytest.raises(DataError, match="None of 1 in"):
        load_newest(list_checkpoints(tmp_path))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"schema_version": 1, "model": Evil()}, tmp_path / "step-00000001.pt")
    with pytest.raises(DataError):
        load_checkpoint(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "ran").exists()


def test_no_second_copy_is_made_to_write_it(tmp_path: Path) -> None:
    large = checkpoint(value=1.0)
    large.model["weight"] = torch.ones(8_000_000)
    tracemalloc.start()
    try:
        path = save_checkpoint(large, tmp_path, keep=1, best=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32e6 / 10 < path.stat().st_size
    assert torch.equal(load_checkpoint(path).model["weight"], large.model["weight"])


@pytest.mark.parametrize("weights", [9, 1_000_000], ids=["at the end", "while torch writes"])
def test_a_file_too_large_for_the_disk_leaves_the_old_one(tmp_path: Path, weights: int) -> None:
    save_checkpoint(checkpoint(1), tmp_path, keep=1, best=True)
    script = f"""
import resource, sys, torch
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
from tests.training.test_checkpoint import checkpoint
from hcsdl.training.checkpoint import save_checkpoint
new = checkpoint(2)
new.model["weight"] = torch.zeros({weights})
try:
    save_checkpoint(new, Path({str(tmp_path)!r}), keep=1, best=True)
except OSError as error:
    print(type(error).__name__, error)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert re.fullmatch(r"OSError .*File too large: '.*step-00000002.pt'", said.stdout.strip())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "step-00000001.pt"]
    assert load_checkpoint(tmp_path / "best.pt").step == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_another_models_weights_are_refused() -> None:
    with pytest.raises(DataError, match="same model. 2 tensors differ: weight, bias"):
        load_model_state(torch.nn.Linear(4, 2), checkpoint())
    model = torch.nn.Linear(3, 3)
    load_model_state(model, checkpoint(value=4.0))
    assert torch.equal(model.weight, torch.full((3, 3), 4.0))
