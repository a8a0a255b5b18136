"""Under a real Slurm of two nodes: a job is one training, however often it is stopped, and a sweep is one table."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from hcsdl.commands import cli
from tests import runs
from tests.slurm_cluster import ENDED, MISSING, PROJECT, Cluster, wait_until

pytestmark = [pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed here: no {MISSING}"), pytest.mark.timeout(600)]

TRAIN, SWEEP, EMBED = (PROJECT / "slurm" / f"{name}.sbatch" for name in ("train", "sweep", "embed"))
WORDS = [*runs.TINY, "kernels=native", "training.checkpoint_every_steps=1", "training.epochs=2"]
OVER = "distributed.backend=ccl"
TWO_NODES, ONE_NODE = ["--nodes=2", "--ntasks-per-node=1"], ["--nodes=1", "--ntasks-per-node=2"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as started:
        yield started


class Submitted:
    """A training submitted to the cluster: its job, run folder and output."""

    def __init__(self, cluster: Cluster, plates: Path, folder: Path, nodes: list[str], *settings: str) -> None:
        self.cluster = cluster
        words = [*WORDS, OVER, f"plates.root={plates}", "distributed.silence_s=8", *settings]
        self.job = cluster.sbatch(*nodes, TRAIN, *words, folder=folder)
        self.run, self.log = folder / "runs" / f"{self.job}_tiny", folder / f"hcsdl-{self.job}.out"

    def wait_for_step(self, step: int, attempt: int) -> None:
        self.wait_until(lambda: runs.last_step(self.run, attempt) >= step, f"step {step} of attempt {attempt}")

    def wait_until(self, true: Callable[[], bool], what: str) -> None:
        """Wait until `true()`; fail where the job ends before."""
        wait_until(lambda: true() or self.cluster.state(self.job) in ENDED, what, log=self.log)
        assert true(), f"{what} did not come before the job's end\n{self.log.read_text()}"

    def finish(self) -> dict:
        """Wait for its end and return the run's summary."""
        assert self.cluster.wait(self.job, self.log) == "COMPLETED", self.log.read_text()
        return runs.summary(self.run)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tiny_plates: Path) -> tuple[Path, str]:
    """The folder of a job of two nodes that nothing happened to, and its id; trained once for all test processes."""

    def train(folder: Path) -> None:
        folder.mkdir()
        Submitted(cluster, tiny_plates, folder, TWO_NODES).finish()

    folder = runs.once(tiny_plates.parent / "undisturbed", train)
    return folder, runs.digest(next((folder / "runs").iterdir()))


def test_two_nodes_train_in_one_run_folder(undisturbed: tuple[Path, str]) -> None:
    folder, _ = undisturbed
    [run] = (folder / "runs").iterdir()
    summary = runs.summary(run)
    assert summary["world_size"] == 2 and summary["backend"] == "ccl" and summary["attempts"] == 1
    assert sorted(log.name for log in (run / "logs").iterdir()) == ["rank0.log", "rank1.log"]
    assert run.name == f"{next(folder.glob('hcsdl-*.out')).stem.removeprefix('hcsdl-')}_tiny"


def test_requeued_in_mid_epoch_twice_one_node_ends_with_the_bits_of_two(
    cluster: Cluster, tiny_plates: Path, tmp_path: Path, undisturbed: tuple[Path, str]
) -> None:
    job = Submitted(cluster, tiny_plates, tmp_path, ONE_NODE)
    job.wait_for_step(3, attempt=1)
    cluster.ask("scancel", "--batch", "--signal=USR1", job.job)  # what comes before the time limit
    job.wait_for_step(9, attempt=2)
    cluster.ask("scontrol", "requeue", job.job)
    summary = job.finish()
    assert summary["attempts"] == 3 and cluster.field(job.job, "Restarts") == "2"
    steps = [line["step"] for line in runs.journal(job.run) if line["event"] == "step"]
    assert steps == list(range(1, summary["steps"] + 1)), "a step was lost or done twice: not every attempt finished its step and saved"
    assert runs.digest(job.run) == undisturbed[1]


def test_a_killed_rank_and_a_dead_node_cost_restarts_and_no_bit(
    cluster: Cluster, tiny_plates: Path, tmp_path: Path, undisturbed: tuple[Path, str]
) -> None:
    job = Submitted(cluster, tiny_plates, tmp_path, TWO_NODES)
    job.wait_for_step(3, attempt=1)
    [rank] = processes(cluster, job.job, "SLURM_PROCID=1", "SLURM_STEP_ID=0")
    os.kill(rank, signal.SIGKILL)
    job.wait_for_step(9, attempt=2)
    assert "rank 1" in job.log.read_text() and "ended with code 5 and goes back into the queue" in job.log.read_text()
    cluster.kill_node("n2")
    job.wait_until(lambda: cluster.field(job.job, "Restarts") == "2", "the job back in the queue")
    cluster.start_node("n2")
    assert job.finish()["attempts"] == 3
    assert runs.digest(job.run) == undisturbed[1]


def test_an_embedding_is_shared_by_two_nodes_and_goes_back_into_the_queue(
    cluster: Cluster, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    """Asked to make room as soon as something is saved, it saves, goes back and ends with one whole table."""
    [run] = (undisturbed[0] / "runs").iterdir()
    words = ["kernels=native", "embed.mini_batch_size=1", "embed.save_every_s=0", "data.workers=0", "distributed.backend=gloo"]
    for number in range(5):  # tries: on a busy machine it may be done before we look
        output = tmp_path / f"table{number}.parquet"
        job = cluster.sbatch(*TWO_NODES, EMBED, f"checkpoint={run}", f"embed.output={output}", *words, folder=tmp_path)
        log = tmp_path / f"hcsdl-{job}.out"
        parts = output.with_suffix(".work") / "parts"
        wait_until(lambda: list(parts.glob("*.npz")) or cluster.state(job) in ENDED, "something saved", log=log)  # noqa: B023
        cluster.ask("scancel", "--batch", "--signal=USR1", job)
        assert cluster.wait(job, log) == "COMPLETED", log.read_text()
        if cluster.field(job, "Restarts") == "1":
            break
    said = log.read_text()
    assert "start the same command again to go on" in said and "mini-batches were computed before" in said
    assert re.search(r"rank 0 of 2.*\bn1\b", said) and re.search(r"rank 1 of 2.*\bn2\b", said), said
    table = pd.read_parquet(output)
    assert len(table) == len(pd.read_parquet(run / "index.parquet")) and table.filter(like="Embedding_").notna().all(axis=None)


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tiny_plates: Path, tmp_path: Path) -> None:
    job = Submitted(cluster, tiny_plates, tmp_path, ["--nodes=1", "--ntasks-per-node=1"])
    job.wait_for_step(1, attempt=1)
    assert ": 1 rank × 1 thread" in job.log.read_text(), "a single task is a rank, too"
    cluster.ask("scancel", job.job)
    assert cluster.wait(job.job) == "CANCELLED"
    wait_until(lambda: not processes(cluster, job.job), "the end of its processes", log=job.log)
    assert list((job.run / "checkpoints").glob("step-*.pt")) and not (job.run / "summary.json").exists()
    assert cluster.state(job.job) == "CANCELLED" and cluster.field(job.job, "Restarts") == "0"


def test_an_array_is_a_sweep_with_one_table(cluster: Cluster, tiny_plates: Path, tmp_path: Path) -> None:
    words = [
        *WORDS,
        OVER,
        f"plates.root={tiny_plates}",
        "training.max_steps=1",
        "training.learning_rate=0.01,0.05",
        "training.global_batch_size=4,1000",
    ]
    array = cluster.sbatch("--array=0-3", "--hold", *TWO_NODES, SWEEP, *words, folder=tmp_path)
    cluster.ask("scancel", f"{array}_3")
    cluster.ask("scontrol", "release", array)
    for element in range(3):
        cluster.wait(f"{array}_{element}", tmp_path / f"hcsdl-sweep-{array}_{element}.out")
    code, metric, rows = table(cluster, tmp_path / "multirun" / array)
    assert metric == "well_accuracy" and code == 2
    values = [float(said) for _, said, _ in rows[:2]]
    assert {number for number, _, _ in rows[:2]} == {"0", "2"} and values == sorted(values, reverse=True)
    assert rows[2] == ("1", "exit code 2", "training.learning_rate=0.01 training.global_batch_size=1000")
    assert rows[3][0] == "3" and rows[3][1].startswith("did not run")
    assert all(runs.summary(tmp_path / "multirun" / array / element / "run")["world_size"] == 2 for element in "02")


def test_an_array_of_another_size_than_the_sweep_is_refused(cluster: Cluster, tiny_plates: Path, tmp_path: Path) -> None:
    array = cluster.sbatch("--array=0-1", SWEEP, *WORDS, f"plates.root={tiny_plates}", "seed=0,1,2", folder=tmp_path)
    assert cluster.wait(f"{array}_0") == "FAILED" and cluster.exit_code(f"{array}_0") == 2
    said = (tmp_path / f"hcsdl-sweep-{array}_0.out").read_text()
    assert "3 combinations" in said and "It has 2" in said and "--array=0-2" in said


def test_submitit_driver_ends_although_a_job_died(cluster: Cluster, tiny_plates: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    words = [
        *WORDS,
        f"plates.root={tiny_plates}",
        "distributed.ranks=1",
        "training.epochs=2000",
        "training.max_steps=1,10000",
        f"hydra.sweep.dir={folder}",
    ]
    driver = subprocess.Popen(
        [sys.executable, "-m", "hcsdl", "train", "-m", "hydra/launcher=submitit_slurm", *words], env=cluster.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        both = lambda: runs.last_step(folder / "1" / "run", 1) >= 2 and (folder / "0" / "job.json").exists()  # noqa: E731
        wait_until(lambda: both() or driver.poll() is not None, "a finished and a running job")
        assert driver.returncode is None, driver.communicate()
        array = json.loads((folder / "sweep.json").read_text())["slurm_job"]
        for process in processes(cluster, cluster.field(f"{array}_1", "JobId")):  # its batch script, and its rank
            os.kill(process, signal.SIGKILL)
        out, err = driver.communicate(timeout=200)
    finally:
        driver.kill()
    assert driver.returncode == 75, err
    rows = parsed(out)[1]
    assert re.fullmatch(r"0\.\d{4}", rows[0][1]) and rows[0][0] == "0"
    assert rows[1][0] == "1" and rows[1][1].startswith("did not finish")


def test_what_sbatch_refuses_of_a_submitted_sweep_is_told(
    cluster: Cluster, tiny_plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    words = [*WORDS, f"plates.root={tiny_plates}", "seed=0,1", f"hydra.sweep.dir={tmp_path}", "hydra.launcher.partition=nowhere"]
    assert cli.main(["train", "-m", "hydra/launcher=submitit_slurm", *words]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("hcsdl: sbatch must take the jobs with hydra.launcher as it is set. It said: ") and "invalid partition" in told
    assert not cluster.ask("squeue", "--noheader", "--name=hcsdl-sweep", "--states=PENDING,RUNNING")


def processes(cluster: Cluster, job: str, *variables: str) -> list[int]:
    """Return the process ids of a job's own Pythons in whose environment these variables stand. (Other test processes' clusters have such jobs, too.)"""
    found = []
    wanted = {variable.encode() for variable in (f"SLURM_CONF={cluster.environment['SLURM_CONF']}", f"SLURM_JOB_ID={job}", *variables)}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = wanted <= set((process / "environ").read_bytes().split(b"\0"))
            if ours and (process / "cmdline").read_bytes().startswith(sys.executable.encode()):
                found.append(int(process.name))
    return found


def table(cluster: Cluster, folder: Path) -> tuple[int, str, list[tuple[str, str, str]]]:
    """Return the exit code of `hcsdl sweep`, and what `parsed` makes of its output."""
    done = subprocess.run(
        [sys.executable, "-m", "hcsdl", "sweep", f"folder={folder}"],
        env=cluster.environment,
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )
    return (done.returncode, *parsed(done.stdout))


def parsed(out: str) -> tuple[str, list[tuple[str, str, str]]]:
    """Return a printed table's metric, and number, result and overrides of each line."""
    head, *lines = out.rpartition("sweep ")[2].splitlines()[1:]
    found = [re.fullmatch(r" *(\d+)  (.*?)  +(.*)", line) for line in lines]
    return head.split()[1], [(match[1], match[2], match[3]) for match in found if match]
