"""`hcsdl report`: run folders, scores and profiles → one page to look at, and its pictures as PNG and SVG.

In: a `ReportCommand`. Out: `report.html` and `pictures/` in the output folder; exit code 0. Promised: what is missing is left out with a sentence that says which
command makes it; nothing is trained or scored here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path

from hcsdl.commands.compose import compose_command, from_yaml, to_overrides
from hcsdl.commands.output import make_folder, writing
from hcsdl.commands.report_fields import fields_section, find_plates, find_preprocessing
from hcsdl.commands.report_profiles import Screen, choose_compound, compounds_section, read_screen, wells_section
from hcsdl.config import ConfigError, DataError, ReportCommand
from hcsdl.profiles.provenance import find_provenance
from hcsdl.report import sections as parts
from hcsdl.report.answer import WORDS, Answer, Evidence, answer_run, answer_scores
from hcsdl.report.candidates import candidates
from hcsdl.report.page import Head, Section, data_uri, render_page
from hcsdl.report.picture import encode, save
from hcsdl.report.records import RunRecord, ScoreRecord, distinct_names, read_run, read_scores
from hcsdl.training.embeddings import read_about


@dataclass(frozen=True)
class Inputs:
    """What a report is made of: `runs` and `scores`, the first of each shown; `profiles`, a table's path, or None."""

    runs: list[RunRecord]
    scores: list[ScoreRecord]
    profiles: Path | None

    @property
    def run(self) -> RunRecord | None:
        """Return the run that is shown."""
        return self.runs[0] if self.runs else None


def run(config: ReportCommand) -> int:
    """Write the report and say where.

    Raises
    ------
    ConfigError, DataError : nothing was given, an input that cannot be read, an output that cannot be written.
    """
    inputs = gather(config)
    evidence = parts.evidence_of(inputs.scores)
    screen = read_screen(inputs.profiles, inputs.scores) if inputs.profiles else None
    chosen = choose_compound(screen, evidence, config.report.compound)
    plates = cache(partial(find_plates, inputs.run, inputs.profiles, config.report.plates))
    shown = cache(partial(find_preprocessing, inputs.run, inputs.profiles))
    sections = [
        parts.scores_section(inputs.scores),
        parts.mechanisms_section(evidence, inputs.run, scored=bool(inputs.scores)),
        wells_section(screen, config.report.columns),
        compounds_section(screen, evidence, chosen, inputs.run, plates, shown),
        fields_section(screen.table if screen else None, inputs.run, plates, shown, config.report.fields),
        parts.comparison_section(inputs.runs),
        parts.training_section(inputs.run),
        parts.machine_section(inputs.run, _command(inputs.run)),
    ]
    answers = _answers(inputs, evidence, screen)
    folder = make_folder("report.output", config.report.output, "reports", "pictures")
    head = Head(config.report.title or _title(inputs), _subtitle(inputs), _warnings(inputs), WORDS if evidence is not None else "")
    _write(folder, head, answers, sections)
    print(f"written to {folder / 'report.html'}, {sum(len(s.pictures) for s in sections)} pictures in {folder / 'pictures'}")
    for line in dict.fromkeys(line for section in sections for line in section.missing):
        print(f"left out: {line}")
    return 0


def _answers(inputs: Inputs, evidence: Evidence | None, screen: Screen | None) -> list[Answer]:
    """Return the four answers, as far as the inputs have them."""
    if evidence is not None:
        unknown = candidates(screen.wells, evidence.replicates, screen.control) if screen is not None else None
        return answer_scores(evidence, unknown)
    if inputs.run is not None and inputs.run.summary is not None:
        return answer_run(inputs.run.summary)
    return []


def gather(config: ReportCommand) -> Inputs:
    """Return the inputs given and those that they lead to: scores name their tables and runs, a table lies in its run folder, a run folder may hold a table.

    Raises
    ------
    ConfigError : nothing was given.
    DataError : what was given is not there or cannot be read.
    """
    if not (config.runs or config.scores or config.profiles):
        raise ConfigError(
            "a report must be of something: set run=<run folder>, scores=<score folder> or profiles=<table>. Got none of them."
        )
    scores = [read_scores(Path(path)) for path in config.score_folders]
    runs = [Path(path) for path in config.runs]
    found = parts.main_table(scores)
    named = found[1] if found else next((table for record in scores for table in record.tables), None)
    profiles = Path(config.profiles) if config.profiles else None
    if profiles is not None and not profiles.is_file():
        raise DataError(f"profiles must name a table, .parquet or .csv. {profiles} is no file.")
    if profiles is None and named and Path(named["path"]).is_file():
        profiles = Path(named["path"])
    if not runs and named and named["run"] and Path(named["run"]).is_dir():
        runs = [Path(named["run"])]
    if not runs and profiles is not None and (provenance := find_provenance(profiles)):
        runs = [provenance.run]
    if profiles is None and runs:
        tables = sorted((runs[0] / "embeddings").glob("*.parquet"), key=lambda path: path.stat().st_mtime)
        profiles = next((path for path in tables[::-1] if _is_trained(path)), None)
    return Inputs([read_run(path, name) for path, name in zip(runs, distinct_names(runs), strict=True)], scores, profiles)


def _is_trained(table: Path) -> bool:
    """Return whether a table is of the run's own weights, not of the random ones that serve as a baseline."""
    return (read_about(table) or {}).get("weights") == "trained"


def _command(record: RunRecord | None) -> str:
    """Return the command that trains the same network into a new run folder."""
    if record is None:
        return ""
    try:
        given = from_yaml("train", (record.path / "config.yaml").read_text(encoding="utf-8"))
    except Exception:  # a run of another version, whose settings are not all known here
        return f"its settings stand in {record.path / 'config.yaml'}; this version of hcsdl does not know all of them"
    return " ".join(["hcsdl train", *to_overrides(given, compose_command("train", []), leave_out=("run_dir",))])


def _title(inputs: Inputs) -> str:
    found = parts.main_table(inputs.scores)
    if found is not None:
        return f"{found[1]['name']}: from images to mechanisms of action"
    if inputs.run is not None:
        return f"{inputs.run.name}: training report"
    return f"{inputs.profiles.name if inputs.profiles else inputs.scores[0].path.name}: profiles"


def _subtitle(inputs: Inputs) -> str:
    given = [f"run {run.path}" for run in inputs.runs] + [f"scores {record.path}" for record in inputs.scores]
    given += [f"profiles {inputs.profiles}"] if inputs.profiles else []
    return f"Made on {datetime.now():%Y-%m-%d %H:%M} from {', '.join(given)}."


def _warnings(inputs: Inputs) -> list[str]:
    warnings = [f"{table['name']}: {table['leak']['sentence']}" for r in inputs.scores for table in r.tables if table["leak"]["mark"]]
    warnings += [
        f"{run.name}: LEAKY, sister fields of one well stand on both sides of its split."
        for run in inputs.runs
        if run.summary and run.summary["leaky"]
    ]
    if not inputs.scores and not any(run.summary for run in inputs.runs):
        warnings.append(
            "Which mechanism fails, why and how surely cannot be told from what was given: `hcsdl score profiles=<table>`, then give its folder as `scores=`."
        )
    return warnings


def _write(folder: Path, head: Head, answers: Sequence[Answer], sections: Sequence[Section]) -> None:
    images = {}
    with writing("report.output", folder):
        for section in sections:
            for picture in section.pictures:
                png, _ = save(picture, folder / "pictures")
                images[picture.name] = data_uri(*encode(png, photographic=picture.photographic))
        page = render_page(head, answers, sections, images)
        (folder / "report.html").write_text(page, encoding="utf-8")
