"""Draws plates into a folder: `simulate`.

In: a `SimulateConfig`, a folder, a seed. Out: BBBC021's three CSV files, a TIFF file a channel and field, and `simulation.json`.
Promised: `simulation.json` is written last and holds every parameter; the same parameters again draw nothing; other parameters, or a
folder that holds plates not drawn here, are refused; a run that was killed goes on where it stopped, and no file is ever half written.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import tifffile
from tqdm import tqdm

from hcsdl.config import ConfigError, SimulateConfig
from hcsdl.machine.cores import usable_cores
from hcsdl.machine.process import bar_options
from hcsdl.simulation.compounds import COMPOUNDS
from hcsdl.simulation.fields import draw_field
from hcsdl.simulation.layout import Field, compound_table, fields_of_view, image_table, moa_table
from hcsdl.simulation.presets import Preset, resolve

SCHEMA_VERSION = 1  # of simulation.json; goes up too when the same parameters would be drawn otherwise
MARKER, UNFINISHED = "simulation.json", "simulation.unfinished.json"
TABLES = {"BBBC021_v1_image.csv": image_table, "BBBC021_v1_moa.csv": moa_table, "BBBC021_v1_compound.csv": compound_table}
_FEW_PX = 30_000_000  # fewer pixels than this are drawn faster than further processes start


def simulate(config: SimulateConfig, root: Path, seed: int, *, control: str = "DMSO", progress: bool = True) -> dict[str, int | bool]:
    """Draw plates into `root` in BBBC021's layout, unless they are there already.

    Parameters
    ----------
    config : SimulateConfig
        What to draw; null fields are taken from the preset. `workers` changes the time taken and nothing else.
    root : Path
        Folder for the plates; made if missing.
    seed : int
        Seed of everything random.
    control : str
        Compound name of the negative control.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict
        `fields, wells, plates, batches, compounds, treatments, moas` (the control counted in the last three), and `drawn`: False if
        the plates were there already.

    Raises
    ------
    ConfigError
        If `root` holds other plates, or the plates asked for cannot be laid out.
    """
    preset = resolve(config)
    if any(control in compounds for compounds in COMPOUNDS.values()):
        raise ConfigError(f"plates.control must not be a compound with a mechanism of action. Got {control!r} instead; use DMSO.")
    fields = fields_of_view(preset, seed, control)
    told = {"schema_version": SCHEMA_VERSION, "seed": seed, "control": control, "effect": float(config.effect), **asdict(preset)}
    counts = _counts(fields)
    root = Path(root)
    if _already_drawn(root, told):
        return {**counts, "drawn": False}
    root.mkdir(parents=True, exist_ok=True)
    _write_text(root / UNFINISHED, json.dumps(told, indent=1))
    for folder in {field.plate_name for field in fields}:
        (root / folder).mkdir(exist_ok=True)
    waiting = [field for field in fields if not _whole(root, field, preset)]
    draw = partial(_draw_and_write, root, seed, config.effect, preset)
    drawn = _draw_all(draw, waiting, _workers(config, preset, waiting))
    for _ in tqdm(drawn, total=len(waiting), desc="draw", unit="field", disable=not progress, **bar_options()):
        pass
    for name, table in TABLES.items():
        _write_text(root / name, table(fields))
    _write_text(root / MARKER, json.dumps({**told, "counts": counts}, indent=1))
    (root / UNFINISHED).unlink()
    return {**counts, "drawn": True}


def _counts(fields: list[Field]) -> dict[str, int]:
    return {
        "fields": len(fields),
        "wells": len({(f.plate, f.well) for f in fields}),
        "plates": len({f.plate for f in fields}),
        "batches": len({f.batch for f in fields}),
        "compounds": len({f.treatment.compound for f in fields}),
        "treatments": len({f.treatment for f in fields}),
        "moas": len({f.treatment.moa for f in fields}),
    }


def _already_drawn(root: Path, told: dict) -> bool:
    """Return whether `root` holds the plates that `told` describes, and refuse one that holds others."""
    for name in (MARKER, UNFINISHED):
        if (root / name).exists():
            try:
                found = json.loads((root / name).read_text(encoding="utf-8"))
            except ValueError:
                found = {}
            other = [key for key, value in told.items() if found.get(key) != value]
            if other:
                raise ConfigError(
                    f"plates.root must be an empty folder or hold the same simulation. Found another one in {root}: "
                    + "; ".join(f"{key} is {found.get(key)!r}, asked for {told[key]!r}" for key in other)
                    + ". Choose another folder, or delete this one."
                )
            return name == MARKER
    if root.exists() and any(root.glob("BBBC021_v1_*.csv*")):
        raise ConfigError(
            f"plates.root must be an empty folder or hold a simulation. Found plates not drawn by hcsdl in {root}. Choose another folder."
        )
    return False


def _whole(root: Path, field: Field, preset: Preset) -> bool:
    """Return whether the three files of a field are there: they get their names only once they are whole."""
    paths = [root / field.plate_name / name for name in field.file_names]
    return all(path.exists() and path.stat().st_size > 2 * preset.height_px * preset.width_px for path in paths)


def _workers(config: SimulateConfig, preset: Preset, waiting: list[Field]) -> int:
    if config.workers is None and len(waiting) * preset.height_px * preset.width_px < _FEW_PX:
        return 1
    return max(1, min(config.workers or usable_cores(), len(waiting)))


def _draw_all(draw: partial, waiting: list[Field], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(draw, waiting)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver")) as pool:
        yield from pool.map(draw, waiting)


def _draw_and_write(root: Path, seed: int, effect: float, preset: Preset, field: Field) -> None:
    images = draw_field(seed, field, effect, preset.height_px, preset.width_px, preset.batch_effect or 0.0)
    for name, image in zip(field.file_names, images, strict=True):
        path = root / field.plate_name / name
        unfinished = path.with_suffix(".part")
        tifffile.imwrite(unfinished, image, photometric="minisblack", metadata=None)
        os.replace(unfinished, path)


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
