"""`-m`: one job for each combination of comma-separated values, through Hydra's own launchers; a table sorted by the metric at the end.

In: a command's name and overrides. Out: a folder with a numbered folder a job, and the first bad exit code, or 0. Every combination is composed
and validated before the first job starts. A job's ranks are processes of their own, so nothing leaks from job to job; a
failed job is listed and the others go on.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import sys
from datetime import datetime
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from hcsdl.commands.compose import compose_command, one_line, resolve
from hcsdl.config import ConfigError, register

log = logging.getLogger(__name__)
RESULT = "job.json"


def run_sweep(command: str, overrides: list[str]) -> int:
    """Run every combination and print the table; return 0 where all went well, else the first bad exit code."""
    if command != "train":
        raise ConfigError(f"-m sweeps `hcsdl train`. Got `hcsdl {command}` instead.")
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException as error:
        raise ConfigError(one_line(error, command)) from error
    if not jobs:
        raise ConfigError("a sweep must have at least one job. These values give none.")
    for job_overrides in jobs:
        config = compose_command(command, job_overrides)
        if config.run_dir is not None:  # type: ignore[attr-defined]
            raise ConfigError("a sweep gives each job its own run_dir. Remove run_dir=…; hydra.sweep.dir=<folder> names the sweep's.")
    named = [o.partition("=")[2] for o in overrides if o.startswith("hydra.sweep.dir=")]
    folder = Path(named[-1]) if named else Path("multirun") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    sys.argv = ["hcsdl", "-m", *overrides, *([] if named else [f"hydra.sweep.dir={folder}"])]
    register()
    try:
        hydra.main(version_base="1.3", config_path="pkg://hcsdl.conf", config_name=command)(run_job)()
    finally:
        codes = print_table(folder, len(jobs))
    return next((code for code in codes if code), 0)


def run_job(composed: DictConfig) -> None:
    """Run one job of a sweep in its own folder and write its exit code there. SystemExit(75) where a signal ended it, and so the sweep."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    changed = list(HydraConfig.get().overrides.task)
    composed.run_dir = str(folder / "run")
    log.info("job %s: %s", HydraConfig.get().job.num, " ".join(changed))
    try:
        code = importlib.import_module("hcsdl.commands.train").run(resolve(composed, "train"))
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        log.error("hcsdl: %s", error, exc_info=code == 1)
    (folder / RESULT).write_text(json.dumps({"exit_code": code, "overrides": changed}))
    if code == 75:
        raise SystemExit(code)


@dataclasses.dataclass(frozen=True)
class Row:
    """One job's line in the table."""

    job: str
    value: float | None
    said: str
    overrides: str


def print_table(folder: Path, jobs: int) -> list[int]:
    """Print a line per job with what it does not share with all, the best metric first, failed and missing ones last.

    Return the exit codes of the jobs that ran.
    """
    rows, codes, metric = [], [], "well_accuracy"
    for number in range(jobs):
        result = folder / str(number) / RESULT
        if not result.exists():
            rows.append(Row(str(number), None, "did not run", ""))
            continue
        told = json.loads(result.read_text(encoding="utf-8"))
        codes.append(told["exit_code"])
        summary = folder / str(number) / "run" / "summary.json"
        overrides = " ".join(told["overrides"])
        if told["exit_code"] or not summary.exists():
            rows.append(Row(str(number), None, f"exit code {told['exit_code']}", overrides))
            continue
        values = json.loads(summary.read_text(encoding="utf-8"))
        metric = values["metric"]
        leaky = " (leaky)" if values["leaky"] else ""
        rows.append(Row(str(number), values[metric], f"{values[metric]:.4f}{leaky}", overrides))
    common = (
        set.intersection(*(set(row.overrides.split()) for row in rows if row.overrides))
        if len(rows) > 1 and any(r.overrides for r in rows)
        else set()
    )
    rows = [dataclasses.replace(row, overrides=" ".join(word for word in row.overrides.split() if word not in common)) for row in rows]
    rows.sort(key=lambda row: -1.0 if row.value is None else row.value, reverse=True)
    print(f"\nsweep {folder}\n{'job':>4s}  {metric:20s} overrides")
    for row in rows:
        print(f"{row.job:>4s}  {row.said:20s} {row.overrides}")
    sys.stdout.flush()
    return codes
