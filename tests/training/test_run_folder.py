"""One writer at a time, and files that are whole or not there."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hcsdl.config import ConfigError
from hcsdl.training.run_folder import RunFolder, write_atomically, write_json
from hcsdl.training.summary import git_commit, time_to_accuracy, versions

pytestmark = pytest.mark.xeon_only
HOLD = "import sys, time; from hcsdl.training.run_folder import RunFolder; f = RunFolder(sys.argv[1]); print(f.acquire(), flush=True); time.sleep(100)"


def test_second_writer_is_refused_and_a_dead_ones_lock_taken_over(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"is in use by process {process.pid} on "):
        folder.acquire()
    process.kill()
    process.wait()
    assert folder.acquire() == 2
    folder.check_newest()


def test_a_job_takes_the_folder_over_from_its_own_earlier_start_alone(tmp_path: Path) -> None:
    hold = HOLD.replace("f.acquire()", "f.acquire(('12', 1))")
    process = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    earlier, folder = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    earlier.join()
    for other in (("", 0), ("13", 2), ("12", 1), ("12", 0)):
        with pytest.raises(ConfigError, match="is in use by"):
            folder.acquire(other)
    assert folder.acquire(("12", 2)) == 2
    folder.check_newest()
    with pytest.raises(ConfigError, match="only the newest attempt may save"):
        earlier.check_newest()
    process.kill()
    process.wait()


def test_an_older_attempt_must_not_save(tmp_path: Path) -> None:
    first, rank, second = RunFolder(tmp_path), RunFolder(tmp_path), RunFolder(tmp_path)
    first.acquire()
    rank.join()
    rank.check_newest()
    first.release()
    second.acquire()
    with pytest.raises(ConfigError, match="taken over by attempt 2; this is 1"):
        rank.check_newest()


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="holds other files"):
        RunFolder(tmp_path).acquire()
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "thesis.txt").acquire()


def test_a_folder_that_cannot_be_made_is_said() -> None:
    with pytest.raises(ConfigError, match="run_dir must be writable"):
        RunFolder("/proc/nowhere/run").acquire()


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")  # type: ignore[arg-type]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as a full disk
    try:
        with pytest.raises(OSError, match=f"too large: '{path}'"):
            write_atomically(path, bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.5, (float("nan"),)], 3: "µ"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1.5, [None]], "3": "µ"}


def test_time_to_accuracy_is_of_the_first_evaluation_that_reached_it() -> None:
    history = [{"elapsed_s": 10.0, "acc": 0.5}, {"elapsed_s": 20.0, "acc": 0.96}, {"elapsed_s": 30.0, "acc": 0.91}]
    assert time_to_accuracy(history, "acc") == {"0.90": 20.0, "0.95": 20.0, "0.99": None, "plateau": 20.0}
    assert time_to_accuracy([*history, {"elapsed_s": 40.0, "acc": 0.505}], "acc")["plateau"] == 10.0
    assert time_to_accuracy([], "acc") == {"0.90": None, "0.95": None, "0.99": None}


def test_versions_and_commit() -> None:
    assert {"python", "torch", "hydra-core"} <= set(versions())
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40
