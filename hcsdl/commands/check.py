"""`hcsdl check`: look at plates before training.

In: a `CheckCommand`. Out: a table on standard output; `check.json` and the index with its `QC_*` columns in the cache folder; exit code
3 if anything found would break training, else 0. Promised: one bad image never stops it, and every problem is counted.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd

from hcsdl.config import CheckCommand, DataError
from hcsdl.data.measure import KINDS, breaks_training, count_problems, measure_index
from hcsdl.machine.cores import usable_cores
from hcsdl.plates.index import Index, cache_folder, content_hash, find_images, load_index, read_index, root_folder
from hcsdl.plates.splits import target_labels
from hcsdl.plates.tables import CONTROL_MOA, find_csv

SCHEMA_VERSION = 1
SHOWN = 20  # problems printed; check.json has all


def run(config: CheckCommand) -> int:
    """Check the plates of `config.plates.root` as deep as `config.check.level` says.

    Returns
    -------
    0, or 3 if a field is missing, unreadable, of another shape or constant, or if there is nothing to learn.

    Raises
    ------
    ConfigError, DataError : the CSV files cannot be made into an index at all, or no results can be written.
    """
    level = config.check.level
    moa = find_csv(root_folder(config.plates), "moa") is not None
    index = read_index(config.plates, moa=moa, files=False)
    folder = _writable(cache_folder(config.plates))
    problems = pd.Series([None] * len(index.table), dtype=object)
    if level != "metadata":
        index, _ = find_images(index)
        measured = measure_index(index, level=level, workers=config.check.workers or usable_cores(), cache=folder)
        problems = measured["QC_Problem"]
        index = replace(index, table=pd.concat([index.table, measured], axis=1))
    nothing_to_learn = _nothing_to_learn(index.table, moa, config.plates.control)
    named = [{"field": index.field_name(row), "problem": problems[row]} for row in problems.index[problems.notna()]]
    found = count_problems(problems)
    breaking = bool(breaks_training(problems).any()) or nothing_to_learn is not None
    report = {
        "schema_version": SCHEMA_VERSION,
        "level": level,
        "root": str(index.root),
        "index_hash": index.hash,
        "channels": list(index.channels),
        "pixel_size_um": config.plates.pixel_size_um,
        "counts": count_fields(index.table),
        "images": _images(index.table),
        "found": found,
        "nothing_to_learn": nothing_to_learn,
        "breaks_training": breaking,
        "notes": list(index.notes),
        "problems": named,
    }
    print("\n".join(_lines(report)))
    (folder / "check.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written     {folder / 'check.json'}, {_save(index, folder, level)}")
    return 3 if breaking else 0


def count_fields(table: pd.DataFrame) -> dict[str, int]:
    """Return how many fields, wells, plates, … an index table has; the control is a compound and a treatment, but no MoA."""
    labelled = table[table["Metadata_MoA"].notna() & (table["Metadata_MoA"] != CONTROL_MOA)]
    return {
        "fields": len(table),
        "wells": table.groupby(["Metadata_Plate", "Metadata_Well"]).ngroups,
        "plates": table["Metadata_Plate"].nunique(),
        "batches": table["Metadata_Batch"].nunique(),
        "compounds": table["Metadata_Compound"].nunique(),
        "treatments": table["Metadata_Treatment"].nunique(),
        "moas": labelled["Metadata_MoA"].nunique(),
        "compounds_with_moa": labelled["Metadata_Compound"].nunique(),
        "treatments_with_moa": labelled["Metadata_Treatment"].nunique(),
        "fields_with_moa": len(labelled),
        "control_fields": int((table["Metadata_MoA"] == CONTROL_MOA).sum()),
    }


def _nothing_to_learn(table: pd.DataFrame, moa: bool, control: str) -> str | None:
    try:
        target_labels(table, "MoA" if moa else "Compound")
    except DataError as error:
        return str(error)
    if not (table["Metadata_Compound"] == control).any():
        return f"some well must hold the control, plates.control={control}, which data.intensity is fitted on. None does; name it, or set data.intensity=none."
    return None


def _images(table: pd.DataFrame) -> dict[str, int]:
    """Return how many readable fields have which shape and type, such as {"1024 x 1280 uint16": 13200}."""
    if "QC_Dtype" not in table:
        return {}
    known = table[["QC_Height", "QC_Width", "QC_Dtype"]].dropna()
    return {f"{height:g} x {width:g} {dtype}": int(count) for (height, width, dtype), count in known.value_counts().items()}


def _lines(report: dict) -> list[str]:
    """Return the report as people read it."""
    lines = [
        f"plates      {report['root']}",
        f"index       {report['index_hash']}, channels {', '.join(report['channels'])}, level {report['level']}",
    ]
    lines += [f"{name.replace('_', ' ').replace('moa', 'MoA'):20s}{count:>8d}" for name, count in report["counts"].items()]
    unseen = {"metadata": KINDS, "files": KINDS[3:], "pixels": ()}[report["level"]]
    lines += [f"{kind:20s}{'not seen' if kind in unseen else count:>8}" for kind, count in report["found"].items()]
    lines += [f"{shape:20s}{count:>8d}" for shape, count in report["images"].items()]
    lines += [f"note        {note}" for note in report["notes"]]
    lines += [f"problem     {one['field']}: {one['problem']}" for one in report["problems"][:SHOWN]]
    if len(report["problems"]) > SHOWN:
        lines.append(f"            and {len(report['problems']) - SHOWN} more, all in check.json")
    if report["nothing_to_learn"]:
        lines.append(f"problem     {report['nothing_to_learn']}")
    verdict = "would break training: see the problems above" if report["breaks_training"] else "nothing found that would break training"
    if report["level"] == "metadata" and not report["breaks_training"]:
        verdict = "nothing found in the CSV files that would break training; images were not looked at"
    return [*lines, f"verdict     {verdict}"]


def _writable(folder: Path) -> Path:
    """Return `folder` if files can be made in it, or else, saying so, the current directory."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        here = Path.cwd()
        print(f"note        {folder} cannot be written ({error.strerror}): results go to {here}; plates.cache can name another folder.")
        return here
    return folder


def _save(index: Index, folder: Path, level: str) -> str:
    """Save the index and return a few words on it; one of the same fields with pixel measurements is kept from a shallower check."""
    path = folder / "index.parquet"
    if level != "pixels" and path.is_file():
        try:
            before = load_index(path)
        except DataError:
            before = None
        if before is not None and before.hash == content_hash(index.table, index.channels) and "Count_Nuclei" in before.table:
            return f"{path} keeps the pixel measurements of an earlier check"
    return str(index.save(folder))
