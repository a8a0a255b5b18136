"""Run folders and the outputs of `hcsdl score` → plain records, as the rest of the report takes them.

In: paths. Out: `RunRecord`, `ScoreRecord`. Promised: nothing but reading; a run that is not finished yet has no summary and can still be read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from hcsdl.config import DataError
from hcsdl.training.journal import read_journal
from hcsdl.training.run_folder import RunFolder


@dataclass(frozen=True)
class RunRecord:
    """What a run folder tells.

    Attributes
    ----------
    path : the folder.
    name : what it is called in the report.
    config : the resolved settings, nested.
    plan : what was decided before the start: classes, channels, split, baseline.
    summary : what came out; None while the run goes on.
    journal : its lines; of steps done twice, because the run was resumed, the later attempt's alone.
    index : the fields, a row each.
    """

    path: Path
    name: str
    config: dict
    plan: dict
    summary: dict | None
    journal: list[dict]
    index: pd.DataFrame

    def events(self, kind: str) -> list[dict]:
        """Return the journal's lines of one kind: "step", "evaluation", …"""
        return [line for line in self.journal if line.get("event") == kind]


@dataclass(frozen=True)
class ScoreRecord:
    """What `hcsdl score` left in a folder.

    Attributes
    ----------
    path : the folder.
    data : scores.json.
    treatments : a row per method and treatment: its neighbours by rule, and whether they are right; empty where only folds were merged.
    precision : a row per table, kind ("replicates", "MoA") and group.
    """

    path: Path
    data: dict
    treatments: pd.DataFrame
    precision: pd.DataFrame

    @property
    def tables(self) -> list[dict]:
        """Return the scored tables."""
        return self.data["tables"]

    def rows_of(self, name: str) -> pd.DataFrame:
        """Return the treatments of table `name`, its baselines' left out."""
        if self.treatments.empty:
            return self.treatments
        return self.treatments[(self.treatments["Table"] == name) & (self.treatments["Method"] == name)].reset_index(drop=True)

    def replicates_of(self, name: str) -> pd.DataFrame:
        """Return, for table `name`, a row per treatment: do its wells agree with each other rather than with the controls?"""
        if self.precision.empty:
            return self.precision
        return self.precision[(self.precision["Table"] == name) & (self.precision["Kind"] == "replicates")].reset_index(drop=True)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, with as many parts before it as tell the paths apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return []


def read_run(path: Path, name: str) -> RunRecord:
    """Return the record of a run folder. Raises DataError where it is none or cannot be read."""
    run = RunFolder(path)
    try:
        return RunRecord(
            path=path,
            name=name,
            config=yaml.safe_load(run.config.read_text(encoding="utf-8")),
            plan=json.loads(run.plan.read_text(encoding="utf-8")),
            summary=json.loads(run.summary.read_text(encoding="utf-8")) if run.summary.is_file() else None,
            journal=_latest(read_journal(run.journal)) if run.journal.is_file() else [],
            index=pd.read_parquet(run.index),
        )
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"run must be a run folder, with config.yaml, plan.json and index.parquet. {path} cannot be read ({' '.join(str(error).split())}): "
            "give the folder that `hcsdl train` named."
        ) from error


def read_scores(path: Path) -> ScoreRecord:
    """Return the record of a folder that `hcsdl score` wrote, or of its scores.json. Raises DataError where it is none or cannot be read."""
    folder = path.parent if path.is_file() else path
    try:
        data = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        if not isinstance(data.get("tables"), list):
            raise ValueError("it holds no tables")
        return ScoreRecord(folder, data, _table(folder / "treatments.csv"), _table(folder / "precision.csv"))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"scores must be a folder that `hcsdl score` wrote, with scores.json. {path} cannot be read ({' '.join(str(error).split())}): "
            "give the folder it named at its end, or run `hcsdl score profiles=<table>` again."
        ) from error


def _table(path: Path) -> pd.DataFrame:
    text = {"Table": str, "Method": str, "Metadata_Treatment": str, "Metadata_Compound": str, "Metadata_MoA": str}
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""]) if path.is_file() else pd.DataFrame()


def _latest(journal: list[dict]) -> list[dict]:
    """Return the lines in order of their step; of those that stand twice the later attempt's."""
    kept = {(line.get("event"), line.get("step")): line for line in sorted(journal, key=lambda line: line.get("attempt", 0))}
    return sorted(kept.values(), key=lambda line: (line.get("step", 0), line.get("time", 0)))
