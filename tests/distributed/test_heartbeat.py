"""Ranks that fall silent, leave, stall or lose their store are found and named; ranks that end in peace are not.

Each scenario has a store and ranks of its own. They all go on at the same time, since they mostly wait; each is a test that says how its own ended.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from hcsdl.distributed import heartbeat
from hcsdl.distributed.heartbeat import take_leave, watch
from tests.forked import processes

SILENCE_S = 5.0  # ranks that wait for their turn on a busy core must not be taken for lost
STALL_S = 3.0
HOST = os.uname().nodename


def serve(line: Connection) -> None:
    """Be the store of all ranks."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    line.send(store.port)
    line.recv()


def live(line: Connection, rank: int, world_size: int, port: int, log: Path) -> None:
    """Be a rank: beat, obey what comes over `line`, and send every sentence about a loss."""
    heartbeat.BEAT_S, heartbeat.EVIDENCE_S, heartbeat.LEAVE_S = 0.3, 2.0, 1.0
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False, timeout=timedelta(seconds=60))
    heart, step = watch(store, rank, world_size, SILENCE_S, STALL_S), ExitStack()
    assert watch(store, rank, world_size) is heart
    heart.on_lost(lambda sentence: line.send(f"lost: {sentence}"))
    while True:
        word, _, text = line.recv().partition(" ")
        if word == "note":
            heart.note(text)
        elif word == "step":
            step.enter_context(heart.in_step("test"))
        elif word == "pace":
            for _ in range(int(text)):
                with heart.in_step("test"):
                    time.sleep(0.25)
        elif word == "peers":
            line.send(heart.peers())
        elif word == "blame":
            line.send(heart.blame())
        elif word == "wait":  # in the connection the heartbeat was given
            threading.Thread(target=lambda: store.wait(["never"], timedelta(seconds=300)), daemon=True).start()
        elif word == "leave":
            take_leave(text)
            os._exit(0)


class Ranks:
    """A store in a process of its own and `world_size` ranks beside it, which have all heard of each other."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self.folder, self.all = folder, []
        folder.mkdir()
        self.store, line = self._start(serve)
        port = line.recv()
        self._line = line
        started = [self._start(live, rank, world_size, port, folder / f"{rank}.log") for rank in range(world_size)]
        self.processes, self.lines = [one[0] for one in started], [one[1] for one in started]
        for rank in range(world_size):
            self.peers(rank, lambda seen: len(seen) == world_size - 1)

    def _start(self, role: object, *arguments: object) -> tuple[object, Connection]:
        ours, theirs = processes.Pipe()
        process = processes.Process(target=role, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        self.all.append(process)
        return process, ours

    def peers(self, rank: int, seen: object) -> dict:
        """Return what `rank` knows of the others, as soon as it fulfils `seen`."""
        limit = time.monotonic() + 60
        while True:
            self.lines[rank].send("peers")
            found = self.lines[rank].recv()
            assert isinstance(found, dict), found
            if seen(found):
                return found
            assert time.monotonic() < limit, found
            time.sleep(0.02)

    def ended(self, rank: int) -> tuple[int, list[str]]:
        """Wait for rank `rank` to end by itself; return its exit code and what it has sent."""
        self.processes[rank].join(60)
        said = []
        while self.lines[rank].poll():
            try:
                said.append(self.lines[rank].recv())
            except EOFError:
                break
        return self.processes[rank].exitcode, said

    def logged(self, rank: int) -> str:
        """Return what rank `rank` has written on standard error."""
        return (self.folder / f"{rank}.log").read_text()

    def leave_in_peace(self, *ranks: int) -> None:
        """Tell ranks to leave, and check that they do, and have missed nobody."""
        for rank in ranks:
            self.lines[rank].send("leave")
        for rank in ranks:
            assert self.ended(rank) == (0, [])


SCENARIOS: dict[str, tuple[int, Callable[[Ranks], None]]] = {}


def scenario(world_size: int) -> Callable:
    """Make a test of a function of `world_size` ranks."""

    def add(function: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
        SCENARIOS[function.__name__] = world_size, function
        return function

    return add


@scenario(3)
def everybody_knows_host_and_last_note_of_everybody(three: Ranks) -> None:
    three.lines[1].send("note all_reduce #12 fp32 26214400 B")
    assert three.peers(0, lambda seen: seen[1][1]) == {1: (HOST, "all_reduce #12 fp32 26214400 B"), 2: (HOST, "")}


@scenario(4)
def silent_ranks_are_named_and_the_others_end_with_5(four: Ranks) -> None:
    """One is killed and one stalls: both are silent."""
    for rank in (0, 2):
        four.lines[rank].send(f"note all_reduce #{rank + 7}")
    for rank in (1, 3):
        four.peers(rank, lambda seen: seen[0][1] and seen[2][1])
    for rank, number in ((0, signal.SIGKILL), (2, signal.SIGSTOP)):
        os.kill(four.processes[rank].pid, number)
    for rank in (1, 3):
        code, said = four.ended(rank)
        assert code == 5 and len(said) == 1
        for lost in (
            f"rank 0 on {HOST} (last collective heard of: all_reduce #7)",
            f"rank 2 on {HOST} (last collective heard of: all_reduce #9)",
        ):
            assert lost in said[0] and lost in four.logged(rank)
        assert "rank 1" not in said[0] and "rank 3" not in said[0]


@scenario(2)
def a_store_that_is_gone_is_rank_0_lost(two: Ranks) -> None:
    the_store_gets(signal.SIGKILL, "has closed the connection", two)


@scenario(2)
def a_store_that_does_not_answer_is_rank_0_lost(two: Ranks) -> None:
    the_store_gets(signal.SIGSTOP, r"has not answered for \d+ s", two)


def the_store_gets(number: int, reason: str, two: Ranks) -> None:
    two.lines[1].send("wait")
    os.kill(two.store.pid, number)
    code, said = two.ended(1)
    assert code == 5 and said[0].startswith(f"lost: rank 0 on {HOST}") and re.search(reason, said[0])


@scenario(2)
def a_rank_that_was_itself_suspended_accuses_nobody(two: Ranks) -> None:
    both = [process.pid for process in two.processes]
    for pid in both:  # nobody awake sees the other asleep
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5 * SILENCE_S)
    for pid in both:
        os.kill(pid, signal.SIGCONT)
    time.sleep(SILENCE_S)
    two.leave_in_peace(0, 1)


@scenario(3)
def neither_a_rank_that_ended_in_peace_is_missed_nor_one_that_waits_in_its_own_connection(three: Ranks) -> None:
    three.leave_in_peace(1)
    three.lines[2].send("wait")
    time.sleep(1.5 * SILENCE_S)
    three.leave_in_peace(0, 2)


@scenario(3)
def a_rank_that_leaves_in_trouble_is_the_others_reason(three: Ranks) -> None:
    three.lines[2].send("leave images must be readable. plate/a.tif is not.")
    for rank in (0, 1):
        code, said = three.ended(rank)
        assert code == 5
        assert "rank 2 on" in said[0], said
        assert "has left the run: images must be readable. plate/a.tif is not." in said[0]


@scenario(2)
def after_a_timeout_the_rank_that_did_not_come_as_far_is_to_blame_and_nobody_where_all_did(two: Ranks) -> None:

    def note(rank: int, text: str) -> None:
        two.lines[rank].send(f"note {text}")
        two.peers(1 - rank, lambda seen: seen[rank][1] == text)

    note(0, "all_reduce #1")
    note(1, "all_reduce #1")
    two.lines[0].send("blame")
    assert two.lines[0].recv() == ""
    note(0, "all_gather #2")
    two.lines[0].send("blame")
    told = f"rank 1 on {HOST} (last collective heard of: all_reduce #1) did not come as far as all_gather #2."
    assert {two.lines[0].recv(), two.lines[0].recv()} == {told, f"lost: {told}"}
    assert two.ended(1) == (5, [f"lost: {told}"])


@scenario(3)
def a_rank_that_beats_but_stays_behind_is_stuck_inside_a_step_only(three: Ranks) -> None:
    """Of three, rank 1 has begun one collective less, and rank 2 waits for it in an earlier one than rank 0: rank 1 alone is named, and ends, too."""
    for rank in (0, 2):
        three.lines[rank].send("step")
    for rank, count in ((0, 3), (1, 1), (2, 2)):
        for number in range(1, count + 1):
            three.lines[rank].send(f"note all_reduce #{number}")
    assert three.peers(0, lambda seen: seen[1][1] and seen[2][1] == "all_reduce #2")
    time.sleep(1.5 * STALL_S)  # it may be saving: nobody is lost
    three.lines[1].send(f"pace {int(6 * STALL_S)}")  # it goes from step to step
    time.sleep(1.5 * STALL_S)
    assert not three.lines[0].poll()
    three.lines[1].send("step")
    told = f"rank 1 on {HOST} (last collective heard of: all_reduce #1) is stuck: it beats, but has not come to all_reduce #"
    for rank in range(3):
        code, said = three.ended(rank)
        assert code == 5 and said[0].startswith(f"lost: {told}"), said


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """How each scenario ends; what is left of its processes is killed."""
    folder = tmp_path_factory.mktemp("ranks")
    # None is started while threads wait for others: multiprocessing would have both ask for an exit code that can be read but once.
    ranks = {name: Ranks(world_size, folder / name) for name, (world_size, _) in SCENARIOS.items()}
    with ThreadPoolExecutor(len(ranks)) as pool:
        yield {name: pool.submit(play, ranks[name]) for name, (_, play) in SCENARIOS.items()}
    for process in (process for one in ranks.values() for process in one.all):
        process.kill()
        process.join()


@pytest.mark.parametrize("name", SCENARIOS)
def test_of_ranks(name: str, ends: dict[str, Future]) -> None:
    ends[name].result()
