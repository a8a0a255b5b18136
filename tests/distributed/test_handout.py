"""Ranks that were started with a command line each become one run, or none."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

from hcsdl.distributed.handout import compare
from hcsdl.distributed.rendezvous import free_port
from tests import runs
from tests.forked import start_rank, start_ranks

TRAIN = ["train", *runs.TINY]


def test_the_first_difference_is_told_with_both_values_ranks_and_hosts() -> None:
    same = {"host": "n1", "asked": {"seed": 0, "data.crop_px": [8, 8], "the version of torch": "2.8.0"}}
    assert compare([same, same | {"host": "n2"}]) == ""
    other = {"host": "n2", "asked": same["asked"] | {"seed": 1, "the version of torch": "2.13.0"}}
    said = compare([same, same, other])
    assert "seed is 0 on rank 0 (n1) and 1 on rank 2 (n2)" in said
    assert "the version of torch is '2.8.0' on rank 0 (n1) and '2.13.0' on rank 2 (n2)" in said
    assert "the version of oneccl is None on rank 0" in compare(
        [same, {"host": "n2", "asked": same["asked"] | {"the version of oneccl": "1"}}]
    )


def test_ranks_asked_for_different_things_stop_before_anything_is_done(tmp_path: Path) -> None:
    port, run = free_port(), tmp_path / "run"
    words = [*TRAIN, f"plates.root={tmp_path}", f"run_dir={run}"]
    ranks = [start_rank([*words, f"training.learning_rate=0.0{rank + 1}"], rank, 2, port, tmp_path) for rank in range(2)]
    for rank in ranks:
        assert rank.wait(100) == 2, rank.said()
        assert rank.said().count("training.learning_rate is 0.01 on rank 0 (") == 1 and "and 0.02 on rank 1 (" in rank.said()
    assert not run.exists()


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    words = [*TRAIN, f"plates.root={tmp_path}", f"run_dir={tmp_path / 'run'}", "distributed.timeout_s=3"]
    rank = start_rank(words, 0, 2, free_port(), tmp_path)
    assert rank.wait(100) == 5 and "rank 0 of 2: all ranks must come within 3 s. Rank 1 did not" in rank.said(), rank.said()
    assert not (tmp_path / "run").exists()


def test_a_run_that_trained_nothing_leaves_its_folder_to_the_corrected_command(tmp_path: Path, tiny_plates: Path) -> None:
    run, weights = tmp_path / "run", tmp_path / "weights.pt"
    weights.write_text("none")
    ranks = start_ranks([*TRAIN, f"plates.root={tiny_plates}", f"run_dir={run}", f"training.resume={weights}"], 2, tmp_path)
    assert [rank.wait(100) for rank in ranks] == [3, 3], ranks[0].said()
    assert (run / "plan.json").exists() and not (run / "config.yaml").exists()


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        rank = start_rank([*TRAIN, f"plates.root={tmp_path}", f"run_dir={tmp_path / 'run'}"], 0, 2, port, tmp_path)
        code, said = rank.wait(100), rank.said()
    assert code == 5 and f"rank 0 must open port {port} for the others to meet at. Another program has taken it" in said, said


def test_what_listens_in_rank_0s_place_and_is_no_store_is_told_in_time(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        words = [*TRAIN, f"plates.root={tmp_path}", f"run_dir={tmp_path / 'run'}", "distributed.timeout_s=2"]
        rank = start_rank(words, 1, 2, other.getsockname()[1], tmp_path)
        assert rank.wait(60) == 5 and "does not answer as a rendezvous store does" in rank.said(), rank.said()


def test_a_signal_ends_the_wait_for_ranks_that_do_not_come(tmp_path: Path) -> None:
    rank = start_rank([*TRAIN, f"plates.root={tmp_path}", f"run_dir={tmp_path / 'run'}"], 0, 2, free_port(), tmp_path)
    while "rank 0 of 2 on" not in rank.said():
        time.sleep(0.05)
    time.sleep(1)
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(60) == 75 and "stopped by SIGTERM before the first step" in rank.said(), rank.said()


def test_a_benchmark_that_cannot_write_ends_on_every_rank(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "result.json").touch()
    ranks = start_ranks(["bench", "comm", f"bench.output={folder}"], 2, tmp_path)
    assert [rank.wait(100) for rank in ranks] == [2, 2], ranks[0].said()
    assert "must not hold a result" in ranks[0].said()
