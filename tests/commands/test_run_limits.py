"""What `Run` does before the first step: fields from the node's own disk, and whether time and memory will do. In this process."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hcsdl.commands.compose import compose_command, from_yaml
from hcsdl.commands.run import Run
from hcsdl.commands.train import open_run_folder, prepare_run
from hcsdl.config import ConfigError
from hcsdl.distributed.identity import Identity
from hcsdl.distributed.launcher import Stop
from hcsdl.training.checkpoint import list_checkpoints, load_newest, save_checkpoint
from hcsdl.training.run_folder import RunFolder
from tests import runs


@pytest.fixture
def train(tiny_plates: Path, tmp_path: Path) -> Callable[..., Run]:
    """Return a function that trains three steps with further settings, as one rank in this process."""

    def run(name: str, *words: str, stop: Callable[[], bool] = lambda: False) -> Run:
        fixed = ["experiment=tiny", f"plates.root={tiny_plates}", f"run_dir={tmp_path / name}", "training.baseline=false", "training.max_steps=3",
                 "kernels=reference", "training.journal_every_s=0", "model.width=0.25"]  # fmt: skip
        config = compose_command("train", [*fixed, *words])
        folder: RunFolder = open_run_folder(config)
        try:
            prepare_run(config, folder)
            made = Run(from_yaml("train", folder.config.read_text()), folder, Identity(), stop, "system")
            try:
                made.train()
            finally:
                made.journal.close()
        finally:
            folder.release()
        return made

    return run


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in runs.journal(run.folder.path) if line["event"] == "step"]


def test_a_staged_run_has_the_losses_of_the_unstaged_one_bit_for_bit(train: Callable[..., Run], tmp_path: Path) -> None:
    unstaged, staged = train("unstaged"), train("staged", f"data.stage={tmp_path / 'disk'}")
    assert losses(staged) == losses(unstaged) and len(losses(staged)) == 3
    assert staged.last_scores is not None and unstaged.last_scores is not None
    assert staged.last_scores[0].confusion.tolist() == unstaged.last_scores[0].confusion.tolist()
    assert all(path.is_relative_to(tmp_path / "disk") for row in range(len(staged.index.table)) for path in staged.index.paths(row))
    shutil.rmtree(tmp_path / "disk")  # read from there it was: without its source and its copy there is nothing left to read
    assert all(not path.is_relative_to(tmp_path / "disk") for path in staged.index.paths(0))


def test_a_signal_while_files_are_copied_ends_with_75(train: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(Stop, match="before the first step; what was copied stays"):
        train("stopped", f"data.stage={tmp_path / 'disk'}", stop=lambda: True)
    assert not list((tmp_path / "stopped" / "checkpoints").iterdir())


def test_the_end_and_the_memory_are_predicted(train: Callable[..., Run], capsys: pytest.CaptureFixture) -> None:
    run = train("run", "training.strict_budget=true")  # which lets through what fits
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("predicted: ")]
    assert len(said) == 1 and said[0].startswith("predicted: 3 steps in ") and said[0].endswith("GiB a node")
    assert not any("warning" in line for line in lines)
    assert run.state.step == 3


def test_a_job_that_is_too_short_is_warned_of_or_refused(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A Slurm job that ends now, with memory for nothing."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(time.time()) - 3600))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time())))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    assert train("warned").state.step == 3
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("warning: the run must end before its job does") for line in lines)
    assert any(line.startswith("warning: the ranks of a node must fit into its memory") for line in lines)
    with pytest.raises(
        ConfigError, match="training.strict_budget=true: the run must end before its job does.*requeued about 1 time,.*must fit"
    ) as caught:
        train("refused", "training.strict_budget=true")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=resnet18"], "equal to rounding but for batch normalisation, over 4 fields of a rank now and 2 before."),
        (["model=resnet18", "training.mini_batch_size=2"], "equal to rounding."),
        (["model=mcnn", "model.head=pool"], "equal to rounding."),
    ],
    ids=["batch norm over another mini-batch", "the same mini-batches", "no batch norm"],
)
def test_a_resume_on_fewer_ranks_says_what_stays_equal(
    train: Callable[..., Run], words: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    words = [*words, "training.global_batch_size=4"]
    begun = train("run", *words, "training.max_steps=1")
    newest = load_newest(list_checkpoints(begun.folder.checkpoints))
    assert newest is not None
    save_checkpoint(dataclasses.replace(newest, ranks=newest.ranks * 2), begun.folder.checkpoints, keep=1, best=False)  # as if by two ranks
    assert train("run", *words, "training.max_steps=2").state.step == 2
    assert f"resuming on 1 rank what 2 began: same order and batch, {said}" in [record.message for record in caplog.records]
