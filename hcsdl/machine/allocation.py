"""What this job was given: how long it may run, and how much memory on this node.

In: the environment and Slurm's own `squeue`. Out: a `TimeLimit`, and GiB. Promised: what cannot be found out counts as no limit; it is not waited
for longer than `ANSWER_S`, and never an error.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

ANSWER_S = 20.0  # Slurm's controller may be busy; a guess


@dataclass(frozen=True)
class TimeLimit:
    """Seconds until a Slurm job is ended, and how long it may run from its start; infinity without a limit."""

    left_s: float = math.inf
    length_s: float = math.inf


def time_limit(environment: Mapping[str, str] | None = None) -> TimeLimit:
    """Return the time limit of the Slurm job this process runs in; none outside Slurm, or where nobody tells it.

    Slurm 23.02 and later put the job's end into the environment; before that `squeue` is asked, so call this on one rank only.
    """
    env = os.environ if environment is None else environment
    job = env.get("SLURM_JOB_ID")
    if not job:
        return TimeLimit()
    start, end = env.get("SLURM_JOB_START_TIME", ""), env.get("SLURM_JOB_END_TIME", "")
    if start.isdigit() and end.isdigit():
        return TimeLimit(int(end) - time.time(), int(end) - int(start))
    try:
        command = ["squeue", "--noheader", "--jobs", job, "--format", "%A|%L|%l"]
        said = subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=ANSWER_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return TimeLimit()
    found = [line.split("|") for line in said.split()]
    return next(
        (TimeLimit(seconds(left), seconds(limit)) for number, left, limit in found if number == job), TimeLimit()
    )  # an array has several


def seconds(text: str) -> float:
    """Return what `squeue` means by [days-][[hours:]minutes:]seconds; infinity where it is no time, as UNLIMITED and NOT_SET.

    >>> seconds("1-02:00:30")
    93630.0
    """
    if not re.fullmatch(r"(\d+-)?(\d+:){0,2}\d+", text):
        return math.inf
    days, _, rest = text.rpartition("-")
    total = 0
    for part in rest.split(":"):
        total = 60 * total + int(part)
    return float(total + 86400 * int(days or 0))


def memory_limit_gib(node_bytes: int, environment: Mapping[str, str] | None = None) -> float:
    """Return what all our processes on a node of `node_bytes` may hold together, in GiB: less than that where Slurm has given us less."""
    env = os.environ if environment is None else environment
    limits = [node_bytes]
    for each, times in (("SLURM_MEM_PER_NODE", "1"), ("SLURM_MEM_PER_CPU", env.get("SLURM_CPUS_ON_NODE", ""))):
        mib = env.get(each, "")
        if mib.isdigit() and times.isdigit() and int(mib):  # 0: the whole node
            limits.append(int(mib) * int(times) * 2**20)
    return min(limits) / 2**30
