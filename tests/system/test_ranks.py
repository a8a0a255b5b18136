"""Ranks are a matter of speed, not of numbers; and every way to start them works."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

import hcsdl
import hcsdl.config
import hcsdl.models
from tests import forked, runs
from tests.forked import start_ranks, train_on

EXPERIMENTS = sorted(p.stem for p in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))


def test_two_ranks_equal_one_rank_with_twice_the_mini_batch(tiny_plates: Path, tmp_path: Path) -> None:
    words = ["model=mcnn", "model.head=pool", "model.width=0.5", "kernels=reference", "training.max_steps=5", "training.global_batch_size=4",
             "training.learning_rate=0.02", "training.warmup_epochs=0"]  # fmt: skip
    for ranks in (1, 2):
        train_on(ranks, tiny_plates, tmp_path / str(ranks), *words)
    one, two = (safetensors.torch.load_file(tmp_path / ranks / "model.safetensors") for ranks in ("1", "2"))
    start = hcsdl.models.build_model(hcsdl.config.ModelConfig(name="mcnn", head="pool", width=0.5), 3, 4)
    assert any(not torch.equal(one[name], value) for name, value in start.state_dict().items()), "nothing was trained"
    far = max(float((one[name] - two[name]).norm() / one[name].norm()) for name in one)
    print("largest relative difference:", far)
    assert far < 1e-6
    losses = [[line["loss"] for line in runs.journal(tmp_path / ranks) if line["event"] == "step"] for ranks in ("1", "2")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 5
    assert runs.summary(tmp_path / "2")["world_size"] == 2


def test_accumulation_equals_one_mini_batch(tiny_plates: Path, tmp_path: Path) -> None:
    words = ["model=mcnn", "model.head=pool", "model.width=0.5", "kernels=reference", "training.max_steps=3"]
    for mini in ("1", "2"):
        train_on(2, tiny_plates, tmp_path / mini, *words, f"training.mini_batch_size={mini}")
    one, two = (safetensors.torch.load_file(tmp_path / mini / "model.safetensors") for mini in ("1", "2"))
    assert max(float((one[name] - two[name]).norm() / one[name].norm()) for name in one) < 3e-6  # another order of additions


def test_torchrun_gives_the_same_weights(tiny_plates: Path, tmp_path: Path) -> None:
    words = [*runs.TINY, f"plates.root={tiny_plates}", "kernels=native", "training.epochs=1"]
    forked.run("train", *words, f"run_dir={tmp_path / 'own'}", "distributed.ranks=2")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "hcsdl", "train", *words, f"run_dir={tmp_path / 'torchrun'}"],
        env=runs.environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert runs.digest(tmp_path / "own") == runs.digest(tmp_path / "torchrun")
    assert (tmp_path / "torchrun" / "logs" / "rank1.log").exists()


def test_what_is_wrong_for_all_ranks_is_told_once(tmp_path: Path) -> None:
    run = ["train", f"run_dir={tmp_path}/run"]
    wrong = [
        (3, "plates.root must hold", [*run, f"plates.root={tmp_path}"]),
        (3, "plates.root must be a folder", [*run, f"plates.root={tmp_path}/none"]),
        (2, "plates.root must be given", run),
        (2, "checkpoint must be a run folder", ["embed", f"checkpoint={tmp_path}/none"]),
    ]
    for number, (code, said, words) in enumerate(wrong):
        ranks = start_ranks(words, 2, tmp_path / str(number))
        assert [rank.wait(100) for rank in ranks] == [code, code], ranks[0].said()
        assert "".join(rank.said() for rank in ranks).count(f"hcsdl: {said}") == 1


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_a_step_on_tiny_plates(tiny_plates: Path, tmp_path: Path, experiment: str) -> None:
    small = [
        "machine.threads_per_rank=1",
        "training.max_steps=1",
        "training.global_batch_size=4",
        "distributed.ranks=1",
        "training.baseline=false",
        "model.width=0.25",
    ]
    forked.run("train", f"experiment={experiment}", f"plates.root={tiny_plates}", f"run_dir={tmp_path / 'run'}", *small)
    assert runs.summary(tmp_path / "run")["steps"] == 1


def sweep_words(plates: Path, folder: Path, epochs: int) -> list[str]:
    return [
        *runs.TINY,
        f"plates.root={plates}",
        f"training.epochs={epochs}",
        "distributed.ranks=1",
        "kernels=native",
        f"hydra.sweep.dir={folder / 'sweep'}",
    ]


def test_a_sweep_runs_each_job_in_its_own_folder_and_sorts_the_table(tiny_plates: Path, tmp_path: Path) -> None:
    words = sweep_words(tiny_plates, tmp_path, epochs=1)
    done = forked.run("train", "-m", *words, "training.learning_rate=0.01,0.1,0.3", code=0)
    table = done.stdout.rpartition("sweep ")[2].splitlines()[2:]
    values = [float(line.split()[1]) for line in table]
    assert len(values) == 3 and values == sorted(values, reverse=True)
    assert len({runs.digest(tmp_path / "sweep" / str(job) / "run") for job in range(3)}) == 3


def test_a_failed_job_of_a_sweep_is_listed_and_the_others_go_on(tiny_plates: Path, tmp_path: Path) -> None:
    words = sweep_words(tiny_plates, tmp_path, epochs=1)
    done = forked.run("train", "-m", *words, "training.global_batch_size=1000,4", code=2)
    table = done.stdout.rpartition("sweep ")[2].splitlines()[2:]
    assert table[0].split()[0] == "1" and "exit code 2" in table[1]


def test_a_sweep_stops_at_a_signal(tiny_plates: Path, tmp_path: Path) -> None:
    words = sweep_words(tiny_plates, tmp_path, epochs=500)
    process = runs.start("train", "-m", *words, "seed=0,1")
    runs.wait_for_step(process, tmp_path / "sweep" / "0" / "run", 2)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 75, err
    assert "did not run" in out


def test_load_run_gives_network_and_preprocessing(tiny_plates: Path, tmp_path: Path) -> None:
    train_on(2, tiny_plates, tmp_path / "run", "kernels=reference", "training.epochs=1")
    run = hcsdl.load_run(tmp_path / "run")
    assert len(repr(run)) < 300  # a notebook's cell may end with it
    with pytest.raises(hcsdl.config.ConfigError, match="There is nothing at"):
        hcsdl.load_run(tmp_path / "none")
    assert run.channels == ["DAPI", "Tubulin", "Actin"] and run.classes == runs.summary(tmp_path / "run")["classes"]
    weights = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in run.model.state_dict().items())

    # The notebook's prediction for the held-out fields gives the accuracy the run has reported.
    from hcsdl.plates.index import load_index

    index = load_index(tmp_path / "run")
    held_out = (index.table["Metadata_Split"] == "val").to_numpy().nonzero()[0]
    right = []
    for row in held_out:
        found = run.probabilities(run.prepare(index.paths(row), index.table["Metadata_Plate"].iat[row]))
        right.append(run.classes[int(found.argmax())] == index.table["Metadata_Class"].iat[row])
    assert sum(right) / len(right) == pytest.approx(runs.summary(tmp_path / "run")["val_accuracy"])


def compare_parameters() -> None:
    """Let this rank say, once trained, whether all ranks have its parameters."""
    from hcsdl.commands.run import Run

    finish = Run.finish

    def compare(self: Run, seconds: float) -> None:
        own = torch.cat([p.detach().flatten() for p in self.bare.parameters()])
        everyone = self.group.all_gather_object(own)
        print("\nequal" if all(torch.equal(own, other) for other in everyone) else "\ndifferent", flush=True)
        finish(self, seconds)

    Run.finish = compare


def test_parameters_are_equal_on_all_ranks_after_training(tiny_plates: Path, tmp_path: Path) -> None:
    words = ["train", *runs.TINY, f"plates.root={tiny_plates}", f"run_dir={tmp_path / 'run'}", "training.epochs=1"]
    ranks = start_ranks(words, 2, tmp_path / "said", dict.fromkeys((0, 1), compare_parameters))
    for rank in ranks:
        assert rank.wait(100) == 0, rank.said()
        assert "equal" in rank.said().split() and "different" not in rank.said().split()


def another_index() -> None:
    """Let this rank read an index that is not the others'."""
    from hcsdl.commands import run

    sound = run.load_index
    run.load_index = lambda path: dataclasses.replace(sound(path), hash="0123456789abcdef")


def test_another_index_on_one_rank_stops_the_run_with_both_values(tiny_plates: Path, tmp_path: Path) -> None:
    words = ["train", *runs.TINY, f"plates.root={tiny_plates}", f"run_dir={tmp_path / 'run'}", "distributed.backend=gloo"]
    ranks = start_ranks(words, 2, tmp_path / "said", {1: another_index})
    assert [rank.wait(100) for rank in ranks] == [2, 2], ranks[0].said()
    host, found = os.uname().nodename, json.loads((tmp_path / "run" / "index.json").read_text())["hash"]
    told = f"every rank must have the same index. Rank 0 on {host} has '{found}', rank 1 on {host} has '0123456789abcdef'."
    assert told in ranks[0].said()


def in_a_job(mib: int) -> None:
    """Be in a Slurm job that has `mib` MiB on each node, and time enough."""
    now = int(time.time())
    os.environ |= {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_START_TIME": str(now),
        "SLURM_JOB_END_TIME": str(now + 10**6),
        "SLURM_MEM_PER_NODE": str(mib),
    }


def test_the_ranks_of_a_node_share_its_memory(tiny_plates: Path, tmp_path: Path) -> None:
    """With memory for one and a half ranks, two are refused by training.strict_budget, all alike; with enough for both they train."""
    told = []
    for mib in (10**6, 0):
        mib = mib or int(0.75 * 1024 * float(re.search(r"peak memory about ([\d.]+) of", told[0])[1]))
        words = ["train", *runs.TINY, f"plates.root={tiny_plates}", f"run_dir={tmp_path / str(mib)}", "distributed.backend=gloo",
                 "kernels=native", "training.max_steps=1", "training.strict_budget=true"]  # fmt: skip
        ranks = start_ranks(words, 2, tmp_path / f"said {mib}", dict.fromkeys((0, 1), partial(in_a_job, mib)))
        code = 0 if not told else 2
        assert [rank.wait(100) for rank in ranks] == [code, code], ranks[0].said()
        told.append(ranks[0].said())
    assert "training.strict_budget=true: the ranks of a node must fit into its memory" in told[1]
    assert "strict_budget" not in ranks[1].said(), "what all say alike, rank 0 says"
