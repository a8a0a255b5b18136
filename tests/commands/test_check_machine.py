"""`hcsdl check machine` on the machine the tests run on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hcsdl.commands import check_machine
from hcsdl.commands.check_machine import judge, run
from hcsdl.config import CheckMachineCommand, DistributedConfig, MachineConfig
from hcsdl.distributed.identity import Identity
from hcsdl.machine import facts
from hcsdl.machine.facts import Interface
from hcsdl.machine.placement import plan_places
from hcsdl.machine.topology import read_machine
from tests.machine import trees

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
    "left behind",
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


GIB = 2**30
GOOD = {
    "online_cores": 40,
    "load_average": 0.0,
    "huge_pages": "madvise",
    "governor": ("intel_pstate", "performance"),
    "compiler": "/usr/bin/gcc",
    "stale_segments": {},
    "shared_memory_bytes": (64 * GIB, 64 * GIB),
    "open_files_limit": 65536.0,
    "locked_memory_limit": float("inf"),
    "fabric_devices": [],
    "interfaces": [Interface("ib0", True, 100_000)],
    "addresses_of": ["10.0.0.7"],
}


@pytest.mark.parametrize(
    ("fact", "value", "subject"),
    [
        ("", None, ""),
        ("shared_memory_bytes", (GIB // 16, GIB // 16), "/dev/shm"),
        ("open_files_limit", 64.0, "open files"),
        ("governor", ("acpi-cpufreq", "powersave"), "clock"),
        ("addresses_of", [], "host name"),
        ("stale_segments", {Path("/dev/shm/7:0:0"): 64}, ""),
    ],
)
def test_one_bad_fact_is_one_problem_and_code_1(
    fact: str, value: object, subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Of an otherwise good host, a made-up one of four NUMA nodes; what is installed here is judged as it is."""
    machine = read_machine(trees.xeon(tmp_path))
    monkeypatch.setattr(check_machine, "read_machine", lambda: machine)
    monkeypatch.setattr(check_machine, "interface_addresses", lambda: {"ib0": "10.0.0.7"})
    for name, good in (GOOD | ({fact: value} if fact else {})).items():
        monkeypatch.setattr(facts, name, lambda *_, found=good: found)
    code = run(CheckMachineCommand())
    lines = capsys.readouterr().out.splitlines()
    problems = [line.split(": ")[0] for line in lines if line.startswith("PROBLEM")]
    assert sum(line.startswith("rank ") for line in lines) == 4
    assert (problems, code) == (([f"PROBLEM {subject}"], 1) if subject else ([], 0))


def test_where_the_launcher_binds_all_its_ranks_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank sees only its own part of the host, here a NUMA node, and plans one place; memory and /dev/shm are for all."""
    for name, good in (GOOD | {"shared_memory_bytes": (GIB // 4, GIB // 4)}).items():
        monkeypatch.setattr(facts, name, lambda *_, found=good: found)
    part = read_machine(trees.xeon(tmp_path, allowed=set(range(10))))

    def told(ranks: int) -> dict[str, str]:
        identity = Identity(0, 2 * ranks, 0, ranks, "srun", 2, "n1")
        config = CheckMachineCommand(distributed=DistributedConfig(interface="lo"))
        return {one.subject: str(one) for one in judge(config, part, plan_places(part, 1, config.machine), identity)}

    one, four, eight = told(1), told(4), told(8)
    assert one["/dev/shm"].startswith("ok") and "4 ranks over oneCCL want" in four["/dev/shm"]
    assert "128.0 for each of 1 rank" in one["memory"] and "32.0 for each of 4 ranks" in four["memory"]
    assert "10 compute threads on 10 cores" in one["threads"] and "40 compute threads on 40 cores" in four["threads"]
    assert eight["threads"].startswith("PROBLEM") and "80 compute threads on 40 cores" in eight["threads"], "two ranks share each part"


def test_no_torch_is_imported() -> None:
    """A machine is looked at in no time, and where torch does not import, too."""
    script = "import sys; from hcsdl.commands.cli import main; main(['check', 'machine']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
