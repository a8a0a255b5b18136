"""Where a profile table comes from, and whether its network saw the answers.

In: a table's path. Out: `Provenance`, read from the run folder the table lies in (or up to two folders above), and a sentence on leakage.
Promised: what cannot be known is said to be unknown, never taken for clean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from hcsdl.config import DataError
from hcsdl.training.run_folder import RunFolder

LEVELS_ABOVE = 2  # a table may lie in <run>/, <run>/x/ or <run>/x/y/
MARKS = ("LEAKY", "leak unknown")  # what may stand beside a score, the worst first
NOT_THE_METHOD = ("seed", "run_dir", "name", "machine", "distributed")  # what may differ between runs of one method


@dataclass(frozen=True)
class Provenance:
    """The run that made a table.

    Attributes
    ----------
    run : its folder.
    target : the metadata column it learned, such as "Metadata_MoA".
    split, fold, seed : as configured.
    trained_compounds : the compounds among its training fields.
    method : equal for tables of one place in runs whose settings differ in nothing but the seed and where they ran.
    """

    run: Path
    target: str
    split: str
    fold: int
    seed: int
    trained_compounds: frozenset[str]
    method: str


@dataclass(frozen=True)
class Leak:
    """`kind`: "moa" (the network learned the labels it is scored on), "compounds" (it saw the compounds, not their mechanisms), "none", "unknown"."""

    kind: str
    sentence: str

    @property
    def mark(self) -> str:
        """Return the word that stands beside every score."""
        return {"moa": MARKS[0], "unknown": MARKS[1]}.get(self.kind, "")


def find_provenance(table: Path) -> Provenance | None:
    """Return where `table` comes from, None where it lies in no run folder.

    Raises
    ------
    DataError : a run folder that cannot be read.
    """
    folders = table.resolve().parents[: LEVELS_ABOVE + 1]
    run = next((RunFolder(f) for f in folders if (f / "config.yaml").is_file() and (f / "plan.json").is_file()), None)
    if run is None:
        return None
    try:
        config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        target = json.loads(run.plan.read_text(encoding="utf-8"))["target"]
        index = pd.read_parquet(run.index, columns=["Metadata_Split", "Metadata_Compound"])
        method = {key: value for key, value in config.items() if key not in NOT_THE_METHOD}
        method["table"] = str(table.resolve().relative_to(run.path))  # two tables of one run are of two checkpoints, say
        return Provenance(
            run=run.path,
            target=target,
            split=config["plates"]["split"],
            fold=config["plates"]["fold"],
            seed=config["seed"],
            trained_compounds=frozenset(index.loc[index["Metadata_Split"] == "train", "Metadata_Compound"].astype(str)),
            method=hashlib.sha256(json.dumps(method, sort_keys=True).encode()).hexdigest()[:16],
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(
            f"{table} lies in the run folder {run.path}, whose config.yaml, plan.json and index.parquet must tell what the network saw. "
            f"They cannot be read ({' '.join(str(error).split())}): mend them, or move the table elsewhere."
        ) from error


def leak(provenance: Provenance | None, scored_compounds: Iterable[str], *, learned: bool) -> Leak:
    """Return whether the network saw the scored compounds or their mechanisms when it was trained.

    Parameters
    ----------
    learned : whether the features may be a network's. False only where their names tell: CellProfiler's, or our simple ones.
    """
    scored = frozenset(scored_compounds)
    if provenance is None:
        if not learned:
            return Leak("none", "Classical features: nothing was trained.")
        return Leak(
            "unknown", "The table lies in no run folder: whether the network saw the scored compounds or their mechanisms is unknown."
        )
    seen = len(scored & provenance.trained_compounds)
    target = provenance.target.removeprefix("Metadata_")
    if not seen:
        return Leak("none", f"The network learned {target} and saw none of the {len(scored)} scored compounds in training.")
    if target == "MoA":
        return Leak("moa", f"LEAKY: the network was trained on the mechanisms of {seen} of the {len(scored)} scored compounds.")
    return Leak(
        "compounds",
        f"The network saw {seen} of the {len(scored)} scored compounds in training, labelled by {target}; no mechanism of action.",
    )
