"""A Slurm job from inside: which one we are, ranks over srun, signals passed on, going back into the queue.

In: the environment that Slurm gives a batch script, and a rank's command line. Out: one exit code for all ranks. No torch.

Slurm tells a job to end in three ways, and all of them finish the step and save: a signal to the batch script (`--signal=B:USR1@300` before the
time limit, or by hand `scancel --batch --signal=USR1 <job>`), which is passed on to the ranks; SIGTERM to the ranks (preemption with a grace
time); SIGTERM to everything (`scontrol requeue`, `scancel`), where the ranks have KillWait seconds (30 by default) before SIGKILL.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hcsdl.config import ConfigError, ExitCode
from hcsdl.distributed.launcher import STOP_SIGNALS
from hcsdl.distributed.rendezvous import free_port, whole_number

log = logging.getLogger(__name__)

# Why a job waits for a person, as `squeue -o %r` writes it; besides these, what a single job may not be (AssocMax…PerJobLimit), and jobs on hold.
HOPELESS = re.compile(
    r"held|DependencyNeverSatisfied|Partition(Node|Time)Limit|PartitionConfig|ReservationDeleted|BadConstraints|QOSMin|InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed|PerJob",
    re.IGNORECASE,
)
# Slurm's states of a job that has not ended, as `squeue -o %T` writes them.
ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "REQUEUED", "REQUEUE_FED", "RESIZING", "SIGNALING", "STAGE_OUT"}  # fmt: skip
EXITED = re.compile(rb"srun: error: .*?: tasks? [\d,\-]+: Exited with exit code (\d+)$")
STRAGGLERS_S = 180  # after the first rank has ended the others get this long; longer than silence and saving together, a guess


@dataclass(frozen=True)
class Job:
    """One job, or one element of an array: `number` is its own id, `name` what a person calls it (123, or 123_4)."""

    number: str
    name: str
    restarts: int
    array: str = ""
    element: int = 0
    elements: tuple[int, int, int] = (0, 0, 0)  # lowest, highest, how many


def this_job(environment: Mapping[str, str] | None = None) -> Job | None:
    """Return the job this process runs in; None outside Slurm."""
    env = os.environ if environment is None else environment
    number = env.get("SLURM_JOB_ID", "")
    if not number:
        return None
    restarts = whole_number(env, "SLURM_RESTART_COUNT") if env.get("SLURM_RESTART_COUNT") else 0
    if "SLURM_ARRAY_JOB_ID" not in env:
        return Job(number, number, restarts)
    numbers = [f"SLURM_ARRAY_TASK_{what}" for what in ("ID", "MIN", "MAX", "COUNT")]
    missing = [name for name in numbers if name not in env]
    if missing:
        raise ConfigError(
            f"an element of a job array has {', '.join(numbers)} in its environment. Missing: {', '.join(missing)}; sbatch sets them all."
        )
    array, (element, *elements) = env["SLURM_ARRAY_JOB_ID"], [whole_number(env, name) for name in numbers]
    return Job(number, f"{array}_{element}", restarts, array, element, tuple(elements))  # type: ignore[arg-type]


def batch_job() -> Job:
    """Return the job whose batch script this process is. Raises ConfigError elsewhere."""
    job = this_job()
    if job is None:
        raise ConfigError("slurm/*.sbatch must run as Slurm jobs. SLURM_JOB_ID is not set; submit them with sbatch.")
    return job


def run_tasks(command: Sequence[str]) -> int:
    """Run `command` as every task of the job over srun; return one exit code: 0, the one a failing task gave, or 5 where one was lost.

    SIGTERM, SIGUSR1, SIGINT and SIGHUP reach the tasks as SIGUSR1: srun itself kills its tasks at a SIGTERM. Cores are not bound by
    Slurm: each rank binds itself (machine.pin).
    """
    asked: list[int] = []
    running: list[subprocess.Popen] = []

    def pass_on(number: int, _frame: object) -> None:
        asked.append(number)
        for srun in running:
            srun.send_signal(signal.SIGUSR1)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    options = ["--export=ALL", "--kill-on-bad-exit=0", f"--wait={STRAGGLERS_S}", "--cpu-bind=none"]
    environment = {"MASTER_PORT": str(free_port())} | os.environ
    running.append(subprocess.Popen(["srun", *options, *command], env=environment, stderr=subprocess.PIPE))
    if asked:
        running[0].send_signal(signal.SIGUSR1)
    said = pass_through(running[0].stderr.fileno())  # type: ignore[union-attr]
    return one_code(running[0].wait(), said)


def pass_through(pipe: int) -> list[int]:
    """Write what srun and its tasks say to our standard error until it ends; return the exit codes of tasks that srun names, in its order."""
    codes: list[int] = []
    line = b""
    while chunk := os.read(pipe, 65536):
        os.write(2, chunk)
        *whole, line = (line + chunk).split(b"\n")
        codes += [int(found[1]) for found in map(EXITED.search, whole) if found]
    return codes


def one_code(highest: int, said: Sequence[int]) -> int:
    """Return one exit code for all tasks from srun's own, the highest of theirs, and those it names: a task's reason goes before others' loss of it."""
    own = [code for code in said if code in set(ExitCode) - {ExitCode.LOST_RANK}]
    return own[0] if own else highest if highest in set(ExitCode) else ExitCode.LOST_RANK


def state(number: str) -> str:
    """Return a job's state in capitals, empty where Slurm does not know it or does not answer."""
    return _ask("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T")[1]


def states(array: str) -> dict[int, str] | None:
    """Return what Slurm knows of an array's elements (0: the job itself, where it is none): state and reason, e.g. `PENDING Resources`.

    None where Slurm does not answer. Some minutes after their end it has forgotten them.
    """
    code, found, complaint = _ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%K %T %r")
    if code and "Invalid job id" not in complaint:
        return None
    lines = [] if code else [line.split(maxsplit=1) for line in found.splitlines()]
    return {int(element) if element.isdigit() else 0: told.removesuffix(" None") for element, told in lines}


def still_going(told: dict[int, str] | None) -> bool:
    """Return whether a job of `states` runs or will run by itself, unlike one on hold or whose wish no node can meet. Slurm's silence says nothing."""
    return told is None or any(
        text.split()[0] in ALIVE and not (text.startswith("PENDING") and HOPELESS.search(text)) for text in told.values()
    )


def requeue(job: Job) -> bool:
    """Send a running job back into the queue; return whether Slurm took it. A job that is being cancelled or requeued already is left alone."""
    if state(job.number) != "RUNNING":
        return False
    code, _, complaint = _ask("scontrol", "requeue", job.number)
    if code:
        log.error("hcsdl: job %s could not be requeued: %s", job.name, complaint)
    return code == 0


def _ask(*words: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error: a warning there is not a part of the answer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout.strip(), done.stderr.strip()
