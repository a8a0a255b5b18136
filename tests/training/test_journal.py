"""What is written while a run works, and what can be read back after a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hcsdl.training.journal import Journal, Silence, read_journal
from hcsdl.training.run_folder import RunFolder


def run_folder(path: Path) -> RunFolder:
    """Return a run folder as a rank of a new attempt sees it."""
    owner, rank = RunFolder(path), RunFolder(path)
    owner.acquire()
    owner.release()
    rank.join()
    return rank


def journal(path: Path, *, every_s: float = 0, first_step: int = 0, total_steps: int = 10) -> Journal:
    return Journal(run_folder(path), every_s=every_s, first_step=first_step, total_steps=total_steps, steps_per_epoch=4)


def values(step: int, step_s: float = 2.0, wait_s: float = 0.5) -> dict:
    """Return what the loop tells of a step."""
    return {
        "loss": 1 / step, "gradient_norm": 3.0, "learning_rate": 0.1 * step, "step_s": step_s, "data_wait_s": wait_s, "peak_rss_gib": 1.25,
        "seconds": {"data_s": wait_s, "optimizer_max_s": 0.25 * step},
    }  # fmt: skip


def scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all curves of a TensorBoard folder, {tag: [(step, value), …]}."""
    board = EventAccumulator(str(path))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_lines_have_all_fields(tmp_path: Path) -> None:
    own = journal(tmp_path)
    own.event("start", 0, {"resumed": False})
    own.step(1, 8, values(1))
    own.event("evaluation", 1, {"well_accuracy": 0.5})
    own.close()
    start, step, evaluation = read_journal(tmp_path / "journal.jsonl")
    for line in (start, step, evaluation):
        assert line["schema_version"] == 1 and line["attempt"] == 1 and line["time"] > 1.7e9
    assert (start["event"], start["step"], start["resumed"]) == ("start", 0, False)
    assert (evaluation["event"], evaluation["step"], evaluation["well_accuracy"]) == ("evaluation", 1, 0.5)
    told = {"epoch": 0.25, "loss": 1.0, "learning_rate": 0.1, "gradient_norm": 3.0, "images_per_s": 4.0, "step_s": 2.0,
            "data_s": 0.5, "optimizer_max_s": 0.25, "data_wait_share": 0.25, "peak_rss_gib": 1.25}  # fmt: skip
    assert {name: value for name, value in step.items() if name not in ("schema_version", "attempt", "time")} == {
        "event": "step",
        "step": 1,
    } | told


def test_every_step_is_counted_once_in_speed_and_waiting(tmp_path: Path) -> None:
    own = journal(tmp_path, every_s=1e9, total_steps=5)
    for step, (step_s, wait_s) in enumerate([(9.0, 9.0), (1.0, 0.25), (1.0, 0.0), (2.0, 0.75), (4.0, 1.0)], 1):
        own.step(step, 8, values(step, step_s, wait_s))
    own.close()
    first, last = read_journal(tmp_path / "journal.jsonl")
    assert (first["step"], first["data_wait_share"]) == (1, 1.0)
    assert (last["step"], last["data_wait_share"], last["step_s"], last["images_per_s"]) == (5, 0.25, 2.0, 4.0)
    assert (last["data_s"], last["optimizer_max_s"]) == (0.5, 0.875), "means over the steps since the last line"
    assert last["loss"] == 0.2, "the loss is the last step's own"


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    own = journal(tmp_path)
    own.step(1, 8, values(1))
    assert len(read_journal(tmp_path / "journal.jsonl")) == 1, "a kill must not take lines along"
    own.close()


def test_the_bar_names_speed_and_waiting_and_lets_sentences_through(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = journal(tmp_path, total_steps=2)
    for step in (1, 2):
        own.step(step, 8, values(step))
    own.say("accuracy of wells 0.5")
    own.close()
    said = capsys.readouterr()
    assert "accuracy of wells 0.5\n" in said.err and said.out == ""
    assert "loss 0.500, 4.00 images/s, data wait 25 %" in said.err and "epoch 0.50" in said.err and "2/2" in said.err


def test_tensorboard_has_every_number(tmp_path: Path) -> None:
    own = journal(tmp_path)
    for step in (1, 2, 3):
        own.step(step, 8, values(step))
    own.event("evaluation", 3, {"well_accuracy": 0.5, "file": "not a number"})
    own.close()
    found = scalars(tmp_path / "tensorboard")
    assert [step for step, _ in found["step/loss"]] == [1, 2, 3]
    assert [value for _, value in found["step/loss"]] == pytest.approx([1, 1 / 2, 1 / 3])
    assert found["evaluation/well_accuracy"] == [(3, 0.5)] and "evaluation/file" not in found
    written = {name for line in read_journal(tmp_path / "journal.jsonl") for name, value in line.items() if isinstance(value, float)}
    assert {name.partition("/")[2] for name in found} == written - {"time"}


def crash_and_resume(path: Path, *, at: int, reached: int) -> None:
    """Take `reached` steps with an evaluation at the last saved step `at`, stop without a word, go on from `at` for one step."""
    own = journal(path)
    for step in range(1, reached + 1):
        own.step(step, 8, values(step))
        if step == at:
            own.event("evaluation", step, {"well_accuracy": 0.5})
    own.close()
    for events in (path / "tensorboard").iterdir():  # files are read in the order of the second in their names, and a resume comes later
        events.rename(events.with_name(f"events.out.tfevents.1000000000.{at}"))
    own = journal(path, first_step=at)
    own.event("start", at, {"resumed": at > 0})
    own.step(at + 1, 8, values(at + 1) | {"loss": 7.0})
    own.close()


def test_after_a_resume_steps_done_twice_are_the_later_attempts(tmp_path: Path) -> None:
    crash_and_resume(tmp_path, at=3, reached=5)
    lines = [line for line in read_journal(tmp_path / "journal.jsonl") if line["event"] == "step"]
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 4)]
    curve = dict(scalars(tmp_path / "tensorboard")["step/loss"])
    assert curve[4] == 7.0 and 5 not in curve and {1, 2} <= curve.keys()


def test_what_was_saved_stays_in_tensorboard(tmp_path: Path) -> None:
    crash_and_resume(tmp_path, at=3, reached=5)
    found = scalars(tmp_path / "tensorboard")
    assert [step for step, _ in found["step/loss"]] == [1, 2, 3, 4]
    assert found["evaluation/well_accuracy"] == [(3, 0.5)]


def test_a_start_from_nothing_leaves_no_old_curve(tmp_path: Path) -> None:
    crash_and_resume(tmp_path, at=0, reached=5)
    assert scalars(tmp_path / "tensorboard")["step/loss"] == [(1, 7.0)]


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_last_line_cut_short_is_left_out(tmp_path: Path, cut: int) -> None:
    own = journal(tmp_path)
    for step in (1, 2, 3):
        own.step(step, 8, values(step))
    own.close()
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    expected = [1, 2, 3] if cut == 1 else [1, 2]  # without its line feed a line is still whole
    assert [line["step"] for line in read_journal(path)] == expected


def test_the_next_attempts_first_line_is_not_glued_to_a_cut_one(tmp_path: Path) -> None:
    own = journal(tmp_path)
    own.step(1, 8, values(1))
    own.step(2, 8, values(2))
    own.close()
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    own = journal(tmp_path, first_step=1)
    own.event("start", 1, {"resumed": True})
    own.close()
    assert [(line["event"], line["attempt"]) for line in read_journal(path)] == [("step", 1), ("start", 2)]


def test_lines_are_json_objects_of_one_line(tmp_path: Path) -> None:
    own = journal(tmp_path)
    own.event("checkpoint", 1, {"file": "step\n1 µ.pt"})
    own.close()
    (line,) = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "step\n1 µ.pt"


def test_silence_takes_everything_and_says_nothing(capsys: pytest.CaptureFixture) -> None:
    quiet = Silence()
    quiet.step(1, 8, values(1))
    quiet.event("start", 0, {})
    quiet.say("a sentence")
    quiet.close()
    assert capsys.readouterr() == ("", "")
