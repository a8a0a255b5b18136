"""Who a rank is and where ranks meet, from what launchers really set."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hcsdl.commands import prepare
from hcsdl.config import ConfigError, DistributedConfig, TrainCommand, TrainingConfig
from hcsdl.distributed.identity import Identity, alone_in_step, export_identity, tasks_per_node, unused_nodes, who_am_i
from hcsdl.distributed.rendezvous import expand_nodes, first_host, numbered_port
from hcsdl.machine.topology import read_machine
from tests.machine import trees

pytestmark = pytest.mark.xeon_only
HERE = socket.gethostname()
TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
# What Slurm 22.05 gives a batch script of 2 nodes × 2 tasks, and adds in an srun step of it (task 3).
BATCH = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODELIST": "n[1-2]", "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURMD_NODENAME": "n1",
}  # fmt: skip
STEP = BATCH | {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURMD_NODENAME": "n2",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "2", "PMIX_NAMESPACE": "prterun-node1-17@1",
}  # fmt: skip
INTEL_MPI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "I_MPI_HYDRA_UUID": "0c160000-9241-827c"}


def without(env: dict, *names: str) -> dict:
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({"PATH": "/bin"}, Identity()),
        (TORCH, Identity(1, 2, 1, 2, "torchrun")),
        (TORCH | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, Identity(5, 8, 1, 4, "torchrun", 2)),
        (TORCH | {"HCSDL_LAUNCHER_PID": "7"}, Identity(1, 2, 1, 2, "own")),
        (STEP, Identity(3, 4, 1, 2, "srun", 2, "n2")),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"}, Identity(3, 4, 0, 1, "srun", 2, "n2")),
        (BATCH, Identity()),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Identity()),
        (STEP | TORCH, Identity(1, 2, 1, 2, "torchrun")),
        (OPEN_MPI, Identity(2, 4, 0, 2, "mpirun", 2)),
        (INTEL_MPI, Identity(1, 2, 1, 2, "mpirun")),
        (INTEL_MPI | {"PMI_SIZE": "1", "PMI_RANK": "0"}, Identity()),
        # mpirun starts its proxies as one srun task a node: the step's variables are the proxy's
        (STEP | {"SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI, Identity(2, 4, 0, 2, "mpirun", 2, "n2")),
        # srun --mpi=pmi2 sets these beside its own
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, Identity(3, 4, 1, 2, "srun", 2, "n2")),
    ],
)  # fmt: skip
def test_who_am_i(env: dict, found: Identity) -> None:
    assert who_am_i(env) == found


@pytest.mark.parametrize(
    ("env", "missing"),
    [(without(TORCH, name), name) for name in TORCH]
    + [(without(STEP, name), name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")]
    + [(without(OPEN_MPI, name), name) for name in OPEN_MPI if name.startswith("OMPI")]
    + [(without(INTEL_MPI, name), name) for name in ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")]
    + [({"PMIX_RANK": "0", "PMIX_NAMESPACE": "x"}, "OMPI_COMM_WORLD_SIZE")],
)
def test_a_half_set_environment_names_what_is_missing(env: dict, missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"\b{missing}\b[^.]* (is|are) missing"):
        who_am_i(env)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (TORCH | {"RANK": "2"}, "RANK must be below WORLD_SIZE"),
        (TORCH | {"RANK": "one"}, "RANK must be a whole number"),
        (TORCH | {"LOCAL_RANK": "2"}, "LOCAL_RANK must be below LOCAL_WORLD_SIZE"),
        (TORCH | {"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number from 0 to 65535. Got 'http'"),
        (TORCH | {"MASTER_PORT": "65536"}, "MASTER_PORT must be a whole number"),
        (STEP | {"SLURM_LOCALID": "2"}, "SLURM_LOCALID must be below"),
        (STEP | {"SLURM_PROCID": "4"}, "SLURM_PROCID must be below SLURM_STEP_NUM_TASKS"),
        (STEP | {"SLURM_NODEID": "2"}, "SLURM_NODEID must be below"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2x2"}, r"must look like 2\(x3\),1"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "many"}, "OMPI_COMM_WORLD_SIZE must be a whole number"),
    ],
)
def test_impossible_values(env: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        who_am_i(env)


@pytest.mark.parametrize("step", ["7.batch", "7.0", "7.1"])
def test_a_batch_script_that_inherited_the_variables_of_a_step_is_alone(step: str) -> None:
    """sbatch hands the environment of the step it was called in to the new job's script; its slurmstepd tells what it is."""
    show = f"{sys.executable} -c 'from hcsdl.distributed.identity import who_am_i; print(who_am_i().launcher)'"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PMI", "RANK"))} | STEP
    command = ["bash", "-c", f'(exec -a "slurmstepd: [{step}]" bash -c "{show}; exit")']
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert found == ("srun" if step == "7.0" else "alone")


@pytest.mark.parametrize(
    ("env", "alone"),
    [({}, False), (BATCH, False), (BATCH | {"SLURM_NTASKS": "1"}, False), (STEP, False), (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, True)],
    ids=["no Slurm", "batch script", "batch script of one task", "step of four", "step of one"],
)
def test_a_single_task_of_srun_is_one_rank_and_a_batch_script_is_none(
    env: dict, alone: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a step's only task starts itself is one rank, unless asked otherwise; a batch script starts the node's."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    machine = read_machine(trees.xeon(tmp_path))
    monkeypatch.setattr(prepare, "read_machine", lambda: machine)
    assert alone_in_step() is alone
    assert len(prepare.plan_ranks(TrainCommand(training=TrainingConfig(global_batch_size=8)))) == (1 if alone else 4)
    assert len(prepare.plan_ranks(TrainCommand(distributed=DistributedConfig(ranks=2)))) == 2


def test_idle_nodes_of_a_batch_script_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    assert unused_nodes() == 0
    for name, value in BATCH.items():
        monkeypatch.setenv(name, value)
    assert unused_nodes() == 1
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert unused_nodes() == 0


def test_slurms_short_forms() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert expand_nodes("n1") == ["n1"]
    assert expand_nodes("n[1-3,7],m2") == ["n1", "n2", "n3", "n7", "m2"]
    assert expand_nodes("cpu-[008-010]") == ["cpu-008", "cpu-009", "cpu-010"]
    assert expand_nodes("rack[1-2]node[3,5]-ib") == ["rack1node3-ib", "rack1node5-ib", "rack2node3-ib", "rack2node5-ib"]


def test_all_ranks_work_out_the_same_meeting_point() -> None:
    assert first_host(STEP, "srun", 1) == "127.0.0.1"
    assert first_host(STEP | {"SLURM_STEP_NODELIST": f"{HERE},other"}, "srun", 2) == HERE
    first, second = numbered_port(STEP, "srun"), numbered_port(STEP | {"SLURM_PROCID": "0"}, "srun")
    assert first == second and 15000 <= first < 25000
    assert numbered_port(STEP | {"SLURM_STEP_ID": "1"}, "srun") != first != numbered_port(STEP | {"SLURM_JOB_ID": "8"}, "srun")
    assert numbered_port(INTEL_MPI, "mpirun") != numbered_port(INTEL_MPI | {"I_MPI_HYDRA_UUID": "other"}, "mpirun")


def test_a_meeting_point_nobody_can_know_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR is missing"):
        first_host(OPEN_MPI, "mpirun", 2)
    with pytest.raises(ConfigError, match="no-such-node-1.*set MASTER_ADDR"):
        first_host(STEP | {"SLURM_STEP_NODELIST": "no-such-node-[1-2].invalid"}, "srun", 2)
    with pytest.raises(ConfigError, match="MASTER_PORT is missing"):
        numbered_port(without(INTEL_MPI, "I_MPI_HYDRA_UUID"), "mpirun")


def test_the_identity_is_exported_for_torch_and_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what is exported goes again
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    export_identity(Identity(3, 4, 1, 2, "srun", 2, "n2"))
    assert [os.environ[name] for name in names[:5]] == ["3", "4", "1", "2", "10.0.0.1"]
    assert os.environ["MASTER_PORT"] == str(numbered_port(STEP, "srun"))


@pytest.mark.skipif(shutil.which("mpirun", path=str(Path(sys.executable).parent)) is None, reason="no mpirun beside this Python")
def test_a_real_mpirun() -> None:
    folder = str(Path(sys.executable).parent)
    show = "from hcsdl.distributed.identity import *; i = who_am_i(); export_identity(i); "
    show += "print(i.rank, i.world_size, i.local_rank, i.launcher, os.environ['MASTER_PORT'])"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))} | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["mpirun", "-n", "2", sys.executable, "-c", show], env=env, capture_output=True, text=True, check=False, timeout=100
    )
    lines = sorted(done.stdout.splitlines())
    assert [line.split()[:4] for line in lines] == [["0", "2", "0", "mpirun"], ["1", "2", "1", "mpirun"]], done.stderr
    assert len({line.split()[4] for line in lines}) == 1
