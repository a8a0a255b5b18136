"""Which classes fail: intervals, confusions, and whether errors follow the batch, against hand-made cases."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from scipy.stats import binomtest

from hcsdl.report.classes import confusion_picture, largest_confusion, outcome_picture, outcomes, recall_picture, telling_replicates, wilson
from hcsdl.report.picture import Picture

pytestmark = pytest.mark.xeon_only


def texts(picture: Picture) -> list[str]:
    """Return every text of a picture that shows: ticks, labels, legends, numbers."""
    return [t.get_text() for t in picture.figure.findobj(Text) if t.get_text() and t.get_visible()]


def test_interval_is_scipys():
    for hits, total in ((0, 5), (3, 7), (20, 20), (50, 103)):
        expected = binomtest(hits, total).proportion_ci(method="wilson")
        assert np.allclose(wilson(hits, total), (expected.low, expected.high), atol=1e-6)
    assert np.isnan(wilson(0, 0)).all()


def test_confusion_names_the_pair_most_confused_and_shows_every_count():
    counts = np.array([[7, 0, 1], [4, 2, 0], [0, 0, 5]])
    classes = ["actin", "tubulin", "DMSO"]
    assert largest_confusion(counts, classes) == ("tubulin", "actin", 4) and largest_confusion(np.diag([3, 2]), ["a", "b"]) is None
    picture = confusion_picture(counts, classes, unit="wells")
    assert picture.title == "tubulin are most often taken for actin (4 of 6 wells); 14 of 19 are right"
    assert {"7", "1", "4", "2", "5", "actin (8)", "DMSO (5)", "predicted"} <= set(texts(picture))
    assert confusion_picture(np.diag([3, 2]), ["a", "b"], unit="wells").title == "All 5 wells are recognised"


def test_many_classes_are_listed_by_their_confusions():
    counts = 3 * np.eye(40, dtype=int)
    counts[5, 7], counts[1, 0] = 9, 2
    shown = texts(confusion_picture(counts, [f"t{i}" for i in range(40)], unit="wells"))
    assert shown.index("t5 → t7") < shown.index("t1 → t0") and not any(t.startswith("t3 →") for t in shown)


def test_recall_puts_the_worst_on_top_by_the_strictest_rule_that_scores_it():
    table = pd.DataFrame({"class": ["a", "b", "c", "d"], "hits": [4, 1, 0, 0], "total": [4, 5, 0, 0]})
    picture = recall_picture({"NSC": table.assign(hits=[4, 5, 0, 0], total=[4, 5, 3, 0]), "NSCB": table}, unit="treatments", mark="LEAKY")
    assert picture.title == "c: recognised least, 0 of 3 treatments; 1 of 3 classes are always right"
    assert [t.get_text() for t in picture.figure.axes[0].get_yticklabels()] == ["c (0/3 by NSC)", "b (1/5)", "a (4/4)", "d (not scored)"]
    assert any("[LEAKY]" in text for text in texts(picture))


@pytest.fixture
def treatments() -> pd.DataFrame:
    """Six treatments: right by both rules; by NSC alone; by NSCB alone; by none, twice, one of them without an effect; not scored by NSCB."""
    hits = [(1, 1), (1, 0), (0, 1), (0, 0), (0, 0), (1, np.nan)]
    table = pd.DataFrame(hits, columns=["NSC_Hit", "NSCB_Hit"])
    return table.assign(
        Metadata_Treatment=[f"t{i}" for i in range(6)],
        Metadata_Compound=[f"c{i}" for i in range(6)],
        Metadata_MoA=["a", "a", "b", "b", "b", "a"],
    )


def test_outcomes_part_batch_from_biology(treatments):
    replicates = pd.DataFrame(
        {"Metadata_Treatment": [f"t{i}" for i in range(6)], "corrected_p_value": [0.001, 0.2, 0.001, 0.001, 0.2, 0.2]}
    )
    found = outcomes(treatments, replicates)
    assert dict(zip(found["Metadata_Treatment"], found["Outcome"], strict=True)) == {
        "t0": "right", "t1": "batch", "t2": "batch", "t3": "other", "t4": "no effect",
    }  # fmt: skip
    assert list(outcomes(treatments, pd.DataFrame())["Outcome"]).count("other") == 2
    assert outcomes(treatments.drop(columns="NSCB_Hit"), replicates).empty
    picture = outcome_picture(found)
    assert picture.title == "2 of 4 treatments that are not always right depend on the batch"
    assert [t.get_text() for t in picture.figure.axes[0].get_yticklabels()] == ["b", "a"]


def test_replicates_that_do_not_even_find_the_right_treatments_tell_nothing(treatments):
    found = pd.DataFrame({"Metadata_Treatment": ["t0", "t1", "t3", "t5"], "corrected_p_value": [0.01, 0.01, 0.9, 0.9]})
    assert len(telling_replicates(treatments, found)) == 4
    assert telling_replicates(treatments, found.assign(corrected_p_value=[0.01, 0.9, 0.01, 0.9])).empty


def test_no_error_is_said_to_be_none(treatments):
    right = treatments.assign(NSC_Hit=1.0, NSCB_Hit=1.0)
    assert outcome_picture(outcomes(right, pd.DataFrame())).title.startswith("No error to explain: all 6 treatments")
