"""What the launcher does and says when ranks end."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import pytest

from hcsdl.distributed.launcher import Forwarder, start_ranks, supervise, verdict, watch_ranks
from hcsdl.machine.placement import Place

pytestmark = pytest.mark.xeon_only


@pytest.mark.parametrize(
    ("failed", "code", "said"),
    [
        ({}, 0, ""),
        ({1: -9}, 5, f"rank 1 was killed by SIGKILL on {socket.gethostname()}"),
        ({2: -9, 1: 5, 3: 5, 0: -9}, 5, "rank 0 was killed by SIGKILL, rank 2 was killed by SIGKILL"),
        ({1: -9, 0: 5}, 5, "rank 1 was killed by SIGKILL"),
        ({0: 5, 1: -9}, 5, "rank 1 was killed by SIGKILL"),
        ({0: 5, 1: 3}, 3, "logs/rank1.log"),
        ({0: 4, 1: 4}, 4, ""),
        ({0: 75, 1: 75}, 75, ""),
        ({1: 139}, 5, "rank 1 ended with code 139"),
        ({0: 1}, 1, ""),
    ],
)
def test_verdict(failed: dict, code: int, said: str) -> None:
    found = verdict(failed)
    assert found[0] == code and said in found[1] and bool(found[1]) == bool(said)


def test_a_rank_killed_for_want_of_memory_is_told_so() -> None:
    assert "where memory had run out" in verdict({0: 5, 1: -9}, out_of_memory=True)[1]
    assert "memory" not in verdict({0: 5, 1: -11}, out_of_memory=True)[1] + verdict({0: 5, 1: -9})[1]


def test_a_failing_rank_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcsdl.distributed.launcher.GRACE_S", 0.2)
    script = "import os, sys, time; print(os.environ['OMP_NUM_THREADS'], flush=True); sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(100)"
    children = start_ranks(["-c", script], places(2, threads=3), logs=tmp_path)
    code, said = watch_ranks(children, silence_s=0.1)
    assert code == 3 and "logs/rank1.log" in said
    assert [child.returncode for child in children] == [-9, 3]
    assert (tmp_path / "rank1.log").read_text() == "3\n"


def test_a_rank_that_stops_at_a_signal_leaves_the_others_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcsdl.distributed.launcher.GRACE_S", 0.1)
    script = "import os, sys, time; time.sleep(1.0 if os.environ['RANK'] == '0' else 0); sys.exit(75)"
    assert watch_ranks(start_ranks(["-c", script], places(2), logs=tmp_path), silence_s=0.1) == (75, "")


def test_a_rank_that_does_not_end_after_rank_0_is_ended_and_the_result_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hcsdl.distributed.launcher.GRACE_S", 0.1)
    script = "import os, time; time.sleep(100 if os.environ['RANK'] == '1' else 0)"
    children = start_ranks(["-c", script], places(2), logs=tmp_path)
    assert watch_ranks(children, silence_s=0.1) == (0, "")
    assert [child.returncode for child in children] == [0, -9] and "rank 1 did not end and was killed" in caplog.text


def test_rank_0_may_end_long_after_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcsdl.distributed.launcher.GRACE_S", 0.1)
    script = "import os, time; time.sleep(1.5 if os.environ['RANK'] == '0' else 0)"
    children = start_ranks(["-c", script], places(2), logs=tmp_path)
    assert watch_ranks(children, silence_s=0.1) == (0, "") and children[0].returncode == 0


def test_where_a_rank_cannot_be_started_none_stays(tmp_path: Path) -> None:
    (tmp_path / "rank1.log").mkdir()
    mark, before = str(tmp_path), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(IsADirectoryError):
        start_ranks(["-c", "import time; time.sleep(100)", mark], places(2), logs=tmp_path)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert not [one for one in Path("/proc").glob("[0-9]*/cmdline") if mark in one.read_text(errors="replace")]


def places(ranks: int, threads: int = 1) -> list[Place]:
    return [Place(threads, (), bound=False)] * ranks


class Starts:
    """Starts one rank after the other that writes how many steps it has "saved" and ends with the next of `codes`."""

    def __init__(self, folder: Path, codes: list[int], progress: bool = True) -> None:
        self.folder, self.codes, self.progress, self.steps, self.attempts = folder, codes, progress, 0, 1

    def __call__(self) -> list[subprocess.Popen]:
        code = self.codes.pop(0)
        self.steps += self.progress
        return start_ranks(
            ["-c", f"import os, signal; os.kill(os.getpid(), -{code}) if {code} < 0 else os._exit({code})"], places(1), self.folder
        )

    def supervised(self, restarts: int, forwarder: Forwarder | None = None) -> int:
        """Return the exit code."""
        return supervise(self, forwarder or Forwarder(), restarts, 1.0, saved=lambda: self.steps, renew=self.renew)[0]

    def renew(self) -> None:
        self.attempts += 1


@pytest.mark.parametrize("code", [1, 5, -9])
def test_lost_and_crashed_ranks_are_started_again(tmp_path: Path, code: int, caplog: pytest.LogCaptureFixture) -> None:
    starts = Starts(tmp_path, [code, code, 0, 0])
    assert starts.supervised(3) == 0
    assert starts.attempts == 3 and len(starts.codes) == 1
    assert "starting the ranks again from step 2, restart 2 of 3" in caplog.text


@pytest.mark.parametrize("code", [2, 3, 4, 75])
def test_what_another_start_cannot_mend_is_not_started_again(tmp_path: Path, code: int) -> None:
    starts = Starts(tmp_path, [code, 0])
    assert starts.supervised(3) == code and starts.attempts == 1


def test_restarts_are_counted(tmp_path: Path) -> None:
    starts = Starts(tmp_path, [-9, -9, 0])
    assert starts.supervised(1) == 5 and starts.attempts == 2


def test_a_crash_loop_that_saves_nothing_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    starts = Starts(tmp_path, [1] * 10, progress=False)
    assert starts.supervised(9) == 1
    assert starts.attempts == 3 and "3 starts in a row have saved nothing new" in caplog.text


def test_no_restart_after_a_signal_to_stop(tmp_path: Path) -> None:
    forwarder = Forwarder()
    starts = Starts(tmp_path, [-9, 0])
    forwarder.seen = signal.SIGTERM
    assert starts.supervised(3, forwarder) == 5 and starts.attempts == 1
