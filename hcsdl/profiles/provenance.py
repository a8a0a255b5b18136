"""Where a profile table comes from, and whether its network saw the answers.

In: a table's path. Out: `Provenance`, as `hcsdl embed` wrote it into the table, else read from the run folder the table lies in (or up to two folders
above), and a sentence on leakage. Promised: what cannot be known is said to be unknown, never taken for clean.
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
from hcsdl.training.embeddings import read_about
from hcsdl.training.run_folder import RunFolder

LEVELS_ABOVE = 2  # a table may lie in <run>/, <run>/x/ or <run>/x/y/
MARKS = ("LEAKY", "leak unknown")  # what may stand beside a score, the worst first
NOT_THE_METHOD = ("seed", "run_dir", "name", "machine", "distributed")  # what may differ between runs of one method


@dataclass(frozen=True)
class Training:
    """One run's part in a network: the metadata column it learned, such as "Metadata_MoA", and the compounds among its training fields."""

    target: str
    compounds: frozenset[str]


@dataclass(frozen=True)
class Provenance:
    """The run that made a table.

    Attributes
    ----------
    run : its folder.
    split, fold, seed : as configured; the seed of a network that is not trained is that of its weights.
    trained : what the network learned from, the run's own training first, then that of the runs whose weights it started from; empty where its
        weights are random.
    complete : whether all of these runs could be read.
    best : whether the checkpoint is the one that did best on held-out fields, and so no epoch fixed beforehand.
    method : equal for like tables of runs whose settings differ in nothing but the seed and where they ran.
    """

    run: Path
    split: str
    fold: int
    seed: int
    trained: tuple[Training, ...]
    complete: bool
    best: bool
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
    """Return where `table` comes from, None where it does not say so itself and lies in no run folder.

    Raises
    ------
    DataError : what it says, or the run folder, cannot be read.
    """
    try:
        about = read_about(table) if table.suffix == ".parquet" else None
        if about is not None:
            trained = tuple(Training(part["target"], frozenset(part["compounds"])) for part in about["trained"])
            place = {key: about[key] for key in ("weights", "by", "plates_root", "checkpoint")}
            return _provenance(Path(about["run"]), about["training_config"], trained, about["complete"], place, about["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"A table of embeddings must tell what its network saw. {table} does not ({' '.join(str(error).split())}): embed anew."
        ) from error
    run = _run_above(table.resolve().parent)
    if run is None:
        return None
    try:
        config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        trained, complete = _trainings(run)
        return _provenance(run.path, config, trained, complete, {"table": str(table.resolve().relative_to(run.path))}, config["seed"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(
            f"{table} lies in the run folder {run.path}, whose config.yaml, plan.json and index.parquet must tell what the network saw. "
            f"They cannot be read ({' '.join(str(error).split())}): mend them, or move the table elsewhere."
        ) from error


def _provenance(run: Path, config: dict, trained: tuple[Training, ...], complete: bool, place: dict[str, str], seed: int) -> Provenance:
    """Return the provenance of a table of the run with settings `config`; `place` tells apart tables of one run."""
    method = {key: value for key, value in config.items() if key not in NOT_THE_METHOD} | {"place": place}
    return Provenance(
        run=run,
        split=config["plates"]["split"],
        fold=config["plates"]["fold"],
        seed=seed,
        trained=trained,
        complete=complete,
        best=bool(trained) and place.get("checkpoint") == "best.pt",
        method=hashlib.sha256(json.dumps(method, sort_keys=True).encode()).hexdigest()[:16],
    )


def _run_above(folder: Path) -> RunFolder | None:
    """Return the run folder that is `folder` or lies up to two above it."""
    folders = [folder, *folder.parents][: LEVELS_ABOVE + 1]
    return next((RunFolder(f) for f in folders if (f / "config.yaml").is_file() and (f / "plan.json").is_file()), None)


def _trainings(run: RunFolder) -> tuple[tuple[Training, ...], bool]:
    """Return what `run` and the runs whose weights it started from learned from, and whether all could be read."""
    trained: list[Training] = []
    seen: set[Path] = set()
    while run.path not in seen:
        seen.add(run.path)
        plan = json.loads(run.plan.read_text(encoding="utf-8"))
        index = pd.read_parquet(run.index, columns=["Metadata_Split", "Metadata_Compound"])
        trained.append(Training(plan["target"], frozenset(index.loc[index["Metadata_Split"] == "train", "Metadata_Compound"].astype(str))))
        if not plan.get("resume_from"):
            return tuple(trained), True
        before = _run_above(Path(plan["resume_from"]))
        if before is None:
            return tuple(trained), False
        run = before
    return tuple(trained), True


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
    if not provenance.trained:
        return Leak("none", "The network's weights are random: nothing was trained.")
    of_moas = scored & frozenset().union(*(t.compounds for t in provenance.trained if t.target == "Metadata_MoA"))
    seen = scored & frozenset().union(*(t.compounds for t in provenance.trained))
    target = " and ".join(dict.fromkeys(t.target.removeprefix("Metadata_") for t in provenance.trained))
    if of_moas:
        return Leak("moa", f"LEAKY: the network was trained on the mechanisms of {len(of_moas)} of the {len(scored)} scored compounds.")
    if not provenance.complete:
        return Leak("unknown", "The network started from the weights of a run that cannot be found: what that one saw is unknown.")
    if not seen:
        return Leak("none", f"The network learned {target} and saw none of the {len(scored)} scored compounds in training.")
    return Leak(
        "compounds",
        f"The network saw {len(seen)} of the {len(scored)} scored compounds in training, labelled by {target}; no mechanism of action.",
    )
