"""Real `hcsdl` processes for the system tests: start, kill, wait, read what they left."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hcsdl.machine.process import die_with_parent

HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
TINY = ["experiment=tiny", "training.baseline=false", "training.journal_every_s=0", "machine.threads_per_rank=1"]


def environment() -> dict[str, str]:
    """Our environment without what a launcher around the tests might have set."""
    return {k: v for k, v in os.environ.items() if k not in HIDDEN}


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return `folder`, which the first of all test processes to come here fills by `make(folder)`; the others wait for it. To be left as it is."""
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = Path(f"{folder}.done")
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a try that failed
            make(folder)
            done.touch()
    return folder


def with_the_tests() -> Callable[[], None]:
    """Return a `preexec_fn` for processes in a session of their own: they die when this process does, so that killed tests leave nothing behind."""
    return partial(die_with_parent, os.getpid())


def start(*words: str | Path, **options: object) -> subprocess.Popen:
    """Start `hcsdl words…` in a session of its own; it dies with the tests."""
    return subprocess.Popen(
        [sys.executable, "-m", "hcsdl", *map(str, words)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=with_the_tests(), **options,  # noqa: PLW1509  it takes no lock
    )  # fmt: skip


def run(*words: str | Path, code: int = 0, **options: object) -> subprocess.CompletedProcess:
    """Run `hcsdl words…` to its end and check its exit code."""
    process = start(*words, **options)
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        kill_session(process)
        raise
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}\n{out}\n{err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train(plates: Path, folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess:
    """Run the tiny training on `plates` in run folder `folder`."""
    return run("train", *TINY, f"plates.root={plates}", f"run_dir={folder}", *words, code=code)


def start_train(plates: Path, folder: Path, *words: str) -> subprocess.Popen:
    """Start the same and return at once."""
    return start("train", *TINY, f"plates.root={plates}", f"run_dir={folder}", *words)


def journal(folder: Path) -> list[dict]:
    """Return the whole lines of a run's journal."""
    path = folder / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def last_step(folder: Path, attempt: int) -> int:
    """Return the last step an attempt has written into the journal."""
    return max((e["step"] for e in journal(folder) if e["event"] == "step" and e["attempt"] == attempt), default=0)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int, attempt: int = 1) -> None:
    """Wait until attempt `attempt` has done `step` steps; fail when the process ends first."""
    limit = time.monotonic() + 150
    while last_step(folder, attempt) < step:
        assert process.poll() is None, f"ended with {process.returncode}\n{process.communicate()}"
        assert time.monotonic() < limit, f"step {step} did not come"
        time.sleep(0.01)


def children(process: subprocess.Popen) -> list[int]:
    """Return the process ids of the direct children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == process.pid:
                found.append(int(stat.parent.name))
    return sorted(found)


def alive(pid: int) -> bool:
    """Return whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    """Wait until none of the processes runs."""
    limit = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < limit, f"still alive: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


def kill_session(process: subprocess.Popen) -> None:
    """Kill everything that was started with `start`."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def digest(folder: Path) -> str:
    """Return a hash of the run's final weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def summary(folder: Path) -> dict:
    """Return a run's summary."""
    return json.loads((folder / "summary.json").read_text())
