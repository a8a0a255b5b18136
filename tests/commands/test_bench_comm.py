"""`hcsdl bench comm` on real ranks: what it saves, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hcsdl.commands.bench_comm import calls_per_round, format_rows, summarise
from hcsdl.commands.compose import compose_command
from hcsdl.config import ConfigError
from hcsdl.distributed.group import Group
from tests import runs
from tests.distributed.ranks import on_ranks
from tests.forked import start_ranks

TINY = ["machine.threads_per_rank=1", "distributed.timeout_s=60", "bench.rounds=2"]
KEY = ("all_reduce", "fp32", 10**6)


def test_table_json_and_picture(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = [*TINY, "bench.sizes_kib=[1,300]", "bench.operations=[all_reduce,broadcast,all_gather]", "bench.backends=[gloo]"]
    ranks = start_ranks(["bench", "comm", *words, f"bench.output={folder}"], 2, tmp_path)
    assert [rank.wait(200) for rank in ranks] == [0, 0], ranks[0].said()
    result = json.loads((folder / "result.json").read_text())
    assert (result["schema_version"], result["command"], result["world_size"], result["hosts"]) == (1, "hcsdl bench comm", 2, 1)
    assert (
        result["versions"]["torch"] and result["processor"] and result["date"].startswith("20") and result["config"]["bench"]["rounds"] == 2
    )
    rows = result["rows"]
    assert {(r["operation"], r["dtype"], r["num_bytes"]) for r in rows} == {
        (operation, dtype, kib * 1024) for operation in ("all_reduce", "broadcast", "all_gather") for dtype in ("fp32", "bf16") for kib in (1, 300)
    }  # fmt: skip
    for row in rows:
        assert row["calls"] == 2 * calls_per_round(row["num_bytes"]) and 0 < row["q1_s"] <= row["median_s"] <= row["q3_s"]
        factor = 0.5 if row["operation"] == "all_gather" else 1.0
        assert row["bus_gb_per_s"] == pytest.approx(factor * row["num_bytes"] / row["median_s"] / 1e9)
    assert len([line for line in ranks[0].said().splitlines() if line.startswith(("all_", "broadcast")) and "KiB" in line]) == len(rows)
    assert Image.open(folder / "communication.png").convert("L").getextrema() == (0, 255)
    again = runs.run("bench", "comm", *TINY, "distributed.ranks=2", f"bench.output={folder}", code=2)
    assert "must not hold a result" in again.stderr


def test_one_rank_has_nobody_to_talk_to(tmp_path: Path) -> None:
    done = runs.run("bench", "comm", "distributed.ranks=1", f"bench.output={tmp_path / 'out'}", code=2)
    assert done.stderr.startswith("hcsdl: hcsdl bench comm needs at least 2 ranks. Got 1")
    assert not (tmp_path / "out").exists()


def test_something_must_be_measured() -> None:
    with pytest.raises(ConfigError, match="bench.sizes_kib must not be empty"):
        compose_command("bench comm", ["bench.sizes_kib=[]"])


def wrong_sum(group: Group) -> None:
    from hcsdl.commands.bench_comm import Collective

    Collective("all_reduce", "bf16", 64, group.world_size).check(None)
    Collective("all_gather", "fp32", 64, group.world_size).check(None)
    Collective("all_reduce", "fp32", 64, group.world_size + 1).check(None)


def test_a_wrong_result_is_found() -> None:
    for said in on_ranks(wrong_sum, 2):
        assert said["error"] == "ArithmeticError" and "all_reduce of ones over 3 ranks must give 3" in said["text"]


def test_rows_are_medians_of_the_mean_over_the_ranks() -> None:
    times = [
        {(*KEY, "gloo"): [1.0, 2.0, 9.0], (*KEY, "ccl"): [1.0, 1.0, 1.0]},
        {(*KEY, "gloo"): [3.0, 2.0, 9.0], (*KEY, "ccl"): [0.0, 0.0, 0.0]},
    ]
    gloo, ccl = summarise(times, 2)
    assert (gloo["q1_s"], gloo["median_s"], gloo["q3_s"], gloo["time_to_gloo"]) == (2.0, 2.0, 5.5, 1.0)
    assert (ccl["median_s"], ccl["time_to_gloo"]) == (0.5, 0.25)
    assert ccl["bus_gb_per_s"] == pytest.approx(10**6 / 0.5 / 1e9)
    table = format_rows([gloo, ccl], {"other": "It is not there."})
    assert "ccl/gloo" in table.splitlines()[0] and table.splitlines()[1].endswith("0.25") and "other: missing. It is not there." in table
