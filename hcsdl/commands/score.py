"""`hcsdl score`: profile tables → mechanism-of-action scores with intervals, baselines and comparisons.

In: a `ScoreCommand`. Out: tables on standard output; in the output folder `scores.json`, `treatments.csv`, `ladder.csv`, `precision.csv`, and
`profiles_<table>.parquet`, the treatments' normalised profiles; exit code 0. Promised: no torch; every count that goes down is told.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pandas as pd

from hcsdl.commands.output import make_folder, writing
from hcsdl.config import ConfigError, DataError, ScoreCommand
from hcsdl.plates.splits import count_folds
from hcsdl.profiles.comparison import compare
from hcsdl.profiles.predictions import find_target, merge_folds, predict
from hcsdl.profiles.provenance import MARKS, Leak, Provenance, find_provenance, leak
from hcsdl.profiles.scoring import (
    RANDOM,
    Settings,
    TableScores,
    add_random_baselines,
    moa_tables,
    prediction_figures,
    score_table,
    treatment_table,
)
from hcsdl.profiles.tables import CELLPROFILER, SIMPLE, ProfileTable, is_scored, read_profiles
from hcsdl.profiles.text import format_comparisons, format_folds, format_table
from hcsdl.training.run_folder import write_json

SCHEMA_VERSION = 1
BEST = "The checkpoint is best.pt, chosen by its accuracy on held-out fields: these scores are not of an epoch fixed beforehand."
NO_RANDOM = "No random-network baseline: hcsdl embed checkpoint={run} embed.weights=random, on the same plates, makes its table; give it with this one."


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
    folder = make_folder("score.output", config.score.output, "scores")
    result = {
        "schema_version": SCHEMA_VERSION,
        "settings": asdict(settings),
        "tables": [],
        "baseline_tables": [],
        "comparisons": [],
        "spreads": [],
    }
    if config.score.folds:
        tables = [_read(path, config) for path in paths]
        result["folds"] = _merge(names, tables, provenances, settings)
    else:
        _score_all(names, paths, provenances, config, settings, result, folder)
    with writing("score.output", folder):
        write_json(folder / "scores.json", result)
    print(f"\nwritten to {folder}")
    return 0


def table_names(paths: list[Path], given: list[str], provenances: list[Provenance | None]) -> list[str]:
    """Return a name for each table: as given, else its run folder's (a random network's seed), else its file's, with what tells them apart.

    Raises ConfigError where as many names must be given as tables and are not.
    """
    if given and len(given) != len(paths):
        raise ConfigError(f"score.names must name each of the {len(paths)} tables. Got {len(given)} names instead.")
    if given:
        return [name if given.count(name) == 1 else f"{name} ({given[: i + 1].count(name)})" for i, name in enumerate(given)]
    stems = [path.name.removesuffix(".gz").rpartition(".")[0] for path in paths]
    short = [
        stem if p is None else p.run.name if p.trained else f"{RANDOM} (seed {p.seed})" for stem, p in zip(stems, provenances, strict=True)
    ]
    longer = [f"{p.run.name}/{stem}" if p else stem for stem, p in zip(stems, provenances, strict=True)]
    choices = zip(short, longer, map(str, paths), strict=True)
    return [a if short.count(a) == 1 else b if longer.count(b) == 1 else c for a, b, c in choices]


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
    """Score table after table, then compare; one table's features are in memory at a time. Random networks come first, and are printed last."""
    untrained = [p is not None and not p.trained for p in provenances]
    if all(untrained):
        untrained = [False] * len(paths)  # nothing to stand beside
    scored: list[TableScores] = []
    random: list[TableScores] = []
    marks: dict[str, str] = {}
    held_back = ""
    for number in sorted(range(len(paths)), key=lambda number: not untrained[number]):
        scores, known = _score_one(names[number], paths[number], provenances[number], config, settings)
        scores.method = (
            config.score.names[number] if config.score.names else provenances[number].method if provenances[number] else scores.name
        )
        if untrained[number]:
            scores.method = f"baseline: {RANDOM}"
        else:
            _put_beside(scores, random, provenances[number])
        text = format_table(scores, known) + "\n\n"
        if untrained[number]:
            held_back += text
        else:
            print(text, end="", flush=True)
        result["baseline_tables" if untrained[number] else "tables"].append(_plain(scores, paths[number], provenances[number], known))
        marks[scores.name] = known.mark
        (random if untrained[number] else scored).append(scores)
    print(held_back, end="")
    _name_methods(scored, given=bool(config.score.names))
    scored += random
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


def _score_one(name: str, path: Path, provenance: Provenance | None, config: ScoreCommand, settings: Settings) -> tuple[TableScores, Leak]:
    """Return a table's scores, and whether its network saw the answers."""
    table = _read(path, config)
    scores = score_table(name, table, settings)
    learned = not all(feature.startswith((*CELLPROFILER, *SIMPLE)) for feature in table.wells.names)
    compounds = scores.main.treatments.profiles.meta["Metadata_Compound"] if scores.main else table.wells.meta["Metadata_Compound"]
    return scores, leak(provenance, set(compounds) - {settings.control}, learned=learned)


def _put_beside(scores: TableScores, random: list[TableScores], provenance: Provenance | None) -> None:
    """Put the random networks beside a table's scores, and say what a reader of them must know."""
    add_random_baselines(scores, random)
    if provenance and provenance.best:
        scores.notes.append(BEST)
    if scores.main and provenance and provenance.trained and not random:
        scores.notes.append(NO_RANDOM.format(run=provenance.run))


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
        "path": str(path.absolute()),  # a report may be made from another folder
        "run": str(provenance.run) if provenance else None,
        "seed": provenance.seed if provenance else None,
        "leak": asdict(known) | {"mark": known.mark},
        **scores.figures,
        "by_moa": by_moa,
        "ladder": scores.ladder.assign(leak=known.mark)
        .astype(object)
        .where(scores.ladder.notna().assign(leak=True), None)
        .to_dict("records"),
        "predictions": [one | {"leak": known.mark} for one in scores.predictions],
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
    with writing("score.output", folder):
        for name, tables in parts.items():
            if tables:
                pd.concat(tables, ignore_index=True).to_csv(folder / name, index=False)
        for scores in scored:
            if scores.main:
                profiles = scores.main.treatments.profiles
                values = pd.DataFrame(profiles.values, columns=list(profiles.names))
                stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in scores.name)
                pd.concat([profiles.meta, values], axis=1).to_parquet(folder / f"profiles_{stem}.parquet")


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
    known = _leak_of_folds(names, tables, provenances, settings.control)
    target = find_target(rows, list(probabilities.columns), settings.target)
    predicted, left_out = predict(rows, probabilities, target)
    figures = [prediction_figures(one, "compound_folds", target, settings) | {"leak": known.mark} for one in predicted.values()]
    print(format_folds(figures, f"  [{known.mark}]" if known.mark else ""))
    print(
        f"  {len(tables)} folds, {rows['Metadata_Compound'].nunique()} compounds, each held out once; {left_out} rows without a class left out\n"
        f"  leakage: {known.sentence}"
    )
    return {"tables": names, "leak": asdict(known) | {"mark": known.mark}, "figures": figures, "rows_left_out": left_out}


def _leak_of_folds(names: list[str], tables: list[ProfileTable], provenances: list[Provenance | None], control: str) -> Leak:
    """Return whether a fold's network was trained on what it holds out. Raises DataError where one was, whatever its table says."""
    unknown = None
    for name, table, provenance in zip(names, tables, provenances, strict=True):
        held = set(table.rows["Metadata_Compound"][is_scored(table.rows, control) & (table.rows["Metadata_Split"] == "val").to_numpy()])
        known = leak(provenance, held, learned=True)
        if known.kind in ("moa", "compounds"):
            raise DataError(f"A fold's network must not have seen what it holds out. {name}: {known.sentence}")
        unknown = known if known.kind == "unknown" else unknown
    return unknown or Leak("none", "Every fold's run trained on none of the compounds it is scored on.")
