"""`hcsdl bench data`: the whole command on small fields, and its judgement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hcsdl.commands.bench_data import Turn, row_of
from tests import runs


def test_every_compression_has_its_turns(tmp_path: Path) -> None:
    words = ["bench.image_size=[128,160]", "bench.fields=3", "bench.seconds=0.2", "bench.rounds=2"]
    done = runs.run("bench", "data", *words, f"bench.output={tmp_path}")
    rows = {row["compression"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    assert list(rows) == ["none", "deflate", "lzw"]
    assert (
        rows["none"]["field_mb"] == pytest.approx(3 * 128 * 160 * 2 / 1e6, rel=0.05)
        and rows["deflate"]["field_mb"] < 0.9 * rows["none"]["field_mb"]
    )
    assert all(row["fields_per_s_core"] > 0 and row["fields_per_processor_s"] > 0 for row in rows.values())
    assert rows["none"]["target"] is None  # which is for full resolution
    assert "fields/s/core" in done.stdout and "deflate" in done.stdout


@pytest.mark.xeon_only
def test_the_median_is_judged_at_full_resolution() -> None:
    turns = [Turn(60, 1.0, 0.5), Turn(120, 1.0, 2.0), Turn(50, 1.0, 1.0)]
    row = row_of("none", turns, 1, 7.9, [1024, 1280])
    assert (row["fields_per_s_core"], row["target"], row["met"], row["fields_per_processor_s"]) == (60.0, 60.0, True, 60.0)
    assert row_of("none", turns, 2, 7.9, [1024, 1280])["met"] is False
    assert row_of("lzw", turns, 1, 7.9, [1024, 1280])["met"] is None and row_of("none", turns, 1, 7.9, [512, 640])["target"] is None
