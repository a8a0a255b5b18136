"""Processes that live long and take turns: each answers one command at a time, and sleeps until the next.

In: what to run, and where. Out: their answers, as dicts. Promised: a worker's allocator, threads and environment are its own; all die with this
process; one that dies or falls silent raises `WorkerFailed` with the reason, and the others go on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from hcsdl.config import ExitCode
from hcsdl.distributed.identity import OWN_LAUNCHER
from hcsdl.distributed.rendezvous import free_port
from hcsdl.machine.binding import placed
from hcsdl.machine.placement import Place

SILENCE_S = 900.0  # no command takes longer: a compiled network's first step takes about a minute; a guess
GRACE_S = 10.0  # what a worker has to end by itself


class WorkerFailed(RuntimeError):
    """A worker died, or did not answer: its text says how, and the last line it wrote."""

    exit_code = ExitCode.FAILED


class Workers:
    """The ranks of one variant.

    Parameters
    ----------
    module : what each runs, `python -m module task`; it reads a JSON object a line from standard input and answers with one a line on standard output.
    task : handed to each as JSON.
    places : one for each rank.
    environments : variables set for each rank, before anything is imported.
    without : beginnings of variables of ours that they do not get.
    log : file that takes what they write to standard error.
    bound : whether each is kept on its place's CPUs.
    """

    def __init__(
        self,
        module: str,
        task: dict,
        places: Sequence[Place],
        environments: Sequence[Mapping[str, str]],
        *,
        without: Collection[str] = (),
        log: Path,
        bound: bool,
    ) -> None:
        self.log = log
        self.begun = time.monotonic()
        self.ranks: list[subprocess.Popen] = []
        ours = {name: value for name, value in os.environ.items() if not name.startswith(tuple(without))}
        port = str(free_port())
        with ExitStack() as stack:
            said = stack.enter_context(open(log, "ab"))
            for rank, (place, own) in enumerate(zip(places, environments, strict=True)):
                identity = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(places), "LOCAL_WORLD_SIZE": len(places)}
                told = {name: str(value) for name, value in identity.items()}
                told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, OWN_LAUNCHER: str(os.getpid())}
                with placed(place) if bound else nullcontext():
                    child = subprocess.Popen(
                        [sys.executable, "-m", module, json.dumps(task)],
                        env=ours | told | dict(own), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                    )  # fmt: skip
                self.ranks.append(child)

    def ask(self, **command: object) -> list[dict]:
        """Give every rank a command and return their answers, in rank order. Raises WorkerFailed; then all ranks are ended."""
        try:
            for rank in self.ranks:
                rank.stdin.write((json.dumps(command) + "\n").encode())  # type: ignore[union-attr]
                rank.stdin.flush()  # type: ignore[union-attr]
            return [self._answer(rank) for rank in self.ranks]
        except OSError as error:  # a pipe whose reader has gone
            raise self._failed() from error

    def _answer(self, rank: subprocess.Popen) -> dict:
        deadline = time.monotonic() + SILENCE_S
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([rank.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._failed(f"no answer in {SILENCE_S / 60:.0f} minutes")
            piece = os.read(rank.stdout.fileno(), 65536)  # type: ignore[union-attr]
            if not piece:
                raise self._failed()
            line += piece
        return json.loads(line)

    def _failed(self, why: str = "") -> WorkerFailed:
        if not why:
            deadline = time.monotonic() + GRACE_S  # its pipe is closed a moment before it has ended
            while not (ended := [rank.returncode for rank in self.ranks if rank.poll() is not None]) and time.monotonic() < deadline:
                time.sleep(0.01)
            code = next((code for code in ended if code), None)
            why = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
        self.kill()
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return WorkerFailed(f"{why}; {lines[-1][:200]} ({self.log.name})" if lines else why)

    def close(self) -> None:
        """Let all ranks end: their input ends. Those that do not are killed."""
        for rank in self.ranks:
            try:
                rank.stdin.close()  # type: ignore[union-attr]
            except OSError:  # it has died with a command unread
                continue
        for rank in self.ranks:
            _ends(rank)
        self.kill()

    def kill(self) -> None:
        """End all ranks at once."""
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
            rank.stdout.close()  # type: ignore[union-attr]


def _ends(rank: subprocess.Popen) -> bool:
    try:
        rank.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        return False
    return True
