"""A sweep's folder → one table: a line a run with what it does not share with all, the best metric first, failed and missing runs last.

In: a folder with `sweep.json` (the combinations, and Slurm's job where there is one) and a numbered folder a run: `job.json` (its exit code) and `run/`.
Out: the table on standard output and an exit code.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from hcsdl.config import ConfigError, ExitCode
from hcsdl.distributed.slurm import ALIVE, states
from hcsdl.training.run_folder import SCHEMA_VERSION, write_json

SWEEP, JOB = "sweep.json", "job.json"


def write_sweep(folder: Path, jobs: list[list[str]], slurm_job: str = "") -> None:
    """Write down a sweep's combinations. Raises ConfigError where the folder holds another sweep, or cannot be written."""
    words = [[word for word in job if not word.startswith(("hydra.", "hydra/"))] for job in jobs]
    before = read_sweep(folder)["jobs"] if (folder / SWEEP).exists() else words
    if before != words:
        raise ConfigError(
            f"a sweep goes on with its own combinations. {folder} holds another sweep of {len(before)}; name another hydra.sweep.dir."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SWEEP, {"schema_version": SCHEMA_VERSION, "slurm_job": slurm_job, "jobs": words})
    except OSError as error:
        raise ConfigError(
            f"a sweep's folder must be writable. {error.strerror}: {error.filename}; name another hydra.sweep.dir."
        ) from error


def read_sweep(folder: Path) -> dict:
    """Return what `write_sweep` wrote. Raises ConfigError where there is none, or something else."""
    try:
        sweep = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"folder must be a sweep's, with a {SWEEP} in it. {folder} has none.") from error
    except ValueError as error:
        raise ConfigError(f"{SWEEP} must be what a sweep wrote. {folder / SWEEP} is no JSON ({error}); name another folder.") from error
    if not isinstance(sweep, dict) or not {"slurm_job", "jobs"} <= set(sweep):
        raise ConfigError(f"{SWEEP} must be what a sweep wrote. {folder / SWEEP} lists no jobs; name another folder.")
    return sweep


@dataclass(frozen=True)
class Row:
    """One run's line: its number, metric or None, what is said for it, its exit code (75: not finished), its overrides."""

    job: int
    value: float | None
    said: str
    code: int
    overrides: list[str]


def read_rows(folder: Path) -> tuple[str, list[Row]]:
    """Return the metric's name and a row for every combination of the sweep in `folder`, in their order. Slurm is asked about unfinished ones."""
    sweep, rows, metric = read_sweep(folder), [], "well_accuracy"
    codes = [_read(folder / str(job) / JOB).get("exit_code") for job in range(len(sweep["jobs"]))]
    summaries = [_read(folder / str(job) / "run" / "summary.json") for job in range(len(sweep["jobs"]))]
    open_jobs = any(code is None and not summary for code, summary in zip(codes, summaries, strict=True))
    known = (states(sweep["slurm_job"]) or {}) if sweep["slurm_job"] and open_jobs else {}
    for job, (overrides, code, summary) in enumerate(zip(sweep["jobs"], codes, summaries, strict=True)):
        if summary and not code:
            metric = summary["metric"]
            leaky = " (leaky)" if summary["leaky"] else ""
            rows.append(Row(job, summary[metric], f"{summary[metric]:.4f}{leaky}", 0, overrides))
        elif code:
            rows.append(Row(job, None, f"exit code {code}", code, overrides))
        elif job in known and known[job].split()[0] in ALIVE:
            rows.append(Row(job, None, known[job].lower(), ExitCode.STOPPED, overrides))
        else:
            ended = f" ({known[job].lower()})" if job in known else ""
            begun = (folder / str(job) / "run" / "lock").exists()
            rows.append(Row(job, None, ("did not finish" if begun else "did not run") + ended, ExitCode.STOPPED, overrides))
    return metric, rows


def print_table(folder: Path) -> int:
    """Print the table of the sweep in `folder`; return 0 where all runs are finished, else the first bad exit code, 75 where none is bad."""
    metric, rows = read_rows(folder)
    common = set.intersection(*(set(row.overrides) for row in rows)) if len(rows) > 1 else set()
    rows.sort(key=lambda row: -1.0 if row.value is None else row.value, reverse=True)
    wide = max(20, *(len(row.said) for row in rows))
    print(f"\nsweep {folder}\n{'job':>4s}  {metric:{wide}s}  overrides")
    for row in rows:
        print(f"{row.job:>4d}  {row.said:{wide}s}  {' '.join(word for word in row.overrides if word not in common)}")
    sys.stdout.flush()
    bad = sorted((row.code == ExitCode.STOPPED, row.job, row.code) for row in rows if row.code)
    return bad[0][2] if bad else 0


def _read(path: Path) -> dict:
    """Return a JSON file's content, nothing where there is none or it was damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
