"""Every rank tells the others, through the rendezvous store, that it lives and what it does; who falls silent is lost, and named.

In: the store all ranks share. Out: a `Heartbeat`, two daemon threads: one talks to the store over a connection of its own (a wait in the main
thread's connection cannot silence it), one watches. A rank is lost when its beat has not changed for `silence_s`, or when it has said that it
leaves in trouble; rank 0 (rather, the store beside it) when the store does not answer for so long, or closes, unless that rank has left in peace
before. All clocks are this process's own, and time in which it was itself suspended does not count. Whoever finds a loss tells it to the ranks that
can still be reached, so that all say the same. No promise is made about ranks that were never heard: meeting at the start has a time-out of its own.

A rank that beats may hang all the same. Its beat says how many collectives it has begun, and which step it is inside, if any (`in_step`): a piece of
work that takes every rank about as long, whether or not the others do theirs at the same time. The rank that has begun the fewest collectives is stuck
when it has been inside one step, and another ahead of it, for `stall_s`, or for twice as long as any part of a step took here lately, if that is longer.
Elsewhere one rank may work while the others wait (saving, scoring, reading plates), so there a rank that hangs is found by the collective's own
time-out; so is one that hangs where all have begun the same collective.

A main thread that hears of the loss raises `LostRank` from its collective. Where it cannot (oneCCL's calls cannot be aborted, gloo waits for a
stalled peer until its time-out) the watching thread ends the process with code 5.
"""

from __future__ import annotations

import atexit
import itertools
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hcsdl.config import ExitCode
from hcsdl.machine.process import show_held_output

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger(__name__)

BEAT_S = 1.0
EVIDENCE_S = 3.0  # silence that convicts once a collective has failed or the store has closed its connection; a guess, above one beat
LATELY = 64  # parts of steps of one work, which end with a collective or with the step; a guess
LEAVE_S = 3.0  # what the main thread has for raising LostRank after a loss was found; a guess
RANKS_READ_A_SECOND = 64  # a read of 256 beats takes 0.8 – 1.8 ms, measured here: with 256 ranks the store is then busy for a few percent
HERE, DONE, TROUBLE, LOST = "here", "done", "trouble", "lost"


class LostRank(RuntimeError):
    """Another rank ended or does not answer."""

    exit_code = ExitCode.LOST_RANK


@dataclass
class Peer:
    """Another rank as last heard; `silent_s` counts since its beat last changed, `behind_s` since it has been in one step (0: in none), at one note, and behind us."""

    beat: int = -1
    host: str = "an unknown host"
    notes: int = 0
    note: str = ""
    state: str = HERE
    said: str = ""
    step: int = 0
    silent_s: float = 0.0
    behind_s: float = 0.0

    def described(self, rank: int) -> str:
        """Return rank, host and last collective."""
        return f"rank {rank} on {self.host} (last collective heard of: {self.note or 'none'})"


class Heartbeat:
    """This rank's beat and its view of the others; made by `watch`."""

    def __init__(self, store: Store, rank: int, world_size: int, silence_s: float, stall_s: float) -> None:
        self.rank, self.world_size, self.silence_s, self.stall_s = rank, world_size, silence_s, stall_s
        self.verdict = ""  # who is lost, once that is known
        self._client = store.clone()
        self._beat_s = min(BEAT_S, silence_s / 6)
        self._read_s = min(max(self._beat_s, world_size / RANKS_READ_A_SECOND), silence_s / 4)
        self._host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # as an Identity's
        self._beat, self._state, self._said = 0, HERE, ""
        self._note, self._numbers = (0, ""), itertools.count(1)
        self._step, self._steps = 0, itertools.count(1)
        self._noted, self._work = 0.0, ""
        self._parts_s: dict[str, deque[float]] = {}  # by what work a step is of
        self._peers: dict[int, Peer] = {}
        self._callbacks: list[Callable[[str], None]] = []
        self._suspicious = self._closed = self._told = False
        self._unanswered_s, self._closed_s = 0.0, 0.0
        self._lock = threading.Lock()
        self._decided, self._ended, self._hurry = threading.Event(), threading.Event(), threading.Event()
        self._publish()
        self._threads = [threading.Thread(target=loop, daemon=True, name=loop.__name__) for loop in (self._talk, self._watch)]
        for thread in self._threads:
            thread.start()

    # What the rank calls.

    def note(self, text: str) -> None:
        """Say which collective this rank begins now; it goes out with the next beat. All ranks give the same notes in the same order."""
        self._note = next(self._numbers), text
        if self._step:
            self._part_is_done()

    @contextmanager
    def in_step(self, work: str) -> Iterator[None]:
        """The context is one step of some `work`, that takes every rank about as long: one that stays in it, behind the others, for `stall_s` is stuck."""
        self._work, self._step, self._noted = work, next(self._steps), time.monotonic()
        try:
            yield
        finally:
            self._part_is_done()
            self._step = 0

    def _part_is_done(self) -> None:
        now = time.monotonic()
        self._parts_s.setdefault(self._work, deque(maxlen=LATELY)).append(now - self._noted)
        self._noted = now

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Call `callback(sentence)` once, from the watching thread, when a rank is lost; at once, from this one, where that was told already."""
        with self._lock:
            if not self._told:
                self._callbacks.append(callback)
                return
        callback(self.verdict)

    def peers(self) -> dict[int, tuple[str, str]]:
        """Return host and last note of every other rank heard so far, by rank."""
        return {rank: (peer.host, peer.note) for rank, peer in sorted(self._peers.items())}

    def blame(self) -> str:
        """After a collective has failed or timed out: return a sentence on who is to blame, "" where nobody can be.

        Takes up to a few seconds, in which a rank that ended falls silent. Where all beat, those that have given fewer notes are to blame.
        """
        self._suspicious = True
        self._decided.wait(min(self.silence_s, EVIDENCE_S) + 2 * self._read_s + 1)
        if self.verdict:
            return self.verdict
        notes, note = self._note
        behind = [rank for rank, peer in sorted(self._peers.items()) if peer.notes < notes]
        if behind:
            self._decide(f"{self._named(behind)} did not come as far as {note}.")
        return self.verdict

    def stop(self, trouble: str = "") -> None:
        """Take leave of the others and end the threads: in peace, or with what went wrong here, which is the others' reason to end too.

        In peace nobody will miss this rank; it must have met the others after its last collective. Calling it twice is harmless.
        """
        if self._ended.is_set():
            return
        if self._state == HERE:
            self._state, self._said = (TROUBLE, trouble) if trouble else (DONE, "")
        self._ended.set()
        self._hurry.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2.0)  # one that waits for a store that does not answer is left behind
        if self._state != DONE and self.rank == 0 and not self._closed:
            time.sleep(2 * self._read_s)  # the store may end with this process: let the others read it first

    # The talking thread.

    def _talk(self) -> None:
        due = 0.0
        try:
            while not self._ended.is_set():
                self._publish()
                if time.monotonic() >= due:
                    due = time.monotonic() + self._read_s - self._beat_s / 2
                    self._read()
                self._hurry.wait(self._beat_s)
                if not self._ended.is_set():
                    self._hurry.clear()
            self._publish()
            self._client.check([_key(self.rank)])  # its answer says that the store has taken what was sent before
        except RuntimeError:
            self._closed = True

    def _publish(self) -> None:
        self._beat += 1
        self._client.set(_key(self.rank), json.dumps([self._beat, self._host, *self._note, self._state, self._said, self._step]))

    def _read(self) -> None:
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        if len(self._peers) < len(others) and not self._client.check([_key(rank) for rank in others]):
            others = [rank for rank in others if rank in self._peers or self._client.check([_key(rank)])]
        values = self._client.multi_get([_key(rank) for rank in [*others, self.rank]])
        heard = {rank: Peer(*json.loads(value)) for rank, value in zip(others, values[:-1], strict=True)}
        with self._lock:
            self._unanswered_s = 0.0
            for rank, peer in heard.items():
                before = self._peers.get(rank, peer)
                if peer.step and (before.step, before.notes) == (peer.step, peer.notes) and peer.notes < self._note[0]:
                    peer.behind_s = before.behind_s
            unchanged = {rank: peer for rank, peer in self._peers.items() if rank in heard and heard[rank].beat == peer.beat}
            self._peers = heard | unchanged

    # The watching thread.

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self._beat_s / 2) and not self.verdict:
            now = time.monotonic()
            # A longer gap means that this process itself was not running: what the others did meanwhile is not known yet.
            passed_s, before = min(now - before, self._beat_s), now
            sentence = self._look(passed_s)
            if sentence:
                self._decide(sentence)
        if not self.verdict or self._ended.is_set():
            return
        with self._lock:
            self._told = True
        for callback in self._callbacks:
            try:
                callback(self.verdict)
            except Exception:  # this thread has to live on: it is the one that ends the process
                log.exception("hcsdl: what was to happen after a loss failed")
        if not self._ended.wait(LEAVE_S + 2 * self._read_s):
            show_held_output()
            log.error("hcsdl: rank %d of %d ends: %s", self.rank, self.world_size, self.verdict)
            os._exit(LostRank.exit_code)

    def _look(self, passed_s: float) -> str:
        """Add the time that passed to everybody's silence; return a sentence on who is lost, "" where nobody is."""
        limit_s = min(self.silence_s, EVIDENCE_S) if self._suspicious else self.silence_s
        with self._lock:
            if self._closed:
                self._closed_s += passed_s
            else:
                self._unanswered_s += passed_s
            zero = self._peers.get(0, Peer())
            store = zero.described(0)
            deaf = self._closed or self._unanswered_s > 2 * self._read_s
            if deaf and zero.state == DONE:
                return ""  # it has ended in peace, and the store with it
            if self._closed_s >= min(self.silence_s, EVIDENCE_S):
                return f"{store} is lost: the rendezvous store beside it has closed the connection."
            if self._unanswered_s >= self.silence_s:
                return f"{store} is lost: the rendezvous store beside it has not answered for {self._unanswered_s:.0f} s."
            if deaf:
                return ""  # nothing new can be known of the others
            for rank, peer in sorted(self._peers.items()):
                peer.silent_s += passed_s
                peer.behind_s += passed_s
                if peer.state == LOST:
                    return peer.said
                if peer.state == TROUBLE:
                    return f"{peer.described(rank)} has left the run: {peer.said}"
            silent = {rank: peer.silent_s for rank, peer in self._peers.items() if peer.state == HERE}
            longest_s = max(silent.values(), default=0.0)
            if longest_s < limit_s:
                return self._stuck()
            # Who died together falls silent within a beat or two of each other.
            gone = sorted(rank for rank, silent_s in silent.items() if silent_s >= max(limit_s - 3 * self._read_s, limit_s / 2))
            return f"{self._named(gone)} {'is' if len(gone) == 1 else 'are'} lost: not heard of for {longest_s:.0f} s."

    def _stuck(self) -> str:
        """Return a sentence on who has stopped inside a step while this rank went on, "" where nobody has, or how long a step takes is not known here."""
        fewest = min((peer.notes for peer in self._peers.values()), default=0)
        last = {rank: peer for rank, peer in self._peers.items() if peer.notes == fewest}
        if fewest >= self._note[0] or len(self._peers) < self.world_size - 1 or not all(peer.step for peer in last.values()):
            return ""
        parts_s = [max(lately) for lately in [*self._parts_s.values()]]
        limit_s = max(self.stall_s, 2 * max(parts_s, default=float("inf")))
        stuck = sorted(rank for rank, peer in last.items() if peer.state == HERE and peer.behind_s >= limit_s)
        if not stuck:
            return ""
        waited_s = max(last[rank].behind_s for rank in stuck)
        they = "is stuck: it beats, but has" if len(stuck) == 1 else "are stuck: they beat, but have"
        return f"{self._named(stuck)} {they} not come to {self._note[1]} for {waited_s:.0f} s."

    def _named(self, ranks: Sequence[int]) -> str:
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return ", ".join(self._peers[rank].described(rank) for rank in ranks[:8]) + more

    def _decide(self, sentence: str) -> None:
        """Make `sentence` the verdict unless there is one, and tell the others."""
        with self._lock:
            if self.verdict:
                return
            self.verdict, self._state, self._said = sentence, LOST, sentence
        self._decided.set()
        self._hurry.set()


def _key(rank: int) -> str:
    return f"hcsdl/heartbeat/{rank}"


_running: Heartbeat | None = None


def watch(store: Store, rank: int, world_size: int, silence_s: float = 30.0, stall_s: float = 45.0) -> Heartbeat:
    """Return this process's running heartbeat; the first call starts it, later ones return the same.

    Parameters
    ----------
    store : torch.distributed.Store
        One that all ranks share; a connection of the heartbeat's own is opened beside it (`Store.clone`).
    silence_s : float
        A rank not heard of for so long is lost.
    stall_s : float
        A rank that stays behind the others inside a step for so long is stuck, and lost.
    """
    global _running
    if _running is None or _running._ended.is_set():
        _running = Heartbeat(store, rank, world_size, silence_s, stall_s)
        atexit.register(_running.stop)
    return _running


def take_leave(trouble: str = "") -> None:
    """Stop this process's heartbeat, if one runs: in peace, or saying what went wrong here. For the moment before the process ends."""
    if _running is not None:
        _running.stop(trouble)
