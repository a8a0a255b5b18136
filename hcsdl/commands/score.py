"""`hcsdl score`: profile tables → mechanism-of-action scores with intervals, baselines and comparisons.

In: a `ScoreCommand`. Out: tables on standard output; in the output folder `scores.json`, `treatments.csv`, `ladder.csv`, `precision.csv`, and
`profiles_<table>.parquet`, the treatments' normalised profiles; exit code 0. Promised: no torch; every count that goes down is told.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pandas as pd

from hcsdl.config import ConfigError, DataError, ScoreCommand
from hcsdl.plates.splits import count_folds
from hcsdl.profiles.predictions import find_target, merge_folds, predict
from hcsdl.profiles.provenance import MARKS, Leak, Provenance, find_provenance, leak
from hcsdl.profiles.scoring import Settings, TableScores, compare, moa_tables, prediction_figures, score_table, treatment_table
from hcsdl.profiles.tables import CELLPROFILER, SIMPLE, ProfileTable, read_profiles
from hcsdl.profiles.text import format_comparisons, format_folds, format_table
from hcsdl.training.run_folder import write_json

SCHEMA_VERSION = 1


def run(config: ScoreCommand) -> int:
    """Score the tables of `config.profiles`, print and save what came out.

    Raises
    ------
    ConfigError, DataError : no table, one that cannot be read or scored, folds that are not whole, an output that cannot be written.
    """
    paths = [Path(path) for path in config.tables]
    if not paths:
        raise ConfigError("profiles must be a table, or several as [a,b]. Got null instead; set profiles=<file>.")
    for path in paths:
        if not path.is_file():
            raise DataError(f"profiles must name a table, .parquet or .csv. {path} is no file.")
    settings = Settings(
        control=config.score.control,
        pipeline=tuple(config.score.pipeline),
        regularisation=config.score.regularisation,
        target=config.score.target,
        draws=config.score.draws,
        null_size=config.score.null_size,
        seed=config.seed,
    )
    provenances = [find_provenance(path) for path in paths]
    names = table_names(paths, config.score.names, provenances)
    folder = _make_folder(config.score.output)
    result = {"schema_version": SCHEMA_VERSION, "settings": asdict(settings), "tables": [], "comparisons": [], "spreads": []}
    if config.score.folds:
        tables = [_read(path, config) for path in paths]
        result["folds"] = _merge(names, tables, provenances, settings)
    else:
        _score_all(names, paths, provenances, config, settings, result, folder)
    try:
        write_json(folder / "scores.json", result)
    except OSError as error:
        raise ConfigError(f"score.output must be writable. {folder}: {error.strerror}.") from error
    print(f"\nwritten to {folder}")
    return 0


def table_names(paths: list[Path], given: list[str], provenances: list[Provenance | None]) -> list[str]:
    """Return a name for each table: as given, else its run folder's, else its file's, with what tells them apart.

    Raises ConfigError where as many names must be given as tables and are not.
    """
    if given and len(given) != len(paths):
        raise ConfigError(f"score.names must name each of the {len(paths)} tables. Got {len(given)} names instead.")
    if given:
        return [name if given.count(name) == 1 else f"{name} ({given[: i + 1].count(name)})" for i, name in enumerate(given)]
    names = [p.run.name if p else path.name.removesuffix(".gz").rpartition(".")[0] for path, p in zip(paths, provenances, strict=True)]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _read(path: Path, config: ScoreCommand) -> ProfileTable:
    score = config.score
    return read_profiles(path, columns=score.columns, features=score.features, query=score.query, control=score.control)


def _score_all(
    names: list[str],
    paths: list[Path],
    provenances: list[Provenance | None],
    config: ScoreCommand,
    settings: Settings,
    result: dict,
    folder: Path,
) -> None:
    """Score table after table, then compare; one table's features are in memory at a time."""
    scored: list[TableScores] = []
    marks: dict[str, str] = {}
    for number, (name, path, provenance) in enumerate(zip(names, paths, provenances, strict=True)):
        table = _read(path, config)
        scores = score_table(name, table, settings)
        scores.method = config.score.names[number] if config.score.names else provenance.method if provenance else name
        learned = not all(feature.startswith((*CELLPROFILER, *SIMPLE)) for feature in table.wells.names)
        compounds = scores.main.treatments.profiles.meta["Metadata_Compound"] if scores.main else table.wells.meta["Metadata_Compound"]
        known = leak(provenance, set(compounds) - {settings.control}, learned=learned)
        del table
        print(format_table(scores, known), end="\n\n")
        result["tables"].append(_plain(scores, path, provenance, known))
        marks[name] = known.mark
        scored.append(scores)
    _name_methods(scored, given=bool(config.score.names))
    for method in {scores.method for scores in scored}:  # the worst of its runs
        of_runs = {marks[scores.name] for scores in scored if scores.method == method}
        marks[method] = next((mark for mark in MARKS if mark in of_runs), "")
    result["comparisons"], result["spreads"] = compare(scored, settings)
    for one in result["comparisons"]:
        one |= {"first_leak": marks[one["first"]], "second_leak": marks.get(one["second"], "")}
    for one in result["spreads"]:
        one["leak"] = marks[one["method"]]
    text = format_comparisons(result["comparisons"], result["spreads"], marks)
    if text:
        print(text)
    _save_tables(scored, marks, folder)


def _name_methods(scored: list[TableScores], given: bool) -> None:
    """Name each method by its first table where no name was given, so that people can read it."""
    first: dict[str, str] = {}
    for scores in scored:
        scores.method = scores.method if given else first.setdefault(scores.method, scores.name)


def _plain(scores: TableScores, path: Path, provenance: Provenance | None, known: Leak) -> dict:
    """Return one table's part of scores.json."""
    by_moa = {}
    if scores.main is not None:
        by_moa = {
            rule: {"per_moa": table.to_dict("records"), "moas": list(counts.index), "confusion": counts.to_numpy().tolist()}
            for rule, (table, counts) in moa_tables(scores.main).items()
        }
    return {
        "name": scores.name,
        "path": str(path),
        "run": str(provenance.run) if provenance else None,
        "seed": provenance.seed if provenance else None,
        "leak": asdict(known) | {"mark": known.mark},
        **scores.figures,
        "by_moa": by_moa,
        "ladder": scores.ladder.astype(object).where(scores.ladder.notna(), None).to_dict("records"),
        "predictions": scores.predictions,
        "notes": scores.notes,
    }


def _save_tables(scored: list[TableScores], marks: dict[str, str], folder: Path) -> None:
    """Write what is one row per treatment, rung or group, the leak's mark in every row."""
    methods = [(scores.name, method, marks[scores.name]) for scores in scored if (method := scores.main)]
    methods += [(scores.name, method, "") for scores in scored for method in scores.baselines]
    parts = {
        "treatments.csv": [treatment_table(method).assign(Table=name, Leak=mark) for name, method, mark in methods],
        "ladder.csv": [scores.ladder.assign(Table=scores.name, Leak=marks[scores.name]) for scores in scored],
        "precision.csv": [
            table.assign(Table=scores.name, Kind=kind, Leak=marks[scores.name])
            for scores in scored
            for kind, table in scores.precision.items()
        ],
    }
    try:
        for name, tables in parts.items():
            if tables:
                pd.concat(tables, ignore_index=True).to_csv(folder / name, index=False)
        for scores in scored:
            if scores.main:
                profiles = scores.main.treatments.profiles
                values = pd.DataFrame(profiles.values, columns=list(profiles.names))
                stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in scores.name)
                pd.concat([profiles.meta, values], axis=1).to_parquet(folder / f"profiles_{stem}.parquet")
    except OSError as error:
        raise ConfigError(f"score.output must be writable. {folder}: {error.strerror}.") from error


def _merge(names: list[str], tables: list[ProfileTable], provenances: list[Provenance | None], settings: Settings) -> dict:
    """Print and return the figures over all folds of compounds. Raises DataError where folds miss or stand twice."""
    for name, table, provenance in zip(names, tables, provenances, strict=True):
        if table.probabilities is None:
            raise DataError(f"A fold's table must have Prob_<class> columns. {name} has none.")
        if provenance and provenance.split != "compound_folds":
            raise DataError(f"A fold's run must have plates.split=compound_folds. {name} has {provenance.split}.")
    given = [p.fold for p in provenances if p]
    if len(set(given)) < len(given):
        raise DataError(f"Every fold must be given once. plates.fold is {', '.join(map(str, given))} in the runs of the tables given.")
    expected = count_folds(pd.concat([t.rows for t in tables], ignore_index=True)) if "Metadata_MoA" in tables[0].rows else 0
    if len(given) == len(tables) and set(given) != set(range(expected)):
        missing = sorted(set(range(expected)) - set(given))
        raise DataError(f"Every fold must be given. Of {expected}, plates.fold={', '.join(map(str, missing))} is missing.")
    rows, probabilities = merge_folds([(n, t.rows, t.probabilities) for n, t in zip(names, tables, strict=True)], settings.control)
    target = find_target(rows, list(probabilities.columns), settings.target)
    predicted, left_out = predict(rows, probabilities, target)
    figures = [prediction_figures(one, "compound_folds", target, settings) for one in predicted.values()]
    print(format_folds(figures, ""))
    print(
        f"  {len(tables)} folds, {rows['Metadata_Compound'].nunique()} compounds, each held out once; {left_out} rows without a class left out"
    )
    return {"tables": names, "figures": figures, "rows_left_out": left_out}


def _make_folder(output: str | None) -> Path:
    folder = Path(output) if output else Path("scores") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"score.output must be a folder that can be made. {folder}: {error.strerror}.") from error
    return folder
