"""Processes that take turns: their answers, environment and deaths."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcsdl.config import MachineConfig
from hcsdl.distributed.workers import WorkerFailed, Workers
from hcsdl.machine.placement import plan_places
from hcsdl.machine.topology import read_machine
from tests import runs

pytestmark = pytest.mark.xeon_only


def start(log: Path, ranks: int = 1, **own: str) -> Workers:
    places = plan_places(read_machine(), ranks, MachineConfig(threads_per_rank=1))
    environments = [{"OWN": str(rank)} | own for rank in range(ranks)]
    return Workers("tests.distributed.turn_worker", {"a": 1}, places, environments, without=("TUNED_",), log=log, bound=True)


def test_every_rank_answers_and_starts_without_our_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNED_BY_THE_SHELL", "1")
    workers = start(tmp_path / "log", ranks=2)
    first, second = workers.ask(do="say", number=7)
    assert first["task"] == {"a": 1} and first["command"] == {"do": "say", "number": 7}
    assert (first["rank"], second["rank"], second["environment"]["OWN"]) == ("0", "1", "1")
    assert "TUNED_BY_THE_SHELL" not in first["environment"] and "PATH" in first["environment"]
    pids = [rank.pid for rank in workers.ranks]
    workers.close()
    assert not any(map(runs.alive, pids))


@pytest.mark.parametrize(("how", "said"), [({}, "ended with code 3; the last words"), ({"signal": 1}, "killed by SIGSEGV; the last words")])
def test_a_death_is_told_and_the_others_go_on(tmp_path: Path, how: dict, said: str) -> None:
    dying, other = start(tmp_path / "dying"), start(tmp_path / "other")
    with pytest.raises(WorkerFailed, match=said):
        dying.ask(do="die", **how)
    with pytest.raises(WorkerFailed):
        dying.ask(do="say")
    assert other.ask(do="say")[0]["rank"] == "0"
    other.close()


def test_one_dead_rank_ends_the_others(tmp_path: Path) -> None:
    workers = start(tmp_path / "log", ranks=2)
    workers.ask(do="say")
    workers.ranks[1].kill()
    with pytest.raises(WorkerFailed, match="killed by SIGKILL"):
        workers.ask(do="say")
    assert not any(runs.alive(rank.pid) for rank in workers.ranks)
