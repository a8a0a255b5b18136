"""Real processes at a fraction of their start: `hcsdl`, or any function, run in processes forked from one that has done the imports.

Each is a process of its own, with environment, host, output and exit code as if a launcher or a shell had started it; four seconds of imports are
saved each time. Two ways: ranks started one by one, as torchrun does (`start_ranks`), and whole commands (`start`, `run`, `train`: the calls of
`tests.runs`), whose launcher forks its ranks where it would start them. What goes before a rank's `main` (entering another host, provoking a fault)
is a function that runs in it. None outlives the tests.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import torch

from hcsdl.distributed.rendezvous import free_port
from hcsdl.machine.process import die_with_parent
from tests import runs

# A process has but one of these servers: whoever forks in tests takes it from here, and nobody else says what it is to import.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "hcsdl.commands.run",
        "hcsdl.commands.train",
        "hcsdl.commands.rank",
        "hcsdl.commands.embed",
        "hcsdl.commands.embed_fields",
        "hcsdl.training.metrics",
        "torch.utils.tensorboard",
        "torch.distributed.nn",
        "pytest",
        "tests.forked",
    ]
)

_started: list[Forked] = []
_numbers = itertools.count()


def kill_what_is_left() -> None:
    """Kill every process started so far that still runs."""
    while _started:
        _started.pop().kill()


class Forked:
    """A process that calls `be()`, with the part of `subprocess.Popen` that a launcher uses; `output` takes what it writes, but what goes to standard
    error where there is a file `errors` for that."""

    def __init__(self, be: Callable[[], None], output: Path, errors: Path | None = None) -> None:
        self.output = output
        self._process = processes.Process(target=_be, args=(be, output, errors or output), daemon=False)
        self._process.start()
        self.pid = self._process.pid
        _started.append(self)

    def poll(self) -> int | None:
        """Return the exit code, None while the process runs."""
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float) -> int:
        """Return the exit code; fail where the process does not end in time."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s\n{self.said()}"
        return self._process.exitcode

    def said(self) -> str:
        """Return what the process has written on standard output and error."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill and reap the process."""
        self._process.kill()
        self._process.join()


def nothing() -> None:
    """What goes first where nothing does."""


class Command(Forked):
    """`hcsdl words…` by itself, in a session of its own, with the part of `subprocess.Popen` that tests of a command use."""

    def __init__(self, words: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hcsdl-said-")
        self._errors = Path(self._folder.name, "err")
        super().__init__(partial(_hcsdl, list(words), {}, _fork_the_ranks), Path(self._folder.name, "out"), self._errors)

    def communicate(self, timeout: float = 200) -> tuple[str, str]:
        """Wait for the end; return what was written on standard output, and on standard error."""
        self.wait(timeout)
        return self.said(), self._errors.read_text(errors="replace")


class ForkedRank:
    """What a launcher gets from `subprocess.Popen([python, "-m", module, words…])`, forked from the launcher itself.

    Environment, CPUs, memory policy and signal mask are the launcher's at this moment, as with `Popen`; of its open files only the standard ones stay.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stdout: IO | None, stderr: IO | None) -> None:
        self.returncode: int | None = None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # or both would write what stands in the buffer
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for file, number in ((stdout, 1), (stderr, 2)):
                    if file is not None:
                        os.dup2(file.fileno(), number)
                logging.getLogger().handlers.clear()
                os.closerange(3, 4096)
                os.environ.clear()
                os.environ |= env
                torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
                sys.argv = list(command[2:])
                os._exit(importlib.import_module(command[2]).main())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)

    def poll(self) -> int | None:
        """Return the exit code, None while the process runs."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int | None:
        """Return the exit code."""
        return self._reap(0)

    def _reap(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


def _fork_the_ranks() -> None:
    from hcsdl.distributed import launcher

    launcher.subprocess = SimpleNamespace(Popen=ForkedRank)


def start(*words: str | Path) -> Command:
    """Start `hcsdl words…`; it dies with the tests. `tests.runs.start` with forked processes."""
    return Command([str(word) for word in words])


def run(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess:
    """Run `hcsdl words…` to its end and check its exit code. `tests.runs.run` with forked processes."""
    process = start(*words)
    try:
        out, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}\n{out}\n{err}"
    return subprocess.CompletedProcess(["hcsdl", *map(str, words)], process.returncode, out, err)


def train(plates: Path, folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess:
    """Run the tiny training on `plates` in run folder `folder`."""
    return run("train", *runs.TINY, f"plates.root={plates}", f"run_dir={folder}", *words, code=code)


def start_train(plates: Path, folder: Path, *words: str) -> Command:
    """Start the same and return at once."""
    return start("train", *runs.TINY, f"plates.root={plates}", f"run_dir={folder}", *words)


@contextlib.contextmanager
def on_call() -> Iterator[list[str]]:
    """Yield a command line that stands for `hcsdl` in a script or a Makefile: what it is asked for runs as with `run`, one at a time."""
    with tempfile.TemporaryDirectory(prefix="hcsdl-call-") as folder, Listener(f"{folder}/socket") as listener:

        def serve() -> None:
            while True:
                with listener.accept() as caller:
                    words = caller.recv()
                    if words is None:
                        return
                    process = start(*words)
                    said = process.communicate()
                    caller.send((process.returncode, *said))

        server = threading.Thread(target=serve)
        server.start()
        try:
            yield [sys.executable, str(Path(__file__).with_name("ask.py")), listener.address]
        finally:
            with Client(listener.address) as caller:
                caller.send(None)
            server.join()


def _be(be: Callable[[], None], output: Path, errors: Path) -> None:
    die_with_parent(os.getppid())  # the one that has done the imports, which ends when the tests do
    os.setsid()
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(
        1
    )  # OMP_NUM_THREADS comes too late where torch is there already: two threads on a rank's one core wait for each other
    be()


def _hcsdl(words: list[str], environment: dict[str, str], first: Callable[[], None]) -> None:
    for name in runs.HIDDEN:
        os.environ.pop(name, None)
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.default_int_handler)
    first()
    if words[0] == "rank":
        from hcsdl.commands.rank import main

        sys.argv = words
        sys.exit(main())
    from hcsdl.commands.cli import main as command

    sys.exit(command(words))


def identity(rank: int, world_size: int, local_rank: int, local_world_size: int, address: str, port: int) -> dict[str, str]:
    """Return the environment a launcher gives a rank."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def start_ranks(words: Sequence[str], world_size: int, folder: Path, first: Mapping[int, Callable[[], None]] | None = None) -> list[Forked]:
    """Start `hcsdl words…` as `world_size` ranks of one host; `folder` takes their output, `first` says what goes before `main` in which rank."""
    port, first = free_port(), first or {}
    folder.mkdir(exist_ok=True)
    return [start_rank(words, rank, world_size, port, folder, first.get(rank, nothing)) for rank in range(world_size)]


def start_rank(words: Sequence[str], rank: int, world_size: int, port: int, folder: Path, first: Callable[[], None] = nothing) -> Forked:
    """Start one rank of one host; all of them meet at `port`."""
    return _start(words, identity(rank, world_size, rank, world_size, "127.0.0.1", port), folder, first)


def train_on(number: int, plates: Path, folder: Path, *words: str) -> str:
    """Run the tiny training as `number` ranks to its good end, as `runs.train` does with our own launcher; return what they said."""
    settings = [*runs.TINY, f"plates.root={plates}", f"run_dir={folder}", *words]
    ranks = start_ranks(["train", *settings], number, folder.parent / f"{folder.name}-said-{next(_numbers)}")
    try:
        codes = [rank.wait(200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    said = "".join(rank.said() for rank in ranks)
    assert codes == [0] * number, said
    return said


def start_ranks_on(
    hosts: Sequence, words: Sequence[str], per_host: int, folder: Path, first: Mapping[int, Callable[[], None]] | None = None
) -> list[Forked]:
    """Start the same as `per_host` ranks on each of `tests.namespaces`' hosts; rank 0 is on the first."""
    ranks, first = [], first or {}
    folder.mkdir(exist_ok=True)
    for number, host in enumerate(hosts):
        for local in range(per_host):
            rank = number * per_host + local
            environment = identity(rank, len(hosts) * per_host, local, per_host, hosts[0].address, 29500)
            before = partial(_enter_then, host.holder.pid, first.get(rank, nothing))
            ranks.append(_start(words, environment, folder, before))
            host.processes.append(ranks[-1])
    return ranks


def _start(words: Sequence[str], environment: dict[str, str], folder: Path, first: Callable[[], None]) -> Forked:
    return Forked(partial(_hcsdl, list(words), environment, first), folder / f"{environment['RANK']}.out")


def _enter_then(holder: int, first: Callable[[], None]) -> None:
    from tests.namespaces import enter

    enter(holder)
    first()
