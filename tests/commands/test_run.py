"""What a rank goes on from, and what it saves: `Run` on prepared plates, in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hcsdl.commands.compose import compose_command, from_yaml
from hcsdl.commands.prepare import load_plan
from hcsdl.commands.run import Run
from hcsdl.commands.train import open_run_folder, prepare_run
from hcsdl.config import ConfigError, DataError
from hcsdl.data.preprocessing import load_preprocessing
from hcsdl.data.sending import Sender
from hcsdl.distributed.identity import Identity
from hcsdl.machine.cores import processor
from hcsdl.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from hcsdl.training.loop import State
from hcsdl.training.run_folder import RunFolder


@pytest.fixture
def folder(tiny_plates: Path, tmp_path: Path) -> Iterator[RunFolder]:
    """A run folder that is prepared and held."""
    words = ["experiment=tiny", f"plates.root={tiny_plates}", f"run_dir={tmp_path / 'run'}", "training.baseline=false", "kernels=reference"]
    config = compose_command("train", words)
    opened = open_run_folder(config)
    prepare_run(config, opened)
    yield opened
    opened.release()


def start(folder: RunFolder) -> Run:
    return Run(from_yaml("train", folder.config.read_text()), folder, Identity(), lambda: False, "system")


def saved(folder: RunFolder, step: int = 3, history: list[dict] | None = None) -> Run:
    """Start a run and save it as if `step` steps were done."""
    run = start(folder)
    run.save(State(step, history or [], 12.0))
    run.journal.close()
    return run


def test_a_resumed_run_has_all_that_was_saved(folder: RunFolder) -> None:
    first = start(folder)
    first.optimizer.zero_grad()
    first.objective.loss(first.model(torch.rand(4, 3, *first.plan.image_size)), torch.arange(4)).backward()
    first.optimizer.step()
    first.save(State(3, [{"step": 2, "well_accuracy": 0.5}], 12.0))
    first.journal.close()
    again = start(folder)
    again.journal.close()
    assert again.resumed and again.state == State(3, [{"step": 2, "well_accuracy": 0.5}], 12.0)
    assert len(again.optimizer.state) == len(first.optimizer.state) > 0
    assert all(torch.equal(value, again.bare.state_dict()[name]) for name, value in first.bare.state_dict().items())
    for one, other in zip(first.optimizer.state.values(), again.optimizer.state.values(), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])


def test_a_resume_on_another_processor_or_kernels_says_that_bits_will_differ(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    saved(folder)
    start(folder).journal.close()
    assert "otherwise than begun" not in caplog.text
    path = list_checkpoints(folder.checkpoints)[0]
    checkpoint = load_checkpoint(path)
    checkpoint.ran_on["processor"] = "another one"
    save_checkpoint(checkpoint, folder.checkpoints, keep=1, best=False)
    start(folder).journal.close()
    assert f"so not to the last bit (processor: {processor()}, before another one)" in caplog.text


def test_memory_of_an_optimizer_that_has_not_moved_yet_counts(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(folder)
    run.journal.close()
    told = []
    monkeypatch.setattr("hcsdl.commands.run.prediction", lambda steps, s, now, peak_gib, *_: told.append(peak_gib) or "")
    monkeypatch.setattr("hcsdl.commands.run.peak_rss_gib", lambda: 1.0)
    run._check_budget(1.0)
    run.optimizer.state[next(run.bare.parameters())] = {"momentum_buffer": torch.zeros(1)}
    run._check_budget(1.0)
    assert told[0] - told[1] == pytest.approx(4 * sum(p.numel() for p in run.bare.parameters()) / 2**30)


def test_fields_that_are_sent_train_the_same_network(folder: RunFolder) -> None:
    """As on a GPU, with the processor in its place: training and evaluation take the sent fields, and nothing of the numbers moves."""
    found = []
    for sender in (None, Sender(torch.device("cpu"))):
        run = start(folder)
        run.sender, run.total_steps = sender, 2
        run.parts.total_steps = 2
        run.parts.save = lambda state: None
        run.train()
        run.journal.close()
        found.append((run.state.history[-1]["val_accuracy"], [value.clone() for value in run.bare.state_dict().values()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


def test_pixels_are_scaled_as_when_the_run_began(folder: RunFolder) -> None:
    """Plates fitted anew in between, by another version, say, change nothing: the checkpoint's own scaling counts."""
    first = saved(folder)
    other = load_preprocessing(folder.preprocessing)
    dataclasses.replace(other, offset=other.offset + 7).save(folder.preprocessing)
    again = start(folder)
    again.journal.close()
    np.testing.assert_array_equal(again.preprocessing.offset, first.preprocessing.offset)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index_hash": "0" * 16}, "a run goes on with the fields it began with. The index was"),
        ({"classes": ["A", "B", "C", "D"]}, "a run goes on with the classes and channels of its checkpoint"),
        ({"channels": ["Actin", "DAPI", "Tubulin"]}, "a run goes on with the classes and channels of its checkpoint"),
    ],
)
def test_other_plates_are_refused(folder: RunFolder, change: dict, said: str) -> None:
    saved(folder)
    dataclasses.replace(load_plan(folder.plan), **change).save(folder.plan)
    with pytest.raises(DataError, match=said):
        start(folder)


def test_best_is_the_best_evaluation_at_its_own_step(folder: RunFolder) -> None:
    history: list[dict] = []
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, None), (4, 0.4)):  # no evaluation at step 3: nothing is known of it
        if accuracy is not None:
            history.append({"step": step, "well_accuracy": accuracy})
        saved(folder, step, list(history))
        assert load_checkpoint(folder.checkpoints / "best.pt").step == min(step, 2)


def test_an_attempt_that_was_taken_over_saves_nothing(folder: RunFolder) -> None:
    run = start(folder)
    folder.release()
    newer = RunFolder(folder.path)
    newer.acquire()
    with pytest.raises(ConfigError, match="was taken over by attempt 2; this is 1"):
        run.save(State(3))
    with pytest.raises(ConfigError, match="was taken over by attempt 2; this is 1"):
        run._train_loader(0, 1)
        run.finish(1.0)
    run.journal.close()
    newer.release()
    assert not list(folder.checkpoints.iterdir()) and not folder.weights.exists()
