"""Every field of an index → quality and intensity measurements, in parallel, cached.

In: an `Index`. Out: a table aligned with `index.table`: `QC_Problem` (None, or a sentence that starts with its kind), the image's
rows, columns and type, and with level "pixels" all that `plates.quality.measure_field` measures.
Promised: one bad image never stops the pass; a field is measured again when one of its files changes, and only then.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from hcsdl.config import DataError
from hcsdl.data.reading import read_field, read_header
from hcsdl.machine.process import bar_options
from hcsdl.plates.index import Index
from hcsdl.plates.quality import judge, measure_field

SCHEMA_VERSION = 1
CHUNK = 16  # fields a task: about half a second of work for whole fields
ALONE = 64  # up to so many fields are measured without further processes, which take a second or two to start
KINDS = ("missing", "unreadable", "wrong shape", "constant", "saturated")
BREAKING = KINDS[:-1]  # a saturated field can be trained on

log = logging.getLogger(__name__)


def measure_index(
    index: Index, *, level: str = "pixels", workers: int = 1, cache: Path | None = None, progress: bool = True
) -> pd.DataFrame:
    """Measure every field of an index.

    Parameters
    ----------
    index : what to measure; images that are not there are a problem of their field.
    level : "files" reads headers only, "pixels" every pixel.
    workers : processes (threads for "files").
    cache : folder of earlier results, which are used for fields whose files have kept names, sizes and times of change, and which
        gets the new ones; None measures all. A folder that cannot be written is noted in the log.
    progress : show a progress bar on stderr.

    Returns
    -------
    Table with the rows of `index.table`: `QC_Problem`, `QC_Height`, `QC_Width` (px), `QC_Dtype`, and with "pixels" the columns of
    `measure_field` (NaN where a field cannot be read). A problem starts with one of `KINDS` and a colon.
    """
    paths = [index.paths(row) for row in range(len(index.table))]
    names = index.table[[f"Path_{channel}" for channel in index.channels]].agg("|".join, axis=1)
    with ThreadPoolExecutor(max_workers=8) as threads:  # a stat is a round trip on a network disk
        signatures = list(threads.map(_signature, paths, f"{'|'.join(index.channels)}|" + names))
    stored = _load(cache, level)
    unknown = [row for row, signature in enumerate(signatures) if signature not in stored]
    fresh: dict[str, dict[str, object]] = {}
    try:
        for row, result in _measure(paths, unknown, index.channels, level, workers, progress):
            fresh[signatures[row]] = result
    finally:  # an interrupted pass keeps what it has
        sound = {signature: result for signature, result in fresh.items() if result["QC_Problem"] is None}  # others are tried again
        if cache is not None and sound:
            _store(cache, level, stored | sound)
    known = stored | fresh
    measured = pd.DataFrame([known[signature] for signature in signatures], index=index.table.index)
    measured["QC_Problem"] = _problems(measured, index, level)
    return measured[["QC_Problem", *(column for column in measured if column != "QC_Problem")]]


def count_problems(problems: pd.Series) -> dict[str, int]:
    """Return how many fields have a problem of each of `KINDS`."""
    kinds = problems.dropna().str.split(":").str[0]
    return {kind: int((kinds == kind).sum()) for kind in KINDS}


def breaks_training(problems: pd.Series) -> pd.Series:
    """Return a mask, bool, of the problems that keep a field from being trained on: all kinds but "saturated"."""
    return problems.fillna("").astype(str).str.startswith(tuple(f"{kind}:" for kind in BREAKING))


def _signature(paths: list[Path], name: str) -> str:
    """Return a text that changes when a field's `name` does, or its files' sizes or times of change."""
    content = [name]
    for path in paths:
        try:
            stat = path.stat()
            content.append(f"{stat.st_size} {stat.st_mtime_ns}")
        except OSError as error:
            content.append(type(error).__name__)
    return hashlib.sha256("|".join(content).encode()).hexdigest()[:24]


def _measure(
    paths: list[list[Path]], rows: list[int], channels: tuple[str, ...], level: str, workers: int, progress: bool
) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield (row, result) for every row of `rows`, in any order."""
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    with tqdm(total=len(rows), desc=f"measuring {level}", unit="field", disable=not progress or not rows, **bar_options()) as bar:
        if workers == 1 or len(rows) <= ALONE:
            for row in rows:
                bar.update()
                yield row, _measure_one(paths[row], channels, level)
            return
        pool: Executor
        if level == "files":
            pool = ThreadPoolExecutor(max_workers=workers)
        else:  # spawned, for a fork would copy locks that other threads hold
            pool = ProcessPoolExecutor(max_workers=min(workers, len(chunks)), mp_context=multiprocessing.get_context("spawn"))
        with pool:
            tasks = {pool.submit(_measure_chunk, [paths[row] for row in chunk], channels, level): chunk for chunk in chunks}
            try:
                for task in as_completed(tasks):
                    bar.update(len(tasks[task]))
                    yield from zip(tasks[task], task.result(), strict=True)
            except BrokenProcessPool as error:
                raise DataError(
                    "A measuring process must not die. One did, most likely for want of memory: use fewer processes "
                    f"(check.workers, now {workers}). What was measured is kept."
                ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _measure_chunk(fields: list[list[Path]], channels: tuple[str, ...], level: str) -> list[dict[str, object]]:
    return [_measure_one(paths, channels, level) for paths in fields]


def _measure_one(paths: list[Path], channels: tuple[str, ...], level: str) -> dict[str, object]:
    """Return a field's measurements, or the problem that kept them from being made."""
    result: dict[str, object] = {"QC_Problem": None}
    try:
        headers = [read_header(path) for path in paths]
        shape, dtype = headers[0]
        if any(header != headers[0] for header in headers):
            kinds = ", ".join(f"{name} {rows} x {columns} {kind}" for name, ((rows, columns), kind) in zip(channels, headers, strict=True))
            return {"QC_Problem": f"wrong shape: the channels differ, {kinds}."}
        result |= {"QC_Height": shape[0], "QC_Width": shape[1], "QC_Dtype": str(dtype)}
        if level == "pixels":
            result |= measure_field(read_field(paths), channels)
    except DataError as error:
        if absent := [str(path) for path in paths if not path.exists()]:
            return {"QC_Problem": f"missing: {', '.join(absent)}."}
        return {"QC_Problem": f"unreadable: {error}"}
    return result


def _problems(measured: pd.DataFrame, index: Index, level: str) -> pd.Series:
    """Return each field's problem: its own, or else one that shows only beside the others."""
    problems = measured["QC_Problem"].astype(object).where(measured["QC_Problem"].notna(), None)
    if "QC_Dtype" not in measured:  # no field could be read
        return problems
    if level == "pixels":
        seen = judge(measured, index.channels)
        problems = problems.where(problems.notna(), seen)
    kinds = measured[["QC_Height", "QC_Width", "QC_Dtype"]].dropna()
    usual = kinds.value_counts().index[0]
    for row in kinds.index[(kinds != list(usual)).any(axis=1)]:
        height, width, dtype = kinds.loc[row]
        problems[row] = f"wrong shape: {height:g} x {width:g} {dtype}, most fields are {usual[0]:g} x {usual[1]:g} {usual[2]}."
    return problems.where(problems.notna(), None)


def _cache_file(cache: Path, level: str) -> Path:
    return cache / f"measurements_{level}_v{SCHEMA_VERSION}.parquet"


def _load(cache: Path | None, level: str) -> dict[str, dict[str, object]]:
    """Return earlier results by signature; a cache that cannot be read is empty."""
    if cache is None or not _cache_file(cache, level).is_file():
        return {}
    try:
        table = pd.read_parquet(_cache_file(cache, level)).set_index("signature")
    except (OSError, ValueError, KeyError) as error:
        log.warning("Earlier measurements are ignored: %s cannot be read (%s).", _cache_file(cache, level), error)
        return {}
    table["QC_Problem"] = None
    return dict(zip(table.index, table.to_dict("records"), strict=True))


def _store(cache: Path, level: str, results: dict[str, dict[str, object]]) -> None:
    path = _cache_file(cache, level)
    table = pd.DataFrame.from_dict(results, orient="index").rename_axis("signature").reset_index().drop(columns="QC_Problem")
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        table.to_parquet(new, index=False)
        os.replace(new, path)
    except OSError as error:
        log.warning(
            "Measurements are not kept: %s cannot be written (%s). plates.cache can name another folder.", path, error.strerror or error
        )
