"""Several runs: what differs stands in the table, what is leaky or unfinished is said."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from hcsdl.report.comparison import as_text, comparison_picture, comparison_table, differing_settings
from hcsdl.report.records import RunRecord, distinct_names
from tests.report.test_classes import texts
from tests.report.test_curves import make_summary

pytestmark = pytest.mark.xeon_only


def make_run(name: str, learning_rate: float = 0.1, split: str = "plate", **summary: object) -> RunRecord:
    config = {
        "seed": 0,
        "name": name,
        "run_dir": name,
        "plates": {"root": "plates", "split": split},
        "training": {"learning_rate": learning_rate},
    }
    found = make_summary(split=split, **summary) if summary else None
    return RunRecord(Path(name), name, config, {}, found, [], pd.DataFrame())


@pytest.fixture
def runs() -> list[RunRecord]:
    return [
        make_run("going"),
        make_run("good", 0.2, well_accuracy=0.9),
        make_run("leaky", 0.1, "random_field", leaky=True, well_accuracy=1.0),
    ]


def test_table_has_what_differs_best_first(runs):
    assert differing_settings(runs) == ["name", "plates.split", "training.learning_rate"]
    table = comparison_table(runs)
    assert list(table["run"]) == ["leaky", "good", "going"] and list(table["training.learning_rate"]) == [0.1, 0.2, 0.1]
    cells = as_text(table)
    assert cells[0][table.columns.get_loc("split")] == "random_field [LEAKY]"
    assert cells[1][table.columns.get_loc("well accuracy")] == "0.900" and cells[2][table.columns.get_loc("well accuracy")] == "–"


def test_runs_that_hold_out_differently_are_not_to_be_ranked(runs):
    picture = comparison_picture(runs)
    assert "should not be ranked" in picture.reading and "leaky  [LEAKY]" in texts(picture) and "going" not in texts(picture)
    alike = comparison_picture([make_run("a", well_accuracy=0.5), make_run("b", well_accuracy=0.7)])
    assert alike.title == "b is best with 70% of held-out wells, a last with 50%" and "ranked" not in alike.reading
    below = comparison_picture([make_run("a", well_accuracy=0.1), make_run("b", well_accuracy=0.7)])
    assert below.title.endswith("a last with 10%; BELOW their baselines: a")
    assert comparison_picture([make_run("going"), make_run("a", well_accuracy=0.5)]).title == "Only a is finished"
    assert comparison_picture([make_run("a", well_accuracy=0.5), make_run("b", well_accuracy=0.5)]).title.startswith("All 2 runs get 50%")


def test_runs_of_one_folder_name_are_told_apart():
    assert distinct_names([Path("sweep/0/run"), Path("sweep/1/run")]) == ["0/run", "1/run"]
    assert distinct_names([Path("runs/a"), Path("runs/b")]) == ["a", "b"] and distinct_names([]) == []
