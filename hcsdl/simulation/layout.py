"""Which treatment stands in which well of which plate, and what the files are called.

In: a `Preset`, a seed, the name of the control. Out: a list of `Field`, and BBBC021's three tables as CSV text.
Promised: wells are dealt at random from the seed, or are BBBC021's own where the preset has its plate map; the replicates of a treatment stand
on different plates; names depend on seed, plate, well, site and channel alone, so that they tell nothing of the treatment.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass

import numpy as np

from hcsdl.config import ConfigError
from hcsdl.simulation.compounds import TAXOL, Treatment, treatments
from hcsdl.simulation.plate_map import mapped_plates, mapped_share
from hcsdl.simulation.presets import Preset

ROWS, COLUMNS = "BCDEFG", range(2, 12)  # the 60 inner wells of a 96-well plate, as BBBC021 uses them
CHANNELS = (("DAPI", 1), ("Tubulin", 2), ("Actin", 4))  # name, number after `_w` in file names
FILE_PREFIXES = (
    "Week1_150607_",
    "Week2_180607_",
    "Week3_290607_",
    "",
    "Week5_130707_",
    "Week6_200607_",
    "Week7_230707_",
    "Week8_4sites_",
    "Week9_090907_",
    "Week10_200907_",
)  # as BBBC021's ten batches have them
IMAGE_COLUMNS = (
    "TableNumber",
    "ImageNumber",
    "Image_FileName_DAPI",
    "Image_PathName_DAPI",
    "Image_FileName_Tubulin",
    "Image_PathName_Tubulin",
    "Image_FileName_Actin",
    "Image_PathName_Actin",
    "Image_Metadata_Plate_DAPI",
    "Image_Metadata_Well_DAPI",
    "Replicate",
    "Image_Metadata_Compound",
    "Image_Metadata_Concentration",
)
_LAYOUT, _NAMES = 1, 2  # first words of the seeds of what is random here


@dataclass(frozen=True)
class Field:
    """A field of view: where it is, what was done to it, and what its three files are called."""

    batch: int
    plate: int
    plate_name: str
    well: str
    site: int
    replicate: int
    treatment: Treatment
    file_names: tuple[str, ...]
    share: float | None = None  # of the cells that the treatment changes; None: as `active_fraction` has it


def fields_of_view(preset: Preset, seed: int, control: str) -> list[Field]:
    """Return every field of a simulation, in the order plate, well, site.

    Raises
    ------
    ConfigError
        If a plate would need more wells than it has, or a treatment more plates than there are.
    """
    if preset.plate_map:
        contents = [(plate.batch, plate.name, plate.wells) for plate in mapped_plates(preset, control)]
    else:
        contents = _dealt(preset, seed, control)
    found: list[Field] = []
    replicates: Counter[Treatment] = Counter()
    for number, (batch, plate_name, wells) in enumerate(contents):
        for well, treatment in wells:
            replicates[treatment] += 1
            share = mapped_share(treatment) if preset.plate_map else None
            for site in range(1, preset.sites + 1):
                stem = f"{FILE_PREFIXES[(batch - 1) % 10]}{well}_s{site}_w"
                names = tuple(f"{stem}{wavelength}{_guid(seed, number, well, site, wavelength)}.tif" for _, wavelength in CHANNELS)
                found.append(Field(batch, number, plate_name, well, site, replicates[treatment], treatment, names, share))
    return found


def _dealt(preset: Preset, seed: int, control: str) -> list[tuple[int, str, list[tuple[str, Treatment]]]]:
    """Return every plate's batch, name, and treatments in random wells."""
    plates = [(batch, index) for batch in range(1, preset.batches + 1) for index in range(preset.plates_per_batch)]
    rng = np.random.default_rng([seed, _LAYOUT])
    dealt = _deal(preset, len(plates), rng)
    found = []
    for number, (batch, index) in enumerate(plates):
        contents = dealt[number] + [Treatment(control, 0.0, control)] * preset.control_wells
        wells = sorted(zip(_wells(len(contents), rng), contents, strict=True), key=lambda pair: pair[0])
        found.append((batch, f"Week{batch}_{22123 + 2000 * (batch - 1) + 20 * index}", wells))
    return found


def _deal(preset: Preset, plates: int, rng: np.random.Generator) -> list[list[Treatment]]:
    if preset.replicates > plates:
        raise ConfigError(
            f"simulate.replicates must be at most the number of plates, {plates}: replicates stand on different plates. "
            f"Got {preset.replicates} instead; raise simulate.batches or simulate.plates_per_batch."
        )
    dealt: list[list[Treatment]] = [[] for _ in range(plates)]
    wanted = treatments(preset.moas, preset.compounds_per_moa, preset.concentrations)
    for number in rng.permutation(len(wanted)):
        treatment = wanted[number]
        copies = plates if (treatment.compound, treatment.concentration) == TAXOL else preset.replicates
        load = np.array([len(contents) for contents in dealt]) + rng.random(plates)
        for plate in np.argsort(load)[:copies]:
            dealt[plate].append(treatment)
    room = len(ROWS) * len(COLUMNS) - preset.control_wells
    fullest = max(len(contents) for contents in dealt)
    if fullest > room:
        raise ConfigError(
            f"simulate: a plate has room for {room} treated wells. Got {fullest} instead; "
            "raise simulate.plates_per_batch or lower simulate.replicates."
        )
    return dealt


def _wells(count: int, rng: np.random.Generator) -> list[str]:
    every = [f"{row}{column:02d}" for row in ROWS for column in COLUMNS]
    return [every[i] for i in rng.permutation(len(every))[:count]]


def _guid(seed: int, plate: int, well: str, site: int, wavelength: int) -> str:
    words = np.random.SeedSequence([seed, _NAMES, plate, *well.encode(), site, wavelength]).generate_state(4)
    text = "".join(f"{word:08X}" for word in words)
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def image_table(fields: list[Field]) -> str:
    """Return BBBC021_v1_image.csv for `fields`: one row a field."""
    counts: Counter[int] = Counter()
    rows = []
    for field in fields:
        counts[field.batch] += 1
        folder = f"Week{field.batch}/{field.plate_name}"
        files = [part for name in field.file_names for part in (name, folder)]
        rows.append(
            [
                field.batch,
                counts[field.batch],
                *files,
                field.plate_name,
                field.well,
                field.replicate,
                field.treatment.compound,
                f"{field.treatment.concentration:g}",
            ]
        )
    return _csv([IMAGE_COLUMNS, *rows], csv.QUOTE_MINIMAL)


def moa_table(fields: list[Field]) -> str:
    """Return BBBC021_v1_moa.csv for `fields`: one row a treatment, the control included."""
    known = sorted({(f.treatment.compound, f.treatment.concentration, f.treatment.moa) for f in fields})
    lines = ['"compound",concentration,"moa"', *(f'"{compound}",{value:.6f},"{moa}"' for compound, value, moa in known)]
    return "\n".join(lines) + "\n"


def compound_table(fields: list[Field]) -> str:
    """Return BBBC021_v1_compound.csv for `fields`: one row a compound; its structure (smiles) stays empty."""
    return _csv([("compound", "smiles"), *((name, "") for name in sorted({f.treatment.compound for f in fields}))], csv.QUOTE_MINIMAL)


def _csv(rows: list, quoting: int) -> str:
    text = io.StringIO()
    csv.writer(text, quoting=quoting, lineterminator="\n").writerows(rows)
    return text.getvalue()
