"""Splits: what is held out, that it never depends on the order of the rows, and why a split cannot be made."""

import numpy as np
import pandas as pd
import pytest

from hcsdl.config import SPLITS, ConfigError, DataError, PlatesConfig
from hcsdl.plates.index import read_index
from hcsdl.plates.splits import LEAKY, count_folds, describe, split_fields, target_column, target_labels
from tests.plates.screens import REAL_CSV, write_screen

pytestmark = pytest.mark.xeon_only
WELL = ["Metadata_Plate", "Metadata_Well"]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    """Six plates in three batches, each with 4 wells of the control and 3 of every MoA: one well of each of three compounds."""
    root = tmp_path_factory.mktemp("screen")
    write_screen(root, plates=6, wells=13, sites=4, moas=3, compounds_per_moa=3, control_wells=4, images=False)
    return read_index(PlatesConfig(root=str(root)), files=False).table


def split(table: pd.DataFrame, kind: str, target: str = "MoA", val_fraction: float = 0.2, **options: int) -> pd.Series:
    return split_fields(table, kind=kind, target=target, val_fraction=val_fraction, **options)


@pytest.mark.parametrize("kind", SPLITS)
def test_reproducible_and_independent_of_order(table, kind):
    """The seed alone decides; shuffled rows get the same parts, under their own labels."""
    first = split(table, kind, seed=3)
    shuffled = table.sample(frac=1, random_state=1)
    pd.testing.assert_series_equal(first, split(shuffled, kind, seed=3).sort_index())
    assert set(first) == {"train", "val"} and first.index.equals(table.index)


@pytest.mark.parametrize("kind", [kind for kind in SPLITS if kind != "compound_folds"])
def test_seed_matters(table, kind):
    assert len({tuple(split(table, kind, seed=seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize("kind", SPLITS)
def test_wells_stay_together_unless_leaky(table, kind):
    parted = split(table, kind).groupby([table[name] for name in WELL]).nunique().gt(1).any()
    assert parted == (kind in LEAKY)
    assert ("leaky" in describe(kind)) == (kind in LEAKY) and describe(kind).startswith(f"{kind}:")


def test_wells_are_held_out_class_by_class(table):
    """Each MoA has 18 wells, the control 24: a sixth are 3 and 4 of them."""
    wells = table.drop_duplicates(WELL)
    held_out = wells[split(table, "random_well", val_fraction=1 / 6).loc[wells.index] == "val"]
    assert held_out["Metadata_MoA"].value_counts().to_dict() == {"DMSO": 4, "moa 0": 3, "moa 1": 3, "moa 2": 3}


def test_rare_classes(table):
    """A class of two wells has one on either side, a class of one well trains."""
    wells = table.drop_duplicates(WELL)[WELL].head(3).apply(tuple, axis=1).tolist()
    labels = pd.Series("many", index=table.index)
    for well, label in zip(wells, ["two", "two", "one"], strict=True):
        labels[table[WELL].apply(tuple, axis=1) == well] = label
    parts = split(table.assign(Metadata_Rare=labels), "random_well", target="Rare", val_fraction=0.05)
    assert parts[labels == "two"].value_counts().to_dict() == {"train": 4, "val": 4}
    assert set(parts[labels == "one"]) == {"train"}


@pytest.mark.parametrize(("kind", "fraction", "count"), [("plate", 0.2, 1), ("plate", 0.5, 3), ("plate", 0.9, 5), ("batch", 0.01, 1)])
def test_whole_plates_and_batches(table, kind, fraction, count):
    column = f"Metadata_{kind.title()}"
    parts = split(table, kind, val_fraction=fraction)
    assert table.loc[parts == "val", column].nunique() == count
    assert not set(table.loc[parts == "val", column]) & set(table.loc[parts == "train", column])


def test_plates_that_training_needs_are_kept(table):
    """A class on one plate only: that plate trains, whatever the seed; a class on every plate's own is explained."""
    rare = table["Metadata_MoA"].where((table["Metadata_MoA"] != "moa 2") | (table["Metadata_Plate"] == "Week1_20000"), None)
    for seed in range(10):
        assert set(split(table.assign(Metadata_MoA=rare), "plate", seed=seed)[table["Metadata_Plate"] == "Week1_20000"]) == {"train"}
    with pytest.raises(DataError, match=r"plates.split=plate must leave every class in train. .* 6 of 6 classes occur in one only"):
        split(table, "plate", target="Plate")


def test_unlabelled_fields_are_not_used(table):
    bare = table["Metadata_Compound"] == "compound 0b"
    changed = table.assign(Metadata_MoA=table["Metadata_MoA"].where(~bare, None))
    parts = split(changed, "random_well")
    assert all(part is None for part in parts[bare]) and set(parts[~bare]) == {"train", "val"}
    named = table.assign(Metadata_Compound=table["Metadata_Compound"].where(~bare, "UNKNOWN"))
    assert all(part is None for part in split(named, "random_well", target="compound")[bare])


def test_compound_folds(table):
    """Fold k holds out the k-th compound of every MoA; the control trains."""
    assert count_folds(table) == 3
    for fold, letter in enumerate("abc"):
        parts = split(table, "compound_folds", fold=fold)
        assert set(table.loc[parts == "val", "Metadata_Compound"]) == {f"compound {moa}{letter}" for moa in range(3)}
        assert set(parts[table["Metadata_Compound"] == "DMSO"]) == {"train"}


@pytest.mark.skipif(not REAL_CSV.is_dir(), reason="BBBC021's CSV files are not beside this checkout")
def test_compound_folds_of_bbbc021():
    """Four folds hold out 12, 12, 10 and 4 compounds, each of the 38 once, and every MoA can be trained in each."""
    table = read_index(PlatesConfig(root=str(REAL_CSV)), files=False).table
    held_out = []
    for fold in range(4):
        parts = split(table, "compound_folds", fold=fold)
        held_out.append(set(table.loc[parts == "val", "Metadata_Compound"]))
        assert table.loc[parts == "train", "Metadata_MoA"].nunique() == 13
        assert not held_out[-1] & set(table.loc[parts == "train", "Metadata_Compound"])
    assert [len(compounds) for compounds in held_out] == [12, 12, 10, 4] and len(set.union(*held_out)) == 38
    with pytest.raises(ConfigError, match="plates.fold must be 0 to 3"):
        split(table, "compound_folds", fold=4)
    with pytest.raises(DataError, match="108 of 112 classes occur in one only"):
        split(table, "batch", target="compound")


@pytest.mark.parametrize(
    ("options", "change", "error", "sentence"),
    [
        ({"kind": "compound_folds", "fold": 3}, {}, ConfigError, "plates.fold must be 0 to 2, .* Got 3"),
        (
            {"kind": "compound_folds", "target": "Compound"},
            {},
            ConfigError,
            "compound_folds must have a target that several compounds share",
        ),
        (
            {"kind": "compound_folds", "target": "Treatment"},
            {},
            ConfigError,
            "compound_folds must have a target that several compounds share",
        ),
        ({"kind": "compound_folds", "target": "Batch"}, {"Metadata_MoA": None}, DataError, "must know mechanisms of action"),
        ({"kind": "compound_folds"}, {"Metadata_Compound": "one"}, DataError, "must have two compounds of every .* 3 of 3 have one"),
        ({"kind": "plate"}, {"Metadata_Plate": "A"}, DataError, "at least two plates to part. There is one, 'A'"),
        ({"kind": "batch"}, {"Metadata_Batch": "A"}, DataError, "at least two batches to part. There is one, 'A'"),
        ({"kind": "random_well"}, {"Metadata_MoA": None}, DataError, "training.target=MoA must be known for some fields. None of 312"),
        ({"kind": "random_well"}, {"Metadata_MoA": "x"}, DataError, "must have at least two classes. All 312 labelled fields are 'x'"),
        ({"kind": "random_well", "target": "Dose"}, {}, ConfigError, "training.target must be one of Plate, .* Got 'Dose'"),
        ({"kind": "random"}, {}, ConfigError, "plates.split must be one of"),
    ],
)
def test_impossible_requests(table, options, change, error, sentence):
    with pytest.raises(error, match=sentence):
        split(table.assign(**change), **options)


def test_empty_val_is_explained(table):
    """One well of each class: nothing can be held out."""
    few = table[table["Metadata_Plate"] == "Week1_20000"].drop_duplicates("Metadata_MoA")
    with pytest.raises(DataError, match="val is empty, for each of the 4 classes of training.target=MoA has too few wells"):
        split(few, "random_well")


def test_held_out_class_that_training_lacks(table):
    """A class whose compounds are all held out, next to others that are not."""
    labels = np.where(table["Metadata_Compound"].str.endswith("a"), "new", table["Metadata_MoA"])
    with pytest.raises(DataError, match="1 classes of training.target=Class are in val alone .new."):
        split(table.assign(Metadata_Class=labels), "compound_folds", target="Class", fold=0)


def test_target_names(table):
    assert {target_column(table, name) for name in ("MoA", "moa", "Metadata_MoA")} == {"Metadata_MoA"}
    assert set(target_labels(table, "site")) == {"1", "2", "3", "4"}
