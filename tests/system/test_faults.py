"""Whatever becomes of a rank, a node or a link: every other rank ends in time with code 5, says who is lost, and a restart goes on from the checkpoint.

Ranks are started one by one, as srun or torchrun does, on one host or on two hosts in network namespaces, and beat often so that silence is short.
Every fault has a training of its own, and they happen one after another: while what is left of one waits for the lost, the next begins.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from hcsdl.commands.compose import compose_command
from hcsdl.commands.train import open_run_folder, prepare_run
from hcsdl.distributed.launcher import Forwarder, supervise
from hcsdl.training.checkpoint import list_checkpoints, load_newest
from hcsdl.training.run_folder import RunFolder
from tests import forked, runs
from tests.forked import Forked, kill_what_is_left, start_ranks, start_ranks_on
from tests.namespaces import Host, two_hosts

LIMIT_S = 60


def names(said: str, rank: int, host: str) -> bool:
    """Return whether `said` names a rank, its host and its last collective: as of its last beat, up to a second before, maybe still the start."""
    return re.search(rf"rank {rank} on {host} \(last collective heard of: \w[^)]*#\d+[^)]*\)", said) is not None


pytestmark = pytest.mark.timeout(600)  # nine trainings begin in one fixture
SILENCE_S = 5  # ranks that wait for their turn on a busy core must not be taken for lost
BEST = "ccl" if any(importlib.metadata.distributions(name="oneccl")) else "gloo"
SHORT, LONG = 2, 4  # epochs of 8 steps


@pytest.fixture(autouse=True, scope="module")
def nothing_left() -> Iterator[None]:
    """Ranks that a failed test has left behind end with it."""
    yield
    kill_what_is_left()


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


def words(plates: Path, folder: Path, backend: str, epochs: int = SHORT) -> list[str]:
    return ["train", *runs.TINY, f"plates.root={plates}", f"run_dir={folder}", f"distributed.backend={backend}", f"distributed.silence_s={SILENCE_S}",
            "kernels=native", "data.downsample=2", "data.workers=0", f"training.epochs={epochs}", "training.validate_every_epochs=4",
            "training.checkpoint_every_steps=1"]  # fmt: skip


def undisturbed(plates: Path, backend: str, world_size: int, epochs: int) -> str:
    """Return the digest of the weights of the run left alone, on one host; trained once for all test processes."""

    def train(folder: Path) -> None:
        for rank in start_ranks(words(plates, folder, backend, epochs), world_size, Path(f"{folder}-output")):
            assert rank.wait(200) == 0, rank.said()

    folder = runs.once(plates.parent / f"undisturbed-{backend}-{world_size}-{epochs}", train)
    assert runs.summary(folder)["steps"] == 8 * epochs and runs.summary(folder)["world_size"] == world_size
    return runs.digest(folder)


def wait_for_checkpoint(folder: Path, step: int, ranks: list[Forked]) -> None:
    limit = time.monotonic() + 150
    while RunFolder(folder).last_saved() < step:
        codes = [rank.poll() for rank in ranks]
        assert time.monotonic() < limit and not {*codes} - {None, 1}, f"{codes}\n" + "\n".join(rank.said() for rank in ranks)
        time.sleep(0.02)
    time.sleep(1.0)  # every rank is in the next step


def at_step_5(fault: Callable[[], None]) -> None:
    """Give this rank a bug."""
    from hcsdl.training import loop

    sound = loop.train_step

    def train_step(parts: object, batches: object, step: int, save_due: bool) -> object:
        if step == 5:
            fault()
        return sound(parts, batches, step, save_due)

    loop.train_step = train_step


def raise_an_error() -> None:
    raise ValueError("a bug of this rank")


def hang() -> None:
    time.sleep(1000)


@dataclass
class Struck:
    """A training that a fault has struck."""

    plates: Path
    folder: Path
    backend: str
    hosts: tuple[Host, Host] | None
    ranks: list[Forked]
    at: float

    def ended_in_time(self, rank: int) -> bool:
        """Return whether a rank has ended with 5, its last word within `LIMIT_S` of the fault."""
        process = self.ranks[rank]
        return process.wait(LIMIT_S) == 5 and process.output.stat().st_mtime - self.at < LIMIT_S

    def restarted(self) -> str:
        """Return the digest of the weights to which the same ranks train when they are started again."""
        again, said = words(self.plates, self.folder, self.backend), Path(f"{self.folder}-again")
        ranks = start_ranks_on(self.hosts, again, 1, said) if self.hosts else start_ranks(again, len(self.ranks), said)
        for rank in ranks:
            assert rank.wait(150) == 0, rank.said()
        return runs.digest(self.folder)


# What happens to two hosts with a rank each after step 5, which rank 1 does not come beyond: it hangs, unless it raises.
FAULTS: dict[str, Callable[[Sequence[Forked], Sequence[Host]], None]] = {
    "raises": lambda ranks, hosts: None,
    "hangs in Python": lambda ranks, hosts: None,
    "killed": lambda ranks, hosts: ranks[1].send_signal(signal.SIGKILL),
    "stalls": lambda ranks, hosts: ranks[1].send_signal(signal.SIGSTOP),
    "link down": lambda ranks, hosts: hosts[1].cut(),
    "node gone": lambda ranks, hosts: hosts[1].vanish(),
}
BOTH = [*dict.fromkeys([*((fault, BEST) for fault in FAULTS), ("link down", "gloo"), ("hangs in Python", "gloo")])]
TWO_OF_FOUR, PREPARING = "two of four", "node gone while it prepares"


@pytest.fixture(scope="module")
def struck(tiny_plates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[object, Struck]]:
    base = tmp_path_factory.mktemp("struck")
    with ExitStack() as stack:

        def begin(number: int, on_hosts: bool, start: Callable[..., list[Forked]], backend: str = BEST) -> Struck:
            hosts = stack.enter_context(two_hosts()) if on_hosts else None
            ranks = start(tiny_plates, base / str(number), hosts)
            return Struck(tiny_plates, base / str(number), backend, hosts, ranks, time.time())

        found: dict[object, Struck] = {TWO_OF_FOUR: begin(0, False, two_of_four_die), PREPARING: begin(1, True, prepare_and_vanish)}
        for number, (fault, backend) in enumerate(BOTH, 2):
            found[fault, backend] = begin(number, True, partial(strike, fault, backend), backend)
        yield found


def strike(fault: str, backend: str, plates: Path, folder: Path, hosts: tuple[Host, Host]) -> list[Forked]:
    patience = [f"distributed.stall_s={SILENCE_S}"] if fault == "hangs in Python" else []
    bug = partial(at_step_5, raise_an_error if fault == "raises" else hang)  # so that what happens to it happens in mid-training
    ranks = start_ranks_on(hosts, [*words(plates, folder, backend), *patience], 1, Path(f"{folder}-said"), {1: bug})
    wait_for_checkpoint(folder, 5, ranks)
    FAULTS[fault](ranks, hosts)
    return ranks


@pytest.mark.parametrize(("fault", "backend"), BOTH)
def test_the_other_rank_ends_with_5_and_names_the_lost(struck: dict[object, Struck], fault: str, backend: str) -> None:
    one = struck[fault, backend]
    ranks = one.ranks
    assert one.ended_in_time(0), ranks[0].said()
    assert names(ranks[0].said(), 1, "node-b")
    if fault == "raises":
        assert ranks[1].wait(LIMIT_S) == 1 and "has left the run: a bug of this rank" in ranks[0].said()
    if fault == "hangs in Python":
        assert ranks[1].wait(LIMIT_S) == 5 and "is stuck: it beats, but has not come to" in ranks[0].said()
    if fault == "link down":
        assert ranks[1].wait(LIMIT_S) == 5 and names(ranks[1].said(), 0, "node-a")
    ranks[1].kill()
    assert load_newest(list_checkpoints(one.folder / "checkpoints")).step == 5
    if fault == "node gone":  # which comes back
        one.hosts[1].mend()
        assert one.restarted() == undisturbed(one.plates, backend, 2, SHORT)
        assert runs.summary(one.folder)["resumed"]


def test_two_hosts_train_to_the_weights_of_one(tiny_plates: Path, tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    folder = tmp_path / "run"
    for rank in start_ranks_on(hosts, words(tiny_plates, folder, BEST), 1, tmp_path / "output"):
        assert rank.wait(150) == 0, rank.said()
    found = runs.summary(folder)
    assert (found["world_size"], found["backend"], found["resumed"]) == (2, BEST, False)
    assert runs.digest(folder) == undisturbed(tiny_plates, BEST, 2, SHORT)


def hang_while_preparing() -> None:
    from hcsdl.commands import train

    def prepare_run(config: object, folder: RunFolder) -> None:
        (folder.path / "preparing").touch()
        hang()

    train.prepare_run = prepare_run


def prepare_and_vanish(plates: Path, folder: Path, hosts: tuple[Host, Host]) -> list[Forked]:
    ranks = start_ranks_on(hosts, words(plates, folder, "gloo"), 1, Path(f"{folder}-said"), {0: hang_while_preparing})
    while not (folder / "preparing").exists():
        assert all(rank.poll() is None for rank in ranks), ranks[0].said() + ranks[1].said()
        time.sleep(0.05)
    time.sleep(SILENCE_S / 2)  # several beats: rank 1 knows by now who is where
    hosts[0].vanish()
    return ranks


def test_a_node_that_is_gone_while_it_prepares_the_run_is_missed_too(struck: dict[object, Struck]) -> None:
    ranks = struck[PREPARING].ranks
    assert ranks[1].wait(LIMIT_S) == 5
    assert "rank 0 on node-a (last collective heard of: none) is lost" in ranks[1].said()


def two_of_four_die(plates: Path, folder: Path, _: None) -> list[Forked]:
    ranks = start_ranks(words(plates, folder, BEST), 4, Path(f"{folder}-said"), {2: partial(at_step_5, hang)})
    wait_for_checkpoint(folder, 5, ranks)
    for rank in (0, 2):
        ranks[rank].send_signal(signal.SIGKILL)
    return ranks


def test_two_of_four_ranks_die_together_and_a_restart_gives_the_undisturbed_weights(struck: dict[object, Struck]) -> None:
    one = struck[TWO_OF_FOUR]
    for rank in (1, 3):
        assert one.ended_in_time(rank), one.ranks[rank].said()
        assert names(one.ranks[rank].said(), 0, os.uname().nodename)
    assert load_newest(list_checkpoints(one.folder / "checkpoints")).step == 5
    assert one.restarted() == undisturbed(one.plates, BEST, 4, SHORT)


def test_ten_random_kills_over_one_training_leave_the_undisturbed_weights(tiny_plates: Path, tmp_path: Path) -> None:
    """The launcher's own loop; ten kills, nine at steps of their own, one while the ranks start. The other rank goes with it, but where it is left to find out."""
    config = compose_command("train", words(tiny_plates, tmp_path / "run", BEST, LONG)[1:])
    folder = open_run_folder(config)
    prepare_run(config, folder)
    choose = random.Random(7)
    steps = sorted(choose.sample(range(1, 8 * LONG - 4), 9))
    steps.insert(choose.randrange(3, 7), 0)
    started: list[list[Forked]] = []

    def start() -> list[Forked]:
        ranks = start_ranks(["rank", str(folder.path)], 2, tmp_path / "output")
        if len(started) < len(steps):
            after = steps[len(started)] and max(steps[len(started)], folder.last_saved() + 1)
            victims = choose.sample(ranks, 1 if len(started) == 5 else 2)
            threading.Thread(target=kill, args=([rank.pid for rank in victims], folder.attempt, after, choose.random())).start()
        started.append(ranks)
        return ranks

    def kill(pids: list[int], attempt: int, after: int, delay_s: float) -> None:
        while runs.last_step(folder.path, attempt) < after and runs.alive(pids[0]):
            time.sleep(0.01)
        for pid in pids:
            time.sleep(0.03 * delay_s if after else delay_s)
            if runs.alive(pid):
                os.kill(pid, signal.SIGKILL)

    code, sentence = supervise(start, Forwarder(), 12, SILENCE_S, saved=folder.last_saved, renew=folder.renew)
    folder.release()
    assert (code, sentence) == (0, ""), started[-1][0].said()
    assert len(started) == 11 and sum(rank.poll() == -signal.SIGKILL for ranks in started for rank in ranks) >= 10
    assert runs.summary(folder.path)["attempts"] == 11
    assert runs.digest(folder.path) == undisturbed(tiny_plates, BEST, 2, LONG)


def test_the_own_launcher_starts_the_ranks_again(tiny_plates: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = forked.start(*words(tiny_plates, folder, BEST, LONG), "distributed.ranks=2", "distributed.max_restarts=1")
    runs.wait_for_step(process, folder, 3)
    first = runs.children(process)
    os.kill(first[1], signal.SIGKILL)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert names(said, 1, os.uname().nodename), said
    assert f"rank 1 was killed by SIGKILL on {os.uname().nodename}; starting the ranks again from step" in said and "restart 1 of 1" in said
    assert runs.summary(folder)["attempts"] == 2 and runs.digest(folder) == undisturbed(tiny_plates, BEST, 2, LONG)
    assert {line["attempt"] for line in runs.journal(folder)} == {1, 2}


@pytest.mark.slow  # its restart is ours seen from the ranks; that torchrun's ranks train alike is tests/system/test_ranks.py's
def test_torchrun_starts_the_ranks_again(tiny_plates: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    agent = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "hcsdl", *words(tiny_plates, folder, BEST, LONG)],
        env=runs.environment() | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=runs.with_the_tests(),  # noqa: PLW1509
    )  # fmt: skip
    runs.wait_for_step(agent, folder, 3)
    os.kill(runs.children(agent)[1], signal.SIGKILL)
    _, said = agent.communicate(timeout=200)
    assert agent.returncode == 0, said
    assert runs.summary(folder)["resumed"] and runs.digest(folder) == undisturbed(tiny_plates, BEST, 2, LONG)
