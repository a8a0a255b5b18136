"""Who a rank is, and what the launcher says when ranks end."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcsdl.config import ConfigError
from hcsdl.distributed.identity import Identity, who_am_i
from hcsdl.distributed.launcher import start_ranks, verdict, watch_ranks

pytestmark = pytest.mark.xeon_only
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_alone_without_variables() -> None:
    assert who_am_i({"PATH": "/bin"}) == Identity(0, 1, 0, 1, "alone")


def test_own_launcher_and_torchrun() -> None:
    assert who_am_i(WHOLE) == Identity(1, 2, 1, 2, "torchrun")
    assert who_am_i(WHOLE | {"HCSDL_LAUNCHER_PID": "7"}).launcher == "own"


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK"])
def test_a_half_set_environment_names_what_is_missing(missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"{missing} is missing"):
        who_am_i({k: v for k, v in WHOLE.items() if k != missing})


@pytest.mark.parametrize(
    ("change", "said"), [({"RANK": "2"}, "RANK must be below WORLD_SIZE"), ({"RANK": "one"}, "RANK must be a whole number")]
)
def test_impossible_numbers(change: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        who_am_i(WHOLE | change)


@pytest.mark.parametrize(
    ("failed", "code", "said"),
    [
        ({}, 0, ""),
        ({1: -9}, 5, "rank 1 was killed by SIGKILL"),
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


def test_a_failing_rank_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcsdl.distributed.launcher.GRACE_S", 0.2)
    script = "import os, sys, time; print(os.environ['OMP_NUM_THREADS'], flush=True); sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(100)"
    children = start_ranks(["-c", script], ranks=2, threads=3, logs=tmp_path)
    code, said = watch_ranks(children)
    assert code == 3 and "logs/rank1.log" in said
    assert [child.returncode for child in children] == [-9, 3]
    assert (tmp_path / "rank1.log").read_text() == "3\n"
