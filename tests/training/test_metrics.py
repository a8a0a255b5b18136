"""Scores are scikit-learn's, wells are the mean of their sites, and the text names the split."""

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from hcsdl.config import DataError
from hcsdl.training.metrics import format_scores, score_fields, score_wells

CLASSES = ["Actin disruptors", "DMSO", "Eg5 inhibitors", "Epithelial", "Aurora"]


def drawn(seed=0, count=60, classes=5, label_classes=5):
    """Return noisy logits that know their labels somewhat, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, label_classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, classes)
    return logits, labels


@pytest.mark.parametrize("label_classes", [5, 3])
def test_same_as_scikit_learn(label_classes):
    """All figures, with every class among the labels and with two that occur only among the predictions."""
    logits, labels = drawn(label_classes=label_classes)
    scores = score_fields(logits, labels, CLASSES)
    truth, predicted, present = labels.numpy(), logits.argmax(1).numpy(), np.arange(label_classes)
    assert set(predicted) - set(present) if label_classes == 3 else set(predicted) == set(present)
    assert scores.accuracy == pytest.approx(reference.accuracy_score(truth, predicted))
    assert scores.macro_f1 == pytest.approx(reference.f1_score(truth, predicted, labels=np.unique(truth), average="macro"))
    assert np.array_equal(scores.confusion, reference.confusion_matrix(truth, predicted, labels=np.arange(5)))
    precision, recall, f1, support = reference.precision_recall_fscore_support(truth, predicted, labels=present, zero_division=0)
    table = scores.per_class
    assert list(table.columns) == ["class", "fields", "precision", "recall", "f1"] and list(table["class"]) == CLASSES
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1), ("fields", support)):
        assert table[name][:label_classes].to_numpy(dtype=float) == pytest.approx(expected), name
    assert table[["precision", "recall", "f1"]][label_classes:].isna().all(axis=None)


def test_unseen_classes_do_not_distort_macro_f1():
    """Adding classes that nothing has and nothing is taken for changes neither figure; nor does a perfect result fall below 1."""
    logits, labels = drawn(label_classes=3, classes=3)
    wide = torch.cat([logits, torch.full((60, 2), -100.0)], dim=1)
    assert score_fields(wide, labels, CLASSES).macro_f1 == pytest.approx(score_fields(logits, labels, CLASSES[:3]).macro_f1)
    perfect = torch.nn.functional.one_hot(labels, 5).float()
    assert score_fields(perfect, labels, CLASSES).macro_f1 == 1.0


def test_a_class_never_predicted_counts_as_zero():
    """A class among the labels that is never predicted pulls macro-F1 down."""
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[1.0, 0.0]] * 4)
    scores = score_fields(logits, labels, ["a", "b"])
    assert scores.accuracy == 0.5
    assert scores.macro_f1 == pytest.approx(1 / 3)
    assert scores.per_class.loc[1, ["precision", "recall", "f1"]].tolist() == [0.0, 0.0, 0.0]


def test_a_well_is_the_mean_of_its_sites():
    """One sure site outvotes two unsure ones; the order of fields does not matter; wells with one name on two plates are two."""
    logits = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 4.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    wells = [("P1", "B02"), ("P1", "B02"), ("P1", "B02"), ("P2", "B02"), ("P2", "B02"), ("P2", "B03")]
    scores = score_wells(logits, labels, wells, ["a", "b"])
    assert scores.unit == "wells" and scores.accuracy == 1.0
    assert scores.per_class["wells"].tolist() == [2, 1]
    assert score_fields(logits, labels, ["a", "b"]).accuracy == 0.5
    order = [4, 2, 0, 5, 3, 1]
    again = score_wells(logits[order], labels[order], [wells[place] for place in order], ["a", "b"])
    assert np.array_equal(again.confusion, scores.confusion) and again.confusion.sum() == 3


def test_wells_against_a_plain_loop():
    """Many wells of unequal numbers of sites, bf16 logits, against numpy."""
    logits, _ = drawn(count=90)
    wells = np.array([f"P{number % 4}_W{number % 7}" for number in range(90)])
    well_label = {well: place % 5 for place, well in enumerate(sorted(set(wells)))}
    labels = torch.tensor([well_label[well] for well in wells])
    logits = logits.bfloat16()
    right = [logits.float().numpy()[wells == well].mean(axis=0).argmax() == label for well, label in well_label.items()]
    assert 0 < sum(right) < len(right)
    assert score_wells(logits, labels, wells, CLASSES).accuracy == pytest.approx(np.mean(right))


def test_bad_input():
    """Nothing to score, a well with two labels and a missing well are errors that say so."""
    with pytest.raises(DataError, match="at least one of the fields. Got none"):
        score_fields(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), CLASSES)
    logits, labels = torch.zeros(3, 5), torch.tensor([0, 0, 1])
    with pytest.raises(DataError, match="must have one label. Well P1/B02 has several"):
        score_wells(logits, labels, ["P1/B01", "P1/B02", "P1/B02"], CLASSES)
    with pytest.raises(DataError, match="Got 2 wells for 3 fields"):
        score_wells(logits, labels, ["P1/B01", "P1/B02"], CLASSES)


def test_text_names_split_and_figures_in_one_line():
    """The first line has split, leak, baseline and figures; then a row per class with its counts."""
    logits, labels = drawn(label_classes=4)
    scores = score_fields(logits, labels, CLASSES)
    text = format_scores(scores, "random_field", leaky=True, baseline=0.1234)
    line, _, *rows = text.splitlines()
    for part in ("fields", "random_field (leaky", f"{scores.accuracy:.3f}", f"{scores.macro_f1:.3f}", "baseline 0.123", "60 fields"):
        assert part in line, part
    assert len(rows) == 5
    assert rows[0].split()[-5:] == [str(count) for count in scores.confusion[0]]
    assert " - " in rows[4] and "nan" not in text.lower()
    plain = format_scores(scores, "plate").splitlines()[0]
    assert "plate" in plain and "leaky" not in plain and "baseline" not in plain


def test_text_of_many_classes():
    """With more classes than fit a screen the most frequent confusions are listed."""
    labels = torch.arange(40).repeat(3)
    given = labels.clone()
    given[[5, 45, 85]] = 6
    logits = torch.nn.functional.one_hot(given, 40).float()
    text = format_scores(score_fields(logits, labels, [f"compound{number}" for number in range(40)]), "plate")
    assert text.splitlines()[-1] == "3 × compound5 taken for compound6"
    assert max(map(len, text.splitlines())) < 120
