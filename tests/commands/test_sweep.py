"""A sweep's combinations, its table, and when a job goes back into the queue."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hcsdl.commands import slurm
from hcsdl.commands.slurm import fruitless_starts, goes_on
from hcsdl.commands.sweep import combinations, launcher_fields, run
from hcsdl.commands.sweep_table import JOB, print_table, write_sweep
from hcsdl.config import ConfigError, SweepCommand
from hcsdl.distributed.slurm import Job
from hcsdl.training.run_folder import write_json

pytestmark = pytest.mark.xeon_only


def test_the_last_value_varies_fastest() -> None:
    found = combinations(["experiment=tiny", "training.learning_rate=0.1,0.2", "seed=0,1"])
    assert [job[1:] for job in found] == [[f"training.learning_rate={rate}", f"seed={seed}"] for rate in (0.1, 0.2) for seed in (0, 1)]


def test_a_combination_that_cannot_be_is_refused_before_any_runs() -> None:
    with pytest.raises(ConfigError, match="learning_rate must be above 0"):
        combinations(["training.learning_rate=0.1,-1"])


def finish(folder: Path, job: int, accuracy: float | None, code: int | None) -> None:
    run = folder / str(job) / "run"
    run.mkdir(parents=True)
    (run / "lock").touch()
    if accuracy is not None:
        write_json(run / "summary.json", {"metric": "val_accuracy", "val_accuracy": accuracy, "leaky": job == 2})
    if code is not None:
        write_json(folder / str(job) / JOB, {"exit_code": code})


def test_the_table_is_sorted_by_the_metric_with_failed_and_missing_runs_last(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_sweep(tmp_path, [["name=x", f"seed={seed}", "hydra.sweep.dir=there"] for seed in range(6)])
    finish(tmp_path, 0, 0.25, 0)
    finish(tmp_path, 1, None, 3)
    finish(tmp_path, 2, 0.75, 0)
    finish(tmp_path, 3, None, None)
    finish(tmp_path, 5, 0.5, None)  # killed after its summary
    assert print_table(tmp_path) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["job", "val_accuracy", "overrides"]
    assert [" ".join(line.split()) for line in lines[3:]] == [
        "2 0.7500 (leaky) seed=2", "5 0.5000 seed=5", "0 0.2500 seed=0", "1 exit code 3 seed=1", "3 did not finish seed=3", "4 did not run seed=4",
    ]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), [('{"jobs":', "is no JSON"), ("[]", "lists no jobs"), (None, "has none")])
def test_a_folder_that_is_no_sweeps_is_told(tmp_path: Path, content: str | None, said: str) -> None:
    if content:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        run(SweepCommand(folder=str(tmp_path)))


def test_a_sweeps_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.dir"):
        write_sweep(tmp_path / "file", [["seed=0"]])


def test_the_exit_code_is_0_when_all_have_finished_and_75_while_some_may_still(tmp_path: Path) -> None:
    write_sweep(tmp_path, [["seed=0"], ["seed=1"]])
    finish(tmp_path, 0, 0.5, 0)
    assert run(SweepCommand(folder=str(tmp_path))) == 75
    finish(tmp_path, 1, 0.5, 0)
    assert run(SweepCommand(folder=str(tmp_path))) == 0


def test_a_folder_holds_one_sweep(tmp_path: Path) -> None:
    write_sweep(tmp_path, [["seed=0"], ["seed=1"]])
    write_sweep(tmp_path, [["seed=0", "hydra.sweep.dir=here"], ["seed=1"]], "77")  # the same, gone on with
    with pytest.raises(ConfigError, match="holds another sweep of 2"):
        write_sweep(tmp_path, [["seed=0"], ["seed=2"]])
    with pytest.raises(ConfigError, match="has none"):
        run(SweepCommand(folder=str(tmp_path / "elsewhere")))


def test_the_fields_of_the_submitit_launcher_reach_the_batch_script() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    fields = launcher_fields(["experiment=tiny", "hydra/launcher=submitit_slurm", "hydra.launcher.nodes=8", "hydra.launcher.partition=cpu"])
    assert fields["nodes"] == 8 and fields["partition"] == "cpu" and fields["timeout_min"] == 60
    assert "_target_" not in fields and None not in fields.values()


def test_an_array_element_without_all_of_its_numbers_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "ARRAY_TASK_MIN"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    for name in ("SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["slurm", "-m", "experiment=tiny", "seed=0,1"])
    assert slurm.main() == 2
    said = capsys.readouterr().err
    assert "Missing: SLURM_ARRAY_TASK_MAX, SLURM_ARRAY_TASK_COUNT; sbatch sets them all." in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "fruitless", "expected"),
    [
        (75, 0, True), (5, 2, True), (1, 2, True), (75, 3, False), (5, 3, False), (1, 3, False),  # stopped or short of a rank: not for ever in vain
        (0, 0, False), (2, 0, False), (3, 0, False), (4, 0, False),  # done, or what no restart mends
    ],
)  # fmt: skip
def test_a_job_goes_back_into_the_queue_only_where_that_can_help(code: int, fruitless: int, expected: bool) -> None:
    assert goes_on(code, fruitless) is expected


def test_starts_are_fruitless_since_the_last_that_saved_something(tmp_path: Path) -> None:
    last_start = tmp_path / "last_start.json"
    assert [fruitless_starts(Job("7", "7", restarts), last_start) for restarts in range(3)] == [1, 2, 3]
    write_json(last_start, {"job": "7", "restarts": 20})
    assert [fruitless_starts(Job("7", "7", restarts), last_start) for restarts in (20, 21, 23)] == [0, 1, 3]
    assert fruitless_starts(Job("8", "8", 0), last_start) == 1, "another job's starts are not this one's"
