"""What Slurm has given a job: asked of a real Slurm where there is one, and read from what newer ones put into the environment."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest

from hcsdl.machine.allocation import TimeLimit, memory_limit_gib, seconds, time_limit
from tests.slurm_cluster import MISSING, PROJECT, Cluster

SCRIPT = """#!/bin/bash
cd {project} && {python} -c '
import dataclasses, json
from hcsdl.machine.allocation import memory_limit_gib, time_limit
print(json.dumps([dataclasses.asdict(time_limit()), memory_limit_gib(2**40)]))'
sleep 1  # so that the elements of an array run at once
"""


@pytest.mark.skipif(bool(MISSING), reason=f"no Slurm here: {MISSING}")
def test_a_real_slurm_is_asked_for_the_time_that_is_left(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(SCRIPT.format(project=PROJECT, python=sys.executable))
    with Cluster() as slurm:
        array = slurm.sbatch("--array=0-1", "--time=1-02:00", "--mem=1024", "--output=%a.out", script, folder=tmp_path)
        free = slurm.sbatch("--time=UNLIMITED", "--mem-per-cpu=512", "--cpus-per-task=2", "--output=free.out", script, folder=tmp_path)
        for job in (f"{array}_0", f"{array}_1", free):
            assert slurm.wait(job) == "COMPLETED"
    day = 26 * 3600.0
    for name in ("0", "1"):
        limit, memory = json.loads((tmp_path / f"{name}.out").read_text())
        assert day - 60 < limit["left_s"] <= day and limit["length_s"] == day and memory == 1.0
    limit, memory = json.loads((tmp_path / "free.out").read_text())
    assert limit["left_s"] == limit["length_s"] >= 365 * 86400.0 and memory == 1.0  # a year, or none


def test_a_newer_slurm_says_it_in_the_environment() -> None:
    now = int(time.time())
    found = time_limit({"SLURM_JOB_ID": "7", "SLURM_JOB_START_TIME": str(now - 600), "SLURM_JOB_END_TIME": str(now + 3000)})
    assert found.length_s == 3600 and 2900 < found.left_s <= 3001


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": "7", "PATH": "/nowhere"}], ids=["no job", "no squeue"])
def test_without_slurm_there_is_no_limit(environment: dict[str, str]) -> None:
    assert time_limit(environment) == TimeLimit(math.inf, math.inf)


@pytest.mark.parametrize(
    ("text", "value"),
    [("45", 45), ("12:05", 725), ("2:00:01", 7201), ("3-04:00:00", 273600), ("UNLIMITED", math.inf), ("NOT_SET", math.inf), ("", math.inf)],
)
def test_slurm_times(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("environment", "gib"),
    [
        ({}, 384),
        ({"SLURM_MEM_PER_NODE": "102400"}, 100),
        ({"SLURM_MEM_PER_NODE": "0"}, 384),
        ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "40"}, 80),
        ({"SLURM_MEM_PER_NODE": "1048576"}, 384),
    ],
    ids=["no Slurm", "of a node", "the whole node", "of a core", "more than there is"],
)
def test_the_least_of_node_and_job_is_the_limit(environment: dict[str, str], gib: float) -> None:
    assert memory_limit_gib(384 * 2**30, environment) == gib
