"""Start the ranks of one machine as children, watch them, start them again where that helps, and end with one exit code.

Promises: ranks die with this process, however it ends; SIGTERM, SIGUSR1, SIGINT and SIGHUP reach every rank; when one rank ends badly the others
are ended too; the code returned is the one the failing rank gave, or 5 where a rank was lost to a signal.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from hcsdl.config import ExitCode
from hcsdl.distributed.identity import OWN_LAUNCHER
from hcsdl.distributed.rendezvous import free_port
from hcsdl.machine.binding import place_environment, placed
from hcsdl.machine.cgroup import out_of_memory_kills
from hcsdl.machine.placement import Place

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
RESTARTED = (
    ExitCode.FAILED,
    ExitCode.LOST_RANK,
)  # what another start may mend; not bad settings or data, a loss that is no number, a signal
FRUITLESS = 3  # starts in a row that saved nothing new make a crash loop; a guess
GRACE_S = 10.0  # a rank that knows of its peer's failure gets this long to say what it saw; a guess


def start_ranks(arguments: Sequence[str], places: Sequence[Place], logs: Path) -> list[subprocess.Popen]:
    """Start `python <arguments>` at each of `places`; rank 0 speaks on our terminal, the others into `logs/rank<i>.log`.

    Where one cannot be started (OSError), those that were are ended.
    """
    port = free_port()
    children: list[subprocess.Popen] = []
    # A signal that comes before a rank can handle it waits in its mask, which it inherits and lifts when it can.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        for rank, place in enumerate(places):
            environment = (
                os.environ
                | place_environment(place)
                | {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(places)),
                    "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(len(places)),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    OWN_LAUNCHER: str(os.getpid()),
                }
            )
            with contextlib.ExitStack() as stack:
                output = None if rank == 0 else stack.enter_context(open(logs / f"rank{rank}.log", "a"))
                stack.enter_context(placed(place))
                children.append(subprocess.Popen([sys.executable, *arguments], env=environment, stdout=output, stderr=output))
    except BaseException:
        for child in children:
            child.kill()
            child.wait()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return children


def supervise(
    start: Callable[[], Sequence[subprocess.Popen]],
    forwarder: Forwarder,
    restarts: int,
    silence_s: float,
    saved: Callable[[], int],
    renew: Callable[[], None],
) -> tuple[int, str]:
    """Start the ranks and watch them; where one was lost or crashed, start all again, at most `restarts` times; return as `watch_ranks` does.

    `saved` returns the last step on disk, from which a start goes on; `renew` is called before each start but the first. There is none after a
    signal to stop, nor after three starts in a row that have saved nothing new.
    """
    fruitless = 0
    for restart in range(1, restarts + 2):
        before = saved()
        forwarder.adopt(start())
        code, sentence = watch_ranks(forwarder.children, silence_s)
        if code not in RESTARTED or forwarder.seen or restart > restarts:
            break
        fruitless = 0 if saved() > before else fruitless + 1
        if fruitless == FRUITLESS:
            log.error("hcsdl: %d starts in a row have saved nothing new: the ranks are not started again.", FRUITLESS)
            break
        why = sentence.partition(";")[0] or "a rank was lost" if code == ExitCode.LOST_RANK else "a rank failed"
        log.warning("hcsdl: %s; starting the ranks again from step %d, restart %d of %d.", why, saved(), restart, restarts)
        renew()
    return code, sentence


def watch_ranks(children: Sequence[subprocess.Popen], silence_s: float = 30.0) -> tuple[int, str]:
    """Wait until all ranks have ended; return the exit code and a sentence (empty when all went well, or rank 0 has said what is wrong).

    A rank's own code (bad data, non-finite loss, …) goes before a lost peer's 5. When one has ended badly the others get `silence_s` to find out
    and `GRACE_S` to end; once one ends for the loss of another, `GRACE_S`. A rank that was asked to stop leaves the others to stop by themselves.
    Rank 0 writes what comes out and may end long after the others; none may outlive its good end by more than `silence_s` and `GRACE_S`.
    """
    failed: dict[int, int] = {}
    stuck: set[int] = set()
    deadline, kills = math.inf, out_of_memory_kills()
    while True:
        for rank, child in enumerate(children):
            code = child.poll()
            if code not in (None, 0) and rank not in failed and rank not in stuck:
                failed[rank] = code
                if code != ExitCode.STOPPED:
                    deadline = min(deadline, time.monotonic() + GRACE_S + (silence_s if code != ExitCode.LOST_RANK else 0))
        if children[0].returncode in (ExitCode.DONE, ExitCode.STOPPED):
            deadline = min(deadline, time.monotonic() + GRACE_S + silence_s)
        if all(child.returncode is not None for child in children):
            break
        if time.monotonic() > deadline:
            for rank, child in enumerate(children):
                if rank not in stuck and child.poll() is None:
                    stuck.add(rank)
                    child.kill()
                    log.warning("hcsdl: rank %d did not end and was killed.", rank)
        time.sleep(0.05)
    return verdict(failed, stuck, out_of_memory_kills() > kills)


def verdict(failed: dict[int, int], stuck: Collection[int] = (), out_of_memory: bool = False) -> tuple[int, str]:
    """Return exit code and sentence for the ranks that ended badly, {rank: return code}, and those that did not end and were killed.

    `out_of_memory` tells whether the kernel has ended one of our processes meanwhile for want of memory.
    """
    if not failed:
        return ExitCode.DONE, ""
    own = {rank: code for rank, code in failed.items() if code in set(ExitCode) and code != ExitCode.LOST_RANK}
    if own:
        rank, code = next(iter(own.items()))
        return code, "" if 0 in own else f"rank {rank} ended the run with code {code}: logs/rank{rank}.log in the run folder says why."
    lost = {rank: code for rank, code in failed.items() if code != ExitCode.LOST_RANK}
    if lost:
        how = ", ".join(
            f"rank {rank} " + (f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}")
            for rank, code in sorted(lost.items())
        )
    elif stuck:
        how = f"rank {min(stuck)} did not answer"
    else:
        return ExitCode.LOST_RANK, ""
    where, again = socket.gethostname(), "start the same command again to go on."
    if out_of_memory and -signal.SIGKILL in lost.values():
        where, again = f"{where}, where memory had run out", f"give the job more memory or take fewer ranks, then {again}"
    return ExitCode.LOST_RANK, f"{how} on {where}; the other ranks were stopped. What was saved is intact: {again}"


class Stop(Exception):
    """A signal asked us to stop; what was done is saved, and the same command goes on from there."""

    exit_code = ExitCode.STOPPED


class Forwarder:
    """While active, passes SIGTERM, SIGUSR1, SIGINT and SIGHUP on to the ranks; with no ranks yet, raises `Stop` instead."""

    def __init__(self) -> None:
        self.children: Sequence[subprocess.Popen] = ()
        self.seen = 0  # the last signal passed on

    def adopt(self, children: Sequence[subprocess.Popen]) -> None:
        """From now on pass signals on to `children`, one that came while they were started as well."""
        self.children = children
        if self.seen:
            self._pass_on(self.seen, None)

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
        self.seen = number
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)
