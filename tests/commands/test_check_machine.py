"""`hcsdl check machine` on the machine the tests run on."""

from __future__ import annotations

import pytest

from hcsdl.commands.check_machine import run
from hcsdl.config import CheckMachineCommand, DistributedConfig, MachineConfig
from hcsdl.machine.topology import read_machine

SUBJECTS = (
    "bf16",
    "cores",
    "NUMA",
    "threads",
    "load",
    "memory",
    "huge pages",
    "clock",
    "compiler",
    "IPEX",
    "oneCCL",
    "/dev/shm",
    "open files",
    "host name",
)


def test_plan_and_verdicts_are_printed(capsys: pytest.CaptureFixture) -> None:
    code = run(CheckMachineCommand(distributed=DistributedConfig(ranks=2)))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("rank ") for line in lines) == 2
    said = [line for line in lines if line.split()[0] in ("ok", "note", "PROBLEM")]
    for subject in SUBJECTS:
        assert sum(line[8:].startswith(f"{subject}: ") for line in said) == 1, subject
    problems = [line for line in said if line.startswith("PROBLEM")]
    assert code == bool(problems) and ("fit to train on" in lines[-1]) == (not problems)


def test_more_threads_than_cores_are_a_problem(capsys: pytest.CaptureFixture) -> None:
    threads = read_machine().usable_cores + 1
    assert (
        run(CheckMachineCommand(machine=MachineConfig(threads_per_rank=threads), distributed=DistributedConfig(backend="gloo", ranks=1)))
        == 1
    )
    out = capsys.readouterr().out
    assert f"PROBLEM threads: {threads} compute threads on {threads - 1} cores" in out and "Lower distributed.ranks" in out
    assert "1 problem: see above" in out or "problems: see above" in out
