"""Scores as pictures: the stricter rule leads, baselines stand beside, a leak is named wherever its score stands."""

from __future__ import annotations

import pytest

from hcsdl.report.scores import difference_picture, headline_rule, ladder_picture, score_rows, scores_picture
from tests.report.test_classes import texts

pytestmark = pytest.mark.xeon_only


def figures(accuracy: float, treatments: int = 20) -> dict:
    return {
        "accuracy": accuracy,
        "low": accuracy - 0.1,
        "high": min(1, accuracy + 0.1),
        "treatments": treatments,
        "compounds": 9,
        "dropped": [],
    }


def make_table(name: str = "network", mark: str = "", **nearest: float) -> dict:
    """Return one of scores.json's tables with scores by rule, two baselines and a ladder."""
    nearest = nearest or {"NSC": 0.8, "NSCB": 0.6}
    ladder = [
        {"pipeline": "none", "chosen": False, "NSC": 0.5, "NSCB": 0.3, "plate_effect": 0.6, "batch_effect": 0.5},
        {"pipeline": "standardise_control", "chosen": True, **nearest, "plate_effect": 0.2, "batch_effect": 0.1},
        {"pipeline": "combat", "chosen": False, "problem": "impossible"},
    ]
    return {
        "name": name,
        "leak": {"mark": mark, "sentence": "Whether it leaks."},
        "nearest": {rule: figures(value) for rule, value in nearest.items()},
        "baselines": {"cell count": {rule: figures(0.2) for rule in nearest}, "intensity": {rule: figures(0.4) for rule in nearest}},
        "ladder": ladder,
    }


def test_title_is_of_the_stricter_rule_and_against_the_best_baseline():
    picture = scores_picture([make_table(), make_table("second", "LEAKY", NSC=0.95, NSCB=0.9)])
    assert picture.title == "NSCB 0.60 (95 % 0.50 … 0.70), 0.20 above the best baseline (intensity)"
    shown = texts(picture)
    assert shown.count("second  [LEAKY]") == 2 and shown.count("network") == 2 and shown.count("baseline: cell count") == 2
    assert "hollow" in picture.reading and "hollow" not in scores_picture([make_table()]).reading


def test_leak_of_the_first_table_stands_in_every_title():
    table = make_table(mark="LEAKY")
    comparison = {
        "rule": "NSC",
        "first": "network",
        "second": "baseline: intensity",
        "value": 0.1,
        "low": 0.01,
        "high": 0.2,
        "p_value": 0.01,
    }
    for picture in (
        scores_picture([table]),
        ladder_picture(table),
        difference_picture([comparison | {"first_leak": "LEAKY", "second_leak": ""}]),
    ):
        assert picture.title.endswith("— LEAKY")


def test_leak_of_the_other_table_stands_in_its_row_and_the_title_does_not_count_it():
    one = {"rule": "NSC", "first": "network", "value": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.01, "first_leak": ""}
    fair, leaky = (
        one | {"second": "baseline: intensity", "second_leak": ""},
        one | {"second": "other", "low": -0.1, "second_leak": "LEAKY"},
    )
    picture = difference_picture([leaky, fair])
    assert {"NSC: against other  [LEAKY]", "NSC: against intensity"} <= set(texts(picture))
    assert picture.title == "network is surely better in 1 of 1 comparisons, those with leaky scores apart"
    assert "apart" not in difference_picture([fair]).title


def test_rule_without_any_scored_treatment_is_left_out():
    table = make_table()
    table["nearest"]["NSCB"] = figures(float("nan"), treatments=0) | {"accuracy": None, "low": None, "high": None}
    assert headline_rule(table) == "NSC" and score_rows([table], "NSCB") == []
    assert len(scores_picture([table]).figure.axes) == 1
    assert headline_rule({"name": "no mechanisms"}) is None


def test_worse_than_a_baseline_is_said_loudly():
    assert "0.10 BELOW the best baseline" in scores_picture([make_table(NSC=0.3)]).title


def test_ladder_says_what_the_chosen_rung_does_and_leaves_out_the_impossible():
    picture = ladder_picture(make_table())
    assert picture.title == "Standardising on the controls lifts NSCB from 0.30 to 0.60 and takes the batch effect from 0.50 to 0.10"
    assert [t.get_text() for t in picture.figure.axes[0].get_yticklabels()] == ["as they are", "standardised, DMSO  ◄"]


def test_differences_count_only_intervals_clear_of_zero():
    rows = [("a", 0.2, 0.1, 0.3), ("b", 0.1, -0.1, 0.3), ("c", -0.2, -0.3, -0.1)]
    comparisons = [
        {
            "rule": "NSCB",
            "first": "network",
            "second": name,
            "value": v,
            "low": low,
            "high": high,
            "p_value": 0.1,
            "first_leak": "",
            "second_leak": "",
        }
        for name, v, low, high in rows
    ]
    assert difference_picture(comparisons).title == "network is surely better in 1 of 3 comparisons"
