"""The four answers, on hand-made scores whose answers are known."""

from __future__ import annotations

import pandas as pd
import pytest

from hcsdl.report.answer import FAILS, QUESTIONS, Evidence, answer_run, answer_scores, rank_compounds
from tests.report.test_curves import make_summary
from tests.report.test_scores import figures, make_table

pytestmark = pytest.mark.xeon_only
# treatment, compound, mechanism, right by NSC, right by NSCB, neighbour, its mechanism, cosine
ROWS = [
    ("a1 1", "a1", "actin", 1, 1, "a2 1", "actin", 0.9),
    ("a2 1", "a2", "actin", 1, 1, "a1 1", "actin", 0.9),
    ("e1 1", "e1", "Eg5", 0, 0, "a1 1", "actin", 0.5),
    ("e1 3", "e1", "Eg5", 0, 0, "a2 1", "actin", 0.8),
    ("e2 1", "e2", "Eg5", 0, 0, "a1 1", "actin", 0.9),
    ("t1 1", "t1", "tubulin", 1, 0, "e1 1", "Eg5", 0.4),
    ("t2 1", "t2", "tubulin", 1, 1, "t1 1", "tubulin", 0.7),
]


def make_evidence(
    rows: list[tuple] = ROWS, p_values: dict[str, float] | None = None, mark: str = "", comparisons: list[dict] | None = None
) -> Evidence:
    """Return evidence whose per-mechanism tables are counted from `rows`."""
    names = ["Treatment", "Compound", "MoA"]
    treatments = pd.DataFrame(
        rows, columns=[*(f"Metadata_{n}" for n in names), "NSC_Hit", "NSCB_Hit", "NSCB_Neighbour", "NSCB_Neighbour_MoA", "NSCB_Cosine"]
    )
    moas = sorted(set(treatments["Metadata_MoA"]))
    per_moa = [
        {"MoA": m, "compounds": mine["Metadata_Compound"].nunique(), "treatments": len(mine), "hits": int(mine["NSCB_Hit"].sum()),
         "recall": mine["NSCB_Hit"].mean()}
        for m, mine in treatments.groupby("Metadata_MoA")
    ]  # fmt: skip
    confusion = pd.crosstab(treatments["Metadata_MoA"], treatments["NSCB_Neighbour_MoA"]).reindex(index=moas, columns=moas, fill_value=0)
    table = make_table(mark=mark) | {"by_moa": {"NSCB": {"per_moa": per_moa, "moas": moas, "confusion": confusion.to_numpy().tolist()}}}
    table["nearest"]["NSCB"] = figures(treatments["NSCB_Hit"].mean(), len(treatments))
    p_values = {t: 0.001 for t in treatments["Metadata_Treatment"]} | (p_values or {})
    replicates = pd.DataFrame({"Metadata_Treatment": list(p_values), "corrected_p_value": list(p_values.values())})
    return Evidence(table, treatments, replicates, comparisons or [], [])


def test_answers_of_a_screen_with_one_mechanism_failing():
    fails, batch, sure, following = answer_scores(make_evidence())
    assert [a.question for a in (fails, batch, sure, following)] == list(QUESTIONS)
    assert fails.answer == "Eg5 (0 of 3 treatments right)." and "Eg5 lie nearest to actin (3 times)" in fails.evidence
    assert (
        batch.answer.startswith("Mostly biology")
        and "of 4 treatments that are not always right, 3 look like another mechanism" in batch.answer
    )
    assert "43%" in sure.answer and "One training run" in sure.evidence
    assert following.answer.startswith("e1 (Eg5): 2 of its 2 treatments are taken for actin, and its wells agree")
    assert "a2 1 (cosine 0.80)" in following.evidence


def test_errors_that_go_with_the_batch_are_called_batch():
    rows = [(t, c, m, 1, int(m == "actin"), n, o, s) for t, c, m, _, _, n, o, s in ROWS]
    answer = answer_scores(make_evidence(rows))[1]
    assert answer.answer.startswith("Mostly batch: of 5 treatments that are not always right, 5 ")
    assert "changes the share right by -0.71" in answer.evidence


def test_treatments_without_an_effect_are_neither():
    weak = {"e1 1": 0.9, "e1 3": 0.9, "e2 1": 0.9}
    answers = answer_scores(make_evidence(p_values=weak))
    assert answers[1].answer.startswith("Neither: of 4 treatments that are not always right, 3 show no effect")
    assert "do not stand out from the controls" in answer_scores(make_evidence(ROWS[:5], p_values=weak))[3].answer


def test_nothing_wrong_is_said_so():
    rows = [(t, c, m, 1, 1, n, m, s) for t, c, m, _, _, n, _, s in ROWS]
    fails, batch, _, following = answer_scores(make_evidence(rows))
    assert fails.answer.startswith("None") and batch.answer.startswith("Neither: nothing is wrong")
    assert following.answer == "No compound is misread. t1 is least like what it is rightly nearest to (e1 1, cosine 0.40)."


def test_sure_means_an_interval_clear_of_the_hardest_baseline():
    pair = {"rule": "NSCB", "first": "network", "p_value": 0.01}
    easy, hard = (
        {"second": "baseline: cell count", "value": 0.5, "low": 0.3, "high": 0.7},
        {"second": "baseline: intensity", "value": 0.1, "low": -0.1, "high": 0.3},
    )
    unsure = answer_scores(make_evidence(comparisons=[pair | easy, pair | hard]))[2]
    assert "not sure" in unsure.answer and "Against intensity: +0.10" in unsure.evidence
    assert "Better than simple features: yes" in answer_scores(make_evidence(comparisons=[pair | easy]))[2].answer


def test_leak_stands_before_the_figure():
    assert answer_scores(make_evidence(mark="LEAKY"))[2].answer.startswith("LEAKY. ")
    assert answer_scores(make_evidence(mark="leak unknown"))[2].answer.startswith("Leak unknown. ")


def test_compounds_are_ranked_wrong_first_then_by_agreement():
    ranked = rank_compounds(make_evidence(p_values={"e1 1": 0.9, "e1 3": 0.9}))
    assert list(ranked["compound"][:3]) == ["e2", "t1", "e1"]
    assert list(ranked["wrong"])[-3:] == [0, 0, 0] and ranked.set_index("compound").loc["e1", "agrees"] == 0 < FAILS


def test_run_alone_answers_what_it_can_and_names_the_command_for_the_rest():
    summary = make_summary(confusion_wells=[[1, 4], [0, 5]], well_accuracy=0.6, leaky=True, split="random_field")
    fails, batch, sure, following = answer_run(summary)
    assert fails.answer == "a." and "a are taken for b most often (4 wells)" in fails.evidence
    assert sure.answer.startswith("Sister fields of one well") and "60% (95 % 31% … 83%" in sure.answer
    assert "`hcsdl embed`" in batch.answer and "`hcsdl score`" in following.answer
    assert answer_run(make_summary(confusion_wells=[[5, 0], [0, 5]]))[0].answer == "None: all 10 held-out wells are right."
