"""What `hcsdl check machine` says about good and bad hosts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hcsdl.config import DistributedConfig, MachineConfig
from hcsdl.machine import verdicts
from hcsdl.machine.facts import Interface
from hcsdl.machine.placement import plan_places
from hcsdl.machine.topology import read_machine
from hcsdl.machine.verdicts import Verdict
from tests.machine import trees

pytestmark = pytest.mark.xeon_only
GIB, MIB = 2**30, 2**20


@pytest.mark.parametrize(
    ("found", "level", "said"),
    [
        (verdicts.bf16(["amx_bf16", "avx512_bf16"]), "ok", "AMX_BF16 and AVX512_BF16"),
        (verdicts.bf16([]), "note", "runs in fp32"),
        (verdicts.memory(8 * GIB, 16), "PROBLEM", "would be killed"),
        (verdicts.memory(24 * GIB, 8), "note", "3.0 for each of 8 ranks"),
        (verdicts.memory(256 * GIB, 4), "ok", "64.0 for each"),
        (verdicts.shared_memory((64 * MIB, 64 * MIB), 4, "auto"), "PROBLEM", "--shm-size"),
        (verdicts.shared_memory((8 * GIB, 100 * MIB), 2, "ccl"), "PROBLEM", "100 free"),
        (verdicts.shared_memory(None, 2, "ccl"), "PROBLEM", "missing"),
        (verdicts.shared_memory((64 * MIB, 64 * MIB), 4, "gloo"), "ok", "64 MiB"),
        (verdicts.shared_memory((64 * MIB, 64 * MIB), 1, "auto"), "ok", "64 MiB"),
        (verdicts.locked_memory(8 * MIB, ["verbs;ofi_rxm", "tcp"]), "PROBLEM", "memlock"),
        (verdicts.locked_memory(8 * MIB, ["tcp"]), "ok", "tcp needs none"),
        (verdicts.locked_memory(math.inf, ["psm3"]), "ok", "unlimited"),
        (verdicts.open_files(64), "PROBLEM", "ulimit -n"),
        (verdicts.open_files(512), "note", "ulimit -n"),
        (verdicts.open_files(1024), "ok", "1024"),
        (verdicts.pages("never"), "note", "madvise"),
        (verdicts.pages("always"), "ok", "always"),
        (verdicts.clock(("acpi-cpufreq", "powersave")), "PROBLEM", "lowest frequency"),
        (verdicts.clock(("intel_pstate", "powersave")), "ok", "intel_pstate"),
        (verdicts.clock(None), "ok", "host"),
        (verdicts.compiler(None), "note", "Install gcc"),
        (verdicts.ipex("2.13.0", "2.8.0", "auto"), "note", "do not fit"),
        (verdicts.ipex("2.13.0+cpu", "2.8.0", "ipex"), "PROBLEM", "Install torch 2.8"),
        (verdicts.ipex("2.8.0+cpu", "2.8.10+xpu", "ipex"), "ok", "IPEX 2.8.10"),
        (verdicts.ipex("2.13.0", None, "ipex"), "PROBLEM", "kernels=native"),
        (verdicts.ipex("2.13.0", None, "auto"), "ok", "no IPEX"),
        (verdicts.oneccl("oneCCL's libraries must be installed.", "ccl"), "PROBLEM", "backend=gloo"),
        (verdicts.oneccl("oneCCL's libraries must be installed.", "auto"), "note", "must be installed"),
        (verdicts.fabric([], []), "PROBLEM", "backend=gloo"),
        (verdicts.fabric(["tcp", "shm"], ["mlx5_0"]), "note", "though there is mlx5_0"),
        (verdicts.fabric(["verbs;ofi_rxm", "tcp"], ["mlx5_0"]), "ok", "verbs"),
        (verdicts.fabric(["tcp"], []), "ok", "tcp"),
        (verdicts.host_name("node7", [], None, 1), "PROBLEM", "/etc/hosts"),
        (verdicts.host_name("node7", ["127.0.1.1"], None, 1), "note", "loopback"),
        (verdicts.host_name("node7", ["127.0.1.1"], None, 2), "PROBLEM", "distributed.interface"),
        (verdicts.host_name("node7", ["127.0.1.1"], "ib0", 2), "ok", "127.0.1.1"),
        (verdicts.host_name("node7", ["10.0.0.7", "127.0.1.1"], None, 2), "ok", "10.0.0.7"),
        (verdicts.stale_segments({}), "ok", "no shared memory"),
        (verdicts.stale_segments({Path(f"/dev/shm/{n}:0:0"): 64 * MIB for n in range(4)}), "note", "256 MiB. rm /dev/shm/0:0:0 /dev/shm/1:0:0 /dev/shm/2:0:0 …"),
        (verdicts.threads(40, 40), "ok", "40 compute threads on 40 cores"),
        (verdicts.threads(80, 40), "PROBLEM", "80 compute threads on 40 cores"),
    ],
)  # fmt: skip
def test_one_fact(found: Verdict, level: str, said: str) -> None:
    assert found.level == level and said in found.text


def test_cores(tmp_path: Path) -> None:
    whole = read_machine(trees.xeon(tmp_path / "whole"))
    assert verdicts.cores(whole, 40).level == "ok"
    one = verdicts.cores(read_machine(trees.xeon(tmp_path / "one", allowed={7, 47})), 40)
    assert one.level == "PROBLEM" and "1 of 40 cores" in one.text and "--cpus-per-task" in one.text
    assert verdicts.cores(read_machine(trees.xeon(tmp_path / "part", allowed=set(range(8)))), 40).level == "note"
    limited = read_machine(trees.write(trees.xeon(tmp_path / "quota"), {"sys/fs/cgroup/cpu.max": "250000 100000"}))
    assert verdicts.cores(limited, 40).level == "note" and "2.5 of 40 cores, a fraction" in verdicts.cores(limited, 40).text


def test_ranks(tmp_path: Path) -> None:
    found = read_machine(trees.xeon(tmp_path))
    good, unbound, few = (plan_places(found, ranks, MachineConfig(**options)) for ranks, options in ((4, {}), (4, {"pin": False}), (2, {})))
    assert verdicts.load(3.0, found, good).level == verdicts.load(30.0, found, unbound).level == "ok"
    assert "machine.pin=false" in verdicts.load(30.0, found, good).text
    assert verdicts.numa(found, good).level == "ok"
    assert "machine.pin=true" in verdicts.numa(found, unbound).text and verdicts.numa(found, unbound).level == "note"
    assert "distributed.ranks=4" in verdicts.numa(found, few).text


def test_network() -> None:
    fast, slow, down = Interface("ib0", True, 100_000), Interface("eth0", True, 1000), Interface("eth1", False, None)
    addresses = {"lo": "127.0.0.1", "ib0": "10.1.0.1", "eth0": "10.0.0.1"}
    auto = DistributedConfig()
    assert [v.level for v in verdicts.network([slow, down, fast], addresses, auto)] == ["note", "ok"]
    assert [v.level for v in verdicts.network([slow, fast], addresses, DistributedConfig(interface="ib0"))] == ["ok", "ok"]
    wrong = verdicts.network([slow, fast], addresses, DistributedConfig(interface="ib1"))
    assert [v.level for v in wrong] == ["PROBLEM"] and "lo, ib0, eth0" in wrong[0].text
    alone = verdicts.network([down], {"lo": "127.0.0.1"}, auto)
    assert [v.level for v in alone] == ["note"] and "loopback" in alone[0].text
