"""A real Slurm of two nodes on this machine, for tests: started in about a second, without systemd, cgroups or a database.

Both nodes are slurmd processes of this host that declare more cores than it has. `Cluster` is a context manager; its daemons are children that
the kernel kills when the test process ends. `MISSING` says why there is none, or is empty.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests import runs

PROJECT = Path(__file__).parents[1]
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
MISSING = ", ".join(
    p for p in ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue") if not shutil.which(p, path=PATH)
)
NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")
# cred_expire: a requeued job otherwise stays pending for two minutes. KillWait: between SIGTERM and SIGKILL. SlurmdTimeout: a silent node is down.
CONFIGURATION = """
ClusterName=fixture
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/run/munge.sock,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
SlurmdTimeout=10
MinJobAge=86400
PropagateResourceLimits=NONE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Two idle nodes, n1 and n2, of four cores each; everything it writes is under `base`, which goes when it stops."""

    def __enter__(self) -> Cluster:
        self.base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path may have 107 characters
        for name in ("state", "log", "run", "spool/n1", "spool/n2"):
            (self.base / name).mkdir(parents=True)
        for folder in (self.base, self.base / "run"):
            folder.chmod(0o755)
        (self.base / "munge.key").write_bytes(os.urandom(128))
        (self.base / "munge.key").chmod(0o600)
        controller, *ports = free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 "
            "RealMemory=4096 State=UNKNOWN"
            for name, port in zip(NODES, ports, strict=True)
        )
        configuration = self.base / "slurm.conf"
        configuration.write_text(CONFIGURATION.format(base=self.base, port=controller, user=getpass.getuser(), nodes=nodes))
        self.environment = {k: v for k, v in runs.environment().items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment |= {"PATH": PATH, "SLURM_CONF": str(configuration)}
        self.daemons: dict[str, subprocess.Popen] = {}
        try:
            munge = self.base / "run" / "munge"
            self._start("munged", "--foreground", "--force", f"--socket={munge}.sock", f"--key-file={self.base}/munge.key", f"--pid-file={munge}.pid",
                        f"--log-file={self.base}/log/munged.log", f"--seed-file={munge}.seed")  # fmt: skip
            wait_until(lambda: Path(f"{munge}.sock").exists(), "munged's socket")
            self._start("slurmctld", "-D", "-f", configuration)
            for name in NODES:
                self.start_node(name)
            wait_until(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self.daemons:
            self.ask("scancel", "--user", getpass.getuser())
            wait_until(lambda: not self.ask("squeue", "-h"), "the end of all jobs", fail=False)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.base, ignore_errors=True)

    def _start(self, name: str, *words: object, key: str | None = None) -> None:
        with open(self.base / "log" / f"{key or name}.out", "a") as log:
            command = ["setpriv", "--pdeathsig", "KILL", name, *map(str, words)]
            self.daemons[key or name] = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        self._start("slurmd", "-D", "-f", self.base / "slurm.conf", "-N", name, key=name)

    def kill_node(self, name: str) -> None:
        """Let a node disappear: its slurmd and everything it runs are killed at once, and the controller is told what it would find out in half a minute."""
        self.daemons[name].kill()
        self.daemons.pop(name).wait()
        for pid in node_processes(name, self.base):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.ask("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=gone")

    def ask(self, *words: object) -> str:
        """Return what a Slurm command prints, also where it complains."""
        done = subprocess.run([*map(str, words)], env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        return (done.stdout + done.stderr).strip()

    def sbatch(self, *words: object, folder: Path) -> str:
        """Submit from `folder`, with the python that runs the tests; return the job's id."""
        environment = self.environment | {"HCSDL_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)], env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return the job's state, e.g. RUNNING, or that of its array element `<job>_<i>`."""
        return self.ask("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T")

    def exit_code(self, job: str) -> int:
        """Return the exit code of a job that has ended."""
        return int(self.field(job, "ExitCode").partition(":")[0])

    def field(self, job: str, name: str) -> str:
        """Return one field of `scontrol show job`."""
        words = self.ask("scontrol", "show", "job", "-o", job).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def wait(self, job: str, log: Path | None = None, limit_s: float = 200) -> str:
        """Wait until a job has ended; return how, e.g. COMPLETED."""
        wait_until(lambda: self.state(job) in ENDED, f"the end of job {job}", limit_s, log)
        return self.state(job)


def node_processes(name: str, base: Path) -> list[int]:
    """Return the processes of jobs on node `name` of the cluster at `base`, with the slurmstepd each hangs on."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        ours = f"SLURM_CONF={base}/slurm.conf".encode() in environment
        if ours and (f"SLURMD_NODENAME={name}\0".encode() in environment or command.startswith(b"slurmstepd")):
            found.append(int(process.name))
    return found


def wait_until(true: Callable[[], bool], what: str, limit_s: float = 200, log: Path | None = None, fail: bool = True) -> None:
    """Wait until `true()`; fail after `limit_s` seconds, showing `log`."""
    limit = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > limit:
            assert not fail, f"{what} did not come\n{log.read_text() if log and log.exists() else ''}"
            return
        time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    """Return ports nobody uses now."""
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
