"""Small screens in BBBC021's layout, for tests: CSV files and images made of seeded noise with a few bright discs."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import tifffile

CHANNELS = ("DAPI", "Tubulin", "Actin")
REAL_CSV = Path(__file__).parents[3] / "shared" / "data" / "bbbc021"  # the screen's own CSV files, where a checkout has them beside it


def draw_field(rng: np.random.Generator, shape: tuple[int, int], dtype: str, channels: int) -> np.ndarray:
    """Return a field (C, H, W) of `dtype`: noise, and eight discs alike in every channel."""
    rows, columns = np.indices(shape)
    ceiling = np.iinfo(dtype).max
    discs = np.zeros(shape)
    for _ in range(8):
        centre = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        discs += np.hypot(rows - centre[0], columns - centre[1]) < max(3, min(shape) / 16)
    noisy = 0.05 + 0.01 * rng.random((channels, *shape)) + 0.2 * np.minimum(discs, 1)
    return (noisy * ceiling).astype(dtype)


def _wells(plates: int, wells: int, moas: int, compounds_per_moa: int, control_wells: int) -> Iterator[tuple[str, str, str, float, int]]:
    """Yield (plate, well, compound, concentration, replicate); every plate has the same treatments, in turn."""
    for plate in range(plates):
        name = f"Week{plate // 2 + 1}_{20000 + plate}"
        for well in range(wells):
            position = f"{'BCDEFG'[well // 10 % 6]}{well % 10 + 2:02d}"
            if well < control_wells:
                yield name, position, "DMSO", 0.0, plate % 3 + 1
            else:
                number = (well - control_wells) % (moas * compounds_per_moa)
                yield name, position, f"compound {number % moas}{'abcdefgh'[number // moas]}", 0.3, plate % 3 + 1


def write_screen(
    root: Path,
    *,
    plates: int = 2,
    wells: int = 6,
    sites: int = 2,
    moas: int = 2,
    compounds_per_moa: int = 1,
    control_wells: int = 2,
    shape: tuple[int, int] = (32, 40),
    dtype: str = "uint16",
    layout: str = "week",
    channels: Sequence[str] = CHANNELS,
    compressed_csv: bool = False,
    images: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Write a screen like BBBC021 and return its image table, a row per field, as it stands in the CSV file.

    Parameters
    ----------
    root : folder that gets `screen_image.csv`, `screen_moa.csv` and the images; made if missing.
    plates, wells, sites, moas, compounds_per_moa, control_wells : how many; two plates make a batch; `wells` counts the control's.
    shape, dtype, channels : rows and columns in px, "uint8" or "uint16", channel names of the images.
    layout : "week" puts images into `Week1/Week1_20000/`, "flat" into `Week1_20000/`; the CSV says the former, as BBBC021's does.
    compressed_csv : write `.csv.gz` files.
    images : False writes the CSV files only.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for plate, well, compound, concentration, replicate in _wells(plates, wells, moas, compounds_per_moa, control_wells):
        for site in range(1, sites + 1):
            names = [f"{well}_s{site}_w{number}{plate}.tif" for number in range(1, len(channels) + 1)]
            folder = f"{plate.split('_')[0]}/{plate}"
            row: dict[str, object] = {"TableNumber": 1, "ImageNumber": len(rows) + 1}
            for channel, name in zip(channels, names, strict=True):
                row |= {f"Image_FileName_{channel}": name, f"Image_PathName_{channel}": folder}
            row |= {
                f"Image_Metadata_Plate_{channels[0]}": plate,
                f"Image_Metadata_Well_{channels[0]}": well,
                "Replicate": replicate,
                "Image_Metadata_Compound": compound,
                "Image_Metadata_Concentration": concentration,
            }
            rows.append(row)
            if images:
                on_disk = root / (folder if layout == "week" else plate)
                on_disk.mkdir(parents=True, exist_ok=True)
                for name, image in zip(names, draw_field(rng, shape, dtype, len(channels)), strict=True):
                    tifffile.imwrite(on_disk / name, image)
    table = pd.DataFrame(rows)
    root.mkdir(parents=True, exist_ok=True)
    write_csv(root, "screen_image.csv", table, compressed_csv)
    pairs = table[["Image_Metadata_Compound", "Image_Metadata_Concentration"]].drop_duplicates()
    pairs.columns = ["compound", "concentration"]
    pairs["moa"] = ["DMSO" if name == "DMSO" else f"moa {name.split()[1][:-1]}" for name in pairs.compound]
    write_csv(root, "screen_moa.csv", pairs, compressed_csv)
    return table


def write_csv(root: Path, name: str, table: pd.DataFrame, compressed: bool = False) -> Path:
    """Write `table` as `root/name`, or as `root/name.gz`, and return the path."""
    text = table.to_csv(index=False).encode()
    path = root / (f"{name}.gz" if compressed else name)
    path.write_bytes(gzip.compress(text) if compressed else text)
    return path
