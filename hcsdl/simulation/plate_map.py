"""BBBC021's own plate map: which treatment stands in which well of which plate, on the plates that hold known mechanisms.

In: a `Preset` with `plate_map`. Out: for every plate its name, batch and wells. Promised: compounds, concentrations, plates and wells are
those of the public CSV files (`bbbc021_map.csv` beside this file says how they were taken from them); nothing is random.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from hcsdl.simulation.compounds import COMPOUNDS, TAXOL, Treatment
from hcsdl.simulation.presets import Preset

CONTROL_WELLS = ("B02", "C02", "D02", "E11", "F11", "G11")  # DMSO, on every plate of BBBC021
TAXOL_WELLS = ("B11", "C11", "D11", "E02", "F02", "G02")  # taxol 0.3 µM, on every plate of BBBC021
SHARE_AT_LOWEST = 2 / 3  # of the cells that a compound changes at its lowest active concentration; a guess


@dataclass(frozen=True)
class MappedPlate:
    """A plate: its name, its batch (1 to 10), and what stands in its wells."""

    name: str
    batch: int
    wells: tuple[tuple[str, Treatment], ...]


def mapped_plates(preset: Preset, control: str) -> list[MappedPlate]:
    """Return the plates on which the first `moas` mechanisms, `compounds_per_moa` of their compounds and `concentrations` of each stand.

    Every plate has the first `control_wells` of BBBC021's wells of the control and the first `taxol_wells` of those of taxol 0.3.
    """
    wanted = {
        Treatment(compound, float(concentration), moa)
        for moa, compounds in list(COMPOUNDS.items())[: preset.moas]
        for compound in list(compounds)[: preset.compounds_per_moa]
        for concentration in compounds[compound][: preset.concentrations]
    }
    contents: dict[str, list[tuple[str, Treatment]]] = {}
    for treatment, well, plates in _table():
        if treatment in wanted:
            for plate in plates:
                contents.setdefault(plate, []).append((well, treatment))
    taxol = Treatment(*TAXOL, _moa(TAXOL[0]))
    controls = [(well, Treatment(control, 0.0, control)) for well in CONTROL_WELLS[: preset.control_wells]]
    controls += [(well, taxol) for well in TAXOL_WELLS[: preset.taxol_wells]]
    return [
        MappedPlate(name, _batch(name), tuple(sorted([*wells, *controls], key=lambda one: one[0])))
        for name, wells in sorted(contents.items(), key=lambda item: (_batch(item[0]), item[0]))
    ]


def mapped_share(treatment: Treatment) -> float:
    """Return the fraction of cells that a treatment of the map changes, before `simulate.effect`.

    Every one of them is active: a Hill curve with slope 1 through `SHARE_AT_LOWEST` at the compound's lowest concentration.
    """
    if treatment.moa not in COMPOUNDS:
        return 0.0
    midpoint = min(COMPOUNDS[treatment.moa][treatment.compound]) * (1 - SHARE_AT_LOWEST) / SHARE_AT_LOWEST
    return treatment.concentration / (treatment.concentration + midpoint)


@cache
def _table() -> tuple[tuple[Treatment, str, tuple[str, ...]], ...]:
    """Return the rows of the map: treatment, well, plates."""
    text = (files("hcsdl.simulation") / "bbbc021_map.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return tuple(
        (Treatment(row["compound"], float(row["concentration"]), _moa(row["compound"])), row["well"], tuple(row["plates"].split()))
        for row in rows
    )


def _moa(compound: str) -> str:
    return next(moa for moa, compounds in COMPOUNDS.items() if compound in compounds)


def _batch(plate: str) -> int:
    return int(plate.partition("_")[0].removeprefix("Week"))
