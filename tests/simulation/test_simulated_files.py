"""What `simulate` leaves on disk: tables, images, the marker; and what it does with a folder that is in use."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from hcsdl.commands.simulate import run
from hcsdl.config import ConfigError, PlatesConfig, SimulateCommand, SimulateConfig
from hcsdl.simulation import simulate

BBBC021_COLUMNS = [
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
]
SMALL = {"preset": "tiny", "height_px": 40, "width_px": 56, "moas": 1, "sites": 1}


def hashes(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every file under `root`, by its relative path."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_tables_have_bbbc021s_columns(tiny_plates: Path) -> None:
    """The three tables have the real ones' columns, and every field joins to a MoA on compound and concentration."""
    image = pd.read_csv(tiny_plates / "BBBC021_v1_image.csv")
    moa = pd.read_csv(tiny_plates / "BBBC021_v1_moa.csv")
    assert list(image.columns) == BBBC021_COLUMNS
    assert list(moa.columns) == ["compound", "concentration", "moa"]
    assert list(pd.read_csv(tiny_plates / "BBBC021_v1_compound.csv").columns) == ["compound", "smiles"]
    joined = image.merge(
        moa, how="left", left_on=["Image_Metadata_Compound", "Image_Metadata_Concentration"], right_on=["compound", "concentration"]
    )
    assert len(joined) == len(image) == 48
    assert joined.moa.notna().all() and joined.moa.nunique() == 4
    assert set(moa.loc[moa["compound"] == "DMSO", "moa"]) == {"DMSO"}


def test_images_are_where_the_zips_unpack_to(tiny_plates: Path) -> None:
    """The tables say `Week1/Week1_22123`; the file is in `Week1_22123/`, 16-bit, one channel, uncompressed, not constant."""
    image = pd.read_csv(tiny_plates / "BBBC021_v1_image.csv")
    for channel, wavelength in (("DAPI", 1), ("Tubulin", 2), ("Actin", 4)):
        names, folders = image[f"Image_FileName_{channel}"], image[f"Image_PathName_{channel}"]
        guid = "[0-9A-F]{8}-[0-9A-F]{4}-[0-9A-F]{4}-[0-9A-F]{4}-[0-9A-F]{12}"
        assert names.str.fullmatch(rf"Week1_150607_[B-G](0[2-9]|1[01])_s[12]_w{wavelength}{guid}\.tif").all()
        assert names.is_unique
        for name, folder in zip(names[:6], folders[:6], strict=True):
            assert folder.startswith("Week1/Week1_")
            with tifffile.TiffFile(tiny_plates / folder.split("/")[1] / name) as file:
                page = file.pages[0]
                assert len(file.pages) == 1 and page.compression == 1
                assert page.dtype == np.uint16 and page.shape == (128, 160)
                assert file.asarray().std() > 0


def test_nothing_but_plates_is_left(tiny_plates: Path) -> None:
    """A finished folder holds three tables, the marker and three files a field: nothing unfinished."""
    assert sorted(path.name for path in tiny_plates.iterdir() if path.is_file()) == [
        "BBBC021_v1_compound.csv",
        "BBBC021_v1_image.csv",
        "BBBC021_v1_moa.csv",
        "simulation.json",
    ]
    assert len(list(tiny_plates.glob("Week*/*"))) == 3 * 48 == len(list(tiny_plates.glob("Week*/*.tif")))


def test_image_files_tell_nothing_but_their_pixels(tiny_plates: Path) -> None:
    """Every image file has the same size: neither tags nor compression tell a class."""
    assert len({path.stat().st_size for path in tiny_plates.glob("Week*/*.tif")}) == 1


def test_same_files_whatever_the_number_of_processes(tmp_path: Path) -> None:
    """One process and two write the same bytes; another seed writes others."""
    for name, workers, seed in (("one", 1, 7), ("two", 2, 7), ("other", 1, 8)):
        simulate(SimulateConfig(**SMALL, workers=workers), tmp_path / name, seed, progress=False)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert not set(hashes(tmp_path / "one").values()) & set(hashes(tmp_path / "other").values()) - _same_tables(tmp_path)


def _same_tables(tmp_path: Path) -> set[str]:
    return {hashes(tmp_path / "one")[f"BBBC021_v1_{name}.csv"] for name in ("moa", "compound")}


def test_the_same_again_draws_nothing(tmp_path: Path) -> None:
    """A second call with the same parameters touches no file and says so; its counts are the same."""
    first = simulate(SimulateConfig(**SMALL), tmp_path, 0, progress=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second = simulate(SimulateConfig(**SMALL, workers=2), tmp_path, 0, progress=False)
    assert first == {"fields": 12, "wells": 12, "plates": 3, "batches": 1, "compounds": 3, "treatments": 3, "moas": 2, "drawn": True}
    assert second == {**first, "drawn": False}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"effect": 0.5}, {"width_px": 64}, {"control": "water"}])
def test_other_parameters_are_refused(tmp_path: Path, change: dict) -> None:
    """Another seed, effect, size or control in a used folder is an error that names what differs, and alters nothing."""
    simulate(SimulateConfig(**SMALL), tmp_path, 0, progress=False)
    before = hashes(tmp_path)
    settings = {**SMALL, **{key: value for key, value in change.items() if key not in ("seed", "control")}}
    with pytest.raises(ConfigError, match=rf"plates\.root .*{next(iter(change))} is"):
        simulate(SimulateConfig(**settings), tmp_path, change.get("seed", 0), control=change.get("control", "DMSO"), progress=False)
    assert hashes(tmp_path) == before


def test_plates_drawn_by_nobody_here_are_refused(tmp_path: Path) -> None:
    """A folder with real plates' tables is never written to."""
    (tmp_path / "BBBC021_v1_image.csv.gz").write_bytes(b"real")
    with pytest.raises(ConfigError, match="not drawn by hcsdl"):
        simulate(SimulateConfig(**SMALL), tmp_path, 0, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["BBBC021_v1_image.csv.gz"]


def test_a_killed_run_goes_on_and_ends_with_the_same_files(tmp_path: Path) -> None:
    """What a kill leaves (no marker, a truncated unfinished file, a missing and a cut file) is completed to the same bytes."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for root in (whole, killed):
        simulate(SimulateConfig(**SMALL), root, 0, progress=False)
    told = json.loads((killed / "simulation.json").read_text())
    told.pop("counts")
    (killed / "simulation.unfinished.json").write_text(json.dumps(told))
    (killed / "simulation.json").unlink()
    images = sorted(killed.glob("Week*/*.tif"))
    images[0].rename(images[0].with_suffix(".part"))
    images[5].write_bytes(images[5].read_bytes()[:100])
    kept = images[-1].stat().st_mtime_ns
    assert simulate(SimulateConfig(**SMALL), killed, 0, progress=False)["drawn"]
    assert hashes(killed) == hashes(whole)
    assert images[-1].stat().st_mtime_ns == kept


def test_an_interrupted_run_leaves_no_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When drawing fails half-way there is no marker and no table, so the folder is never taken for finished plates."""
    (tmp_path / "Week1_22143").write_text("a file where a plate's folder must go")
    with pytest.raises(OSError):
        simulate(SimulateConfig(**SMALL), tmp_path, 0, progress=False)
    assert not (tmp_path / "simulation.json").exists() and not list(tmp_path.glob("*.csv"))


def test_command_prints_counts_and_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command returns 0, prints the counts and the folder, and says when nothing was drawn."""
    command = SimulateCommand(plates=PlatesConfig(root=str(tmp_path)), simulate=SimulateConfig(**SMALL))
    assert run(command) == 0
    assert run(command) == 0
    first, second = capsys.readouterr().out.split(str(tmp_path.resolve()))[:2]
    assert "fields            12" in first and "drawn into" in first
    assert "nothing drawn" in second


def test_command_needs_a_folder() -> None:
    """Without plates.root the command says which setting is missing."""
    with pytest.raises(ConfigError, match=r"plates\.root must be"):
        run(SimulateCommand(simulate=SimulateConfig(**SMALL)))
