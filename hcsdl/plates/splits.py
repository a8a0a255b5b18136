"""Index table → which fields train and which are held out.

In: the table, the kind of split, the metadata column to learn. Out: "train", "val" or None (not used) for every field.
Promised: reproducible from a seed and independent of the order of the rows; the sites of a well stay together in every kind but
`random_field`; every held-out class is one that training sees; what cannot be is a `DataError` or `ConfigError` that says why.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hcsdl.config import SPLITS, ConfigError, DataError
from hcsdl.plates.tables import CONTROL_MOA, KEYS, UNKNOWN

LEAKY = {"random_field"}
UNITS = {"random_field": KEYS, "random_well": KEYS[:2], "plate": ["Metadata_Plate"], "batch": ["Metadata_Batch"]}
DRAWS = 1000  # whole plates or batches are drawn anew until training keeps every class; a guess
ONE_PER_COMPOUND = ("Metadata_Compound", "Metadata_Treatment", "Metadata_SMILES")  # held-out compounds are held-out classes of these


def describe(kind: str) -> str:
    """Return one sentence on what a split tests."""
    return {
        "random_field": "random_field: fields held out at random; leaky, for sister fields of one well are on both sides.",
        "random_well": "random_well: whole wells held out at random, of every class; other wells of the same plates and treatments train.",
        "plate": "plate: whole plates held out; other plates of the same batches train.",
        "batch": "batch: whole batches of plates held out.",
        "compound_folds": "compound_folds: whole compounds held out, one of every mechanism of action that has one left for this fold.",
    }[kind]


def target_column(table: pd.DataFrame, target: str) -> str:
    """Return the table's column for `training.target`: "MoA", "moa" and "Metadata_MoA" are all `Metadata_MoA`.

    Raises
    ------
    ConfigError : there is no such column.
    """
    columns = [column for column in table if column.startswith("Metadata_")]
    wanted = f"metadata_{target.lower().removeprefix('metadata_')}"
    for column in columns:
        if column.lower() == wanted:
            return column
    raise ConfigError(
        f"training.target must be one of {', '.join(column.removeprefix('Metadata_') for column in columns)}. Got {target!r} instead."
    )


def target_labels(table: pd.DataFrame, target: str) -> pd.Series:
    """Return the class name of every field, a text, None where it has none; a compound called UNKNOWN is none.

    Raises
    ------
    ConfigError : there is no such column.
    DataError : no field has a label, or all labelled fields have the same.
    """
    column = target_column(table, target)
    labels = table[column].astype(object)
    none = labels.isna()
    if column in ONE_PER_COMPOUND:
        none |= table["Metadata_Compound"].str.lower() == UNKNOWN
    labels = labels.map(str, na_action="ignore").where(~none, None)
    if none.all():
        raise DataError(
            f"training.target={target} must be known for some fields. None of {len(table)} has one: check the MoA file and "
            "plates.query, or learn another target."
        )
    if len(classes := set(labels[~none])) == 1:
        raise DataError(
            f"training.target={target} must have at least two classes. All {int((~none).sum())} labelled fields are "
            f"{classes.pop()!r}: widen plates.query, or learn another target."
        )
    return labels


def count_folds(table: pd.DataFrame) -> int:
    """Return how many folds `compound_folds` has: the compounds of the mechanism of action that has most."""
    return max((len(compounds) for compounds in _compounds(table).values()), default=0)


def split_fields(table: pd.DataFrame, *, kind: str, target: str, val_fraction: float, fold: int = 0, seed: int = 0) -> pd.Series:
    """Part fields into train and val.

    Parameters
    ----------
    table : of an `Index`.
    kind : one of `hcsdl.config.SPLITS`. `random_field` and `random_well` hold out `val_fraction` of every class's fields or wells
        (rounded; at least one of two or more, never all); `plate` and `batch` hold out whole ones, so that every class can be trained;
        `compound_folds` holds out the `fold`-th compound, by name, of every mechanism of action that has as many; the control trains.
    target : metadata column to learn, such as "MoA"; a field with no label there is not used.
    val_fraction : share of fields, wells, plates or batches held out, above 0 and below 1.
    fold : 0 … `count_folds(table)` − 1, for `compound_folds`.
    seed : of the random choice.

    Returns
    -------
    Series of "train", "val" or None, with the table's row labels.

    Raises
    ------
    ConfigError, DataError : the split cannot be made; the text says why, and what would.
    """
    if kind not in SPLITS:
        raise ConfigError(f"plates.split must be one of {', '.join(SPLITS)}. Got {kind!r} instead.")
    labels = target_labels(table, target)
    used = table[labels.notna()].assign(label=labels[labels.notna()])
    if kind == "compound_folds":
        held_out = _fold(used, table, target, fold)
    elif kind in ("plate", "batch"):
        held_out = _whole(used, kind, val_fraction, np.random.default_rng(seed))
    else:
        held_out = _stratified(used, UNITS[kind], val_fraction, np.random.default_rng(seed))
    split = pd.Series([None] * len(table), index=table.index, dtype=object, name="split")
    split[used.index] = np.where(held_out, "val", "train")
    _refuse_untrainable(used["label"], held_out, kind, target)
    return split


def _stratified(used: pd.DataFrame, unit: list[str], fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Return a mask (rows,), bool, of held-out rows: `fraction` of the units of every class."""
    units = used.groupby(unit)["label"].first().reset_index().sort_values(["label", *unit])
    chosen = []
    for _, members in units.groupby("label"):
        count = 0 if len(members) == 1 else min(max(1, round(fraction * len(members))), len(members) - 1)
        chosen.append(members.iloc[rng.permutation(len(members))[:count]])
    picked = pd.MultiIndex.from_frame(pd.concat(chosen)[unit])
    return pd.MultiIndex.from_frame(used[unit]).isin(picked)


def _whole(used: pd.DataFrame, kind: str, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Return a mask (rows,), bool, of held-out rows: whole plates or batches, so chosen that training keeps every class."""
    column = UNITS[kind][0]
    table = pd.crosstab(used["label"], used[column]).sort_index().sort_index(axis=1) > 0
    names, occurs = table.columns.to_numpy(), table.to_numpy()
    if len(names) == 1:
        raise DataError(
            f"plates.split={kind} must have at least two {_many(kind)} to part. There is one, {names[0]!r}: "
            "use plates.split=random_well, or add plates."
        )
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    for _ in range(DRAWS):
        chosen = rng.permutation(len(names))[:count]
        if np.delete(occurs, chosen, axis=1).any(axis=1).all():
            return used[column].isin(names[chosen]).to_numpy()
    single = table.index[occurs.sum(axis=1) == 1].tolist()
    raise DataError(
        f"plates.split={kind} must leave every class in train. Holding out {count} of {len(names)} {_many(kind)} does not: "
        f"{len(single)} of {len(table)} classes occur in one only ({_some(single)}). Use plates.split=random_well, a smaller "
        "plates.val_fraction, or plates.query without these classes."
    )


def _many(kind: str) -> str:
    return {"plate": "plates", "batch": "batches"}[kind]


def _some(names: list[str]) -> str:
    return ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "") if names else "none"


def _compounds(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the sorted compounds of every mechanism of action but the control's."""
    known = table[table["Metadata_MoA"].notna() & (table["Metadata_MoA"] != CONTROL_MOA)]
    return {str(moa): sorted(set(members)) for moa, members in known.groupby("Metadata_MoA")["Metadata_Compound"]}


def _fold(used: pd.DataFrame, table: pd.DataFrame, target: str, fold: int) -> np.ndarray:
    """Return a mask (rows,), bool, of held-out rows: the `fold`-th compound of every mechanism of action that has as many."""
    if target_column(table, target) in ONE_PER_COMPOUND:
        raise ConfigError(
            f"plates.split=compound_folds must have a target that several compounds share. training.target={target} is none: "
            "a held-out compound would be a class that training never sees. Use training.target=MoA or another split."
        )
    compounds = _compounds(table)
    if not compounds:
        raise DataError(
            "plates.split=compound_folds must know mechanisms of action. No field but the control's has one: check the MoA file."
        )
    folds = count_folds(table)
    if not 0 <= fold < folds:
        raise ConfigError(
            f"plates.fold must be 0 to {folds - 1}, for no mechanism of action has more than {folds} compounds. Got {fold} instead."
        )
    lonely = [moa for moa, members in compounds.items() if len(members) == 1]
    if lonely:
        raise DataError(
            f"plates.split=compound_folds must have two compounds of every mechanism of action, one to train on. "
            f"{len(lonely)} of {len(compounds)} have one ({_some(lonely)}): leave these out with "
            "plates.query, or use another split."
        )
    held_out = {members[fold] for members in compounds.values() if len(members) > fold}
    return (used["Metadata_Compound"].isin(held_out) & used["Metadata_MoA"].notna()).to_numpy()


def _refuse_untrainable(labels: pd.Series, held_out: np.ndarray, kind: str, target: str) -> None:
    train, val = set(labels[~held_out]), set(labels[held_out])
    if not val or not train:
        raise DataError(
            f"plates.split={kind} must leave fields on both sides. {'train' if val else 'val'} is empty, for each of the "
            f"{len(train | val)} classes of training.target={target} has too few wells: add some, or use another split."
        )
    if len(train) == 1:
        raise DataError(
            f"plates.split={kind} must leave at least two classes to train on. Only {train.pop()!r} is left: use another split."
        )
    if val - train:
        raise DataError(
            f"plates.split={kind} must leave every held-out class in train. {len(val - train)} classes of "
            f"training.target={target} are in val alone ({_some(sorted(val - train))}): use another split, or leave "
            "these out with plates.query."
        )
