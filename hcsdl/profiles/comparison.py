"""Several scored tables → how their methods compare.

In: `TableScores`. Out: paired differences and spreads over runs, plain data for text and JSON. Promised: only treatments that both have are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from hcsdl.config import DataError
from hcsdl.profiles.scoring import Method, Settings, TableScores
from hcsdl.profiles.uncertainty import paired_difference, spread


def compare(tables: Sequence[TableScores], settings: Settings) -> tuple[list[dict], list[dict]]:
    """Return the paired differences of the first method with every other and with its own baselines, and the spreads over runs.

    Runs of one method are taken together: a treatment's figure is the share of the runs that get it right.
    """
    methods: dict[str, list[Method]] = {}
    for table in tables:
        if table.main is not None:
            methods.setdefault(table.method, []).append(table.main)
    if not methods:
        return [], []
    names = list(methods)
    first = next(table for table in tables if table.main is not None)
    others = [(name, methods[name]) for name in names[1:]] + [(f"baseline: {b.name}", [b]) for b in first.baselines]
    compounds = dict(zip(first.main.treatments.names, first.main.treatments.profiles.meta["Metadata_Compound"], strict=True))
    differences = []
    for rule in first.main.nearest:
        mine = _mean_hits(methods[names[0]], rule)
        if mine.isna().all():
            continue
        for name, runs in others:
            if any(rule not in run.nearest for run in runs):
                continue
            both = pd.concat([mine, _mean_hits(runs, rule)], axis=1, join="inner").dropna()
            drawn = np.array([compounds[t] for t in both.index])
            if both.empty:
                raise DataError(
                    f"{names[0]} and {name} must have treatments in common to be compared. They have none: check their compounds' names."
                )
            found = paired_difference(
                both.iloc[:, 0].to_numpy(), both.iloc[:, 1].to_numpy(), drawn, draws=settings.draws, seed=settings.seed
            )
            unpaired = int(mine.notna().sum()) - len(both)
            differences.append({"rule": rule, "first": names[0], "second": name, **asdict(found), "treatments_not_in_second": unpaired})
    spreads = [
        {"rule": rule, "method": name, **spread([run.nearest[rule].accuracy for run in runs])}
        for name, runs in methods.items()
        for rule in runs[0].nearest
        if len(runs) >= 3
    ]
    return differences, spreads


def _mean_hits(runs: Sequence[Method], rule: str) -> pd.Series:
    return pd.concat([run.hits(rule) for run in runs], axis=1).mean(axis=1, skipna=False)
