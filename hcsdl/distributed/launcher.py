"""Start the ranks of one machine as children, watch them, and end with one exit code.

Promises: ranks die with this process, however it ends; SIGTERM, SIGUSR1, SIGINT and SIGHUP reach every rank; when one rank ends badly the others
are ended too; the code returned is the one the failing rank gave, or 5 where a rank was lost to a signal.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from hcsdl.distributed.identity import OWN_LAUNCHER
from hcsdl.machine.process import rank_environment

LOST_RANK = 5
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
OUR_CODES = (1, 2, 3, 4, 5, 75)
GRACE_S = 10.0  # a rank whose peer has failed gets this long to say what it saw; a guess


def start_ranks(arguments: Sequence[str], ranks: int, threads: int, logs: Path) -> list[subprocess.Popen]:
    """Start `ranks` times `python <arguments>`; rank 0 speaks on our terminal, the others into `logs/rank<i>.log`."""
    port = _free_port()
    children = []
    # A signal that comes before a rank can handle it waits in its mask, which it inherits and lifts when it can.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for rank in range(ranks):
        environment = rank_environment(threads) | {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            OWN_LAUNCHER: str(os.getpid()),
        }
        output = None if rank == 0 else open(logs / f"rank{rank}.log", "a")
        children.append(subprocess.Popen([sys.executable, *arguments], env=environment, stdout=output, stderr=output))
        if output:
            output.close()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return children


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def watch_ranks(children: Sequence[subprocess.Popen]) -> tuple[int, str]:
    """Wait until all ranks have ended; return the exit code and a sentence (empty when all went well, or rank 0 has said what is wrong).

    A rank's own code (bad data, non-finite loss, …) goes before a lost peer's 5.
    """
    failed: dict[int, int] = {}
    stuck: set[int] = set()
    deadline = None
    while True:
        for rank, child in enumerate(children):
            code = child.poll()
            if code not in (None, 0) and rank not in failed and rank not in stuck:
                failed[rank] = code
                deadline = deadline or time.monotonic() + GRACE_S
        if all(child.returncode is not None for child in children):
            break
        if deadline and time.monotonic() > deadline:
            for rank, child in enumerate(children):
                if child.poll() is None:
                    stuck.add(rank)
                    child.kill()
        time.sleep(0.05)
    return verdict(failed, stuck)


def verdict(failed: dict[int, int], stuck: Collection[int] = ()) -> tuple[int, str]:
    """Return exit code and sentence for the ranks that ended badly, {rank: return code}, and those that did not end and were killed."""
    if not failed:
        return 0, ""
    own = {rank: code for rank, code in failed.items() if code in OUR_CODES and code != LOST_RANK}
    if own:
        rank, code = next(iter(own.items()))
        return code, "" if 0 in own else f"rank {rank} ended the run with code {code}: logs/rank{rank}.log in the run folder says why."
    lost = {rank: code for rank, code in failed.items() if code != LOST_RANK}
    if lost:
        rank, code = next(iter(lost.items()))
        how = f"rank {rank} " + (f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}")
    elif stuck:
        how = f"rank {min(stuck)} did not answer"
    else:
        return LOST_RANK, ""
    return LOST_RANK, f"{how}; the other ranks were stopped. What was saved is intact: start the same command again to go on."


class Stop(Exception):
    """A signal asked us to stop; what was done is saved, and the same command goes on from there."""

    exit_code = 75


class Forwarder:
    """While active, passes SIGTERM, SIGUSR1, SIGINT and SIGHUP on to the ranks; with no ranks yet, raises `Stop` instead."""

    def __init__(self) -> None:
        self.children: Sequence[subprocess.Popen] = ()

    def __enter__(self) -> Forwarder:
        # What is ignored stays so: nohup ignores SIGHUP, a shell's background jobs SIGINT.
        self._before = {s: signal.signal(s, self._pass_on) for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: object) -> None:
        if not self.children:
            raise Stop(signal.Signals(number).name)
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)
