"""`hcsdl check`: what it prints, writes and returns."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from hcsdl.commands.check import run
from hcsdl.config import CheckCommand, CheckConfig, DataError, PlatesConfig
from hcsdl.plates.index import load_index, read_index
from tests.plates.screens import REAL_CSV, write_screen

pytestmark = pytest.mark.xeon_only


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    write_screen(tmp_path / "screen", plates=2, wells=12, sites=2)
    return tmp_path / "screen"


def check(root: Path, level: str = "pixels", **plates: object) -> int:
    return run(CheckCommand(plates=PlatesConfig(root=str(root), **plates), check=CheckConfig(level=level, workers=1)))


def report(root: Path) -> dict:
    return json.loads((root / ".hcsdl" / "check.json").read_text())


def spoil(screen: Path, count: int) -> None:
    for path in sorted(screen.rglob("*_w2*.tif"))[:count]:
        path.write_bytes(b"no image")


@pytest.mark.parametrize("level", ["metadata", "files", "pixels"])
def test_sound_plates(screen, level, capsys):
    assert check(screen, level) == 0
    found = report(screen)
    assert found["schema_version"] == 1 and found["breaks_training"] is False and found["problems"] == []
    assert (
        found["counts"]
        | {"fields": 48, "wells": 24, "plates": 2, "batches": 1, "compounds": 3, "treatments": 3, "moas": 2, "control_fields": 8}
        == found["counts"]
    )
    assert found["images"] == ({} if level == "metadata" else {"32 x 40 uint16": 48})
    printed = capsys.readouterr().out
    verdict = (
        "nothing found in the CSV files that would break training" if level == "metadata" else "nothing found that would break training"
    )
    assert "wells                     24" in printed and verdict in printed
    assert printed.count("not seen") == {"metadata": 5, "files": 2, "pixels": 0}[level]


def test_metadata_needs_no_images(tmp_path):
    write_screen(tmp_path / "bare", images=False)
    assert check(tmp_path / "bare", "metadata") == 0
    assert check(tmp_path / "bare", "files") == 3
    assert report(tmp_path / "bare")["found"]["missing"] == 24


def test_problems_are_named_then_counted(screen, capsys):
    spoil(screen, 23)
    assert check(screen, "files") == 3
    printed = capsys.readouterr().out
    assert printed.count("cannot be read") == 20 and "and 3 more, all in check.json" in printed
    assert "unreadable                23" in printed
    found = report(screen)
    assert len(found["problems"]) == 23 and found["problems"][0]["field"] == "Week1_20000/B02/1" and found["breaks_training"] is True


def test_saturated_is_a_warning_and_black_is_not(screen):
    paths = sorted(screen.rglob("*_w1*.tif"))
    tifffile.imwrite(paths[0], np.repeat(np.uint16([[65535], [7]]), 40, 1).repeat(16, 0))
    assert check(screen) == 0 and report(screen)["found"]["saturated"] == 1
    tifffile.imwrite(paths[0], np.zeros((32, 40), "uint16"))
    assert check(screen) == 3 and report(screen)["found"]["constant"] == 1


def test_one_class_is_nothing_to_learn(tmp_path, capsys):
    write_screen(tmp_path, moas=1, control_wells=0)
    assert check(tmp_path, "files") == 3
    assert "must have at least two classes" in capsys.readouterr().out and "must have at least two" in report(tmp_path)["nothing_to_learn"]


def test_without_control_wells_training_would_fail(screen, capsys):
    assert check(screen, "metadata", control="water") == 3
    assert "some well must hold the control, plates.control=water" in capsys.readouterr().out


def test_without_moa_file(screen):
    (screen / "screen_moa.csv").unlink()
    assert check(screen, "files") == 0 and report(screen)["counts"]["moas"] == 0


def test_lists_that_make_no_index(screen):
    (screen / "screen_image.csv").unlink()
    with pytest.raises(DataError, match="must hold the list of images"):
        check(screen)


def test_measurements_travel_with_the_index(screen):
    """The saved index has them, a query can ask for them, and a shallower check does not wipe them out."""
    path = sorted(screen.rglob("*_w1*.tif"))[0]
    tifffile.imwrite(path, np.repeat(np.uint16([[65535], [7]]), 40, 1).repeat(16, 0))
    query = PlatesConfig(root=str(screen), query="QC_Saturated_DAPI < 0.1 and QC_Focus_DAPI > -99")
    with pytest.raises(DataError, match="run `hcsdl check check.level=pixels` on all fields first"):
        read_index(query)
    check(screen)
    check(screen, "files")
    saved = load_index(screen / ".hcsdl")
    assert saved.hash == read_index(PlatesConfig(root=str(screen))).hash == report(screen)["index_hash"]
    assert {"QC_Focus_DAPI", "QC_Saturated_Actin", "QC_Foreground_Tubulin", "QC_Problem"} <= set(saved.table)
    chosen = read_index(query)
    assert len(chosen.table) == 47 and not [name for name in chosen.table if name.startswith("QC_")]
    assert chosen.field_name(0) == "Week1_20000/B02/2"


def test_measurements_of_a_part_are_not_taken_for_all(screen):
    check(screen, query="Metadata_Site == 1")
    with pytest.raises(DataError, match="lacks 24 of 48 fields"):
        read_index(PlatesConfig(root=str(screen), query="QC_Focus_DAPI < 0"))


def test_cache_that_cannot_be_written(screen, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "file").write_text("in the way")
    assert check(screen, "files", cache=str(tmp_path / "file" / "cache")) == 0
    assert (tmp_path / "here" / "check.json").is_file() and len(pd.read_parquet(tmp_path / "here" / "index.parquet")) == 48
    assert f"results go to {tmp_path / 'here'}" in capsys.readouterr().out


@pytest.mark.skipif(not REAL_CSV.is_dir(), reason="BBBC021's CSV files are not beside this checkout")
def test_real_csv(tmp_path, capsys):
    assert check(REAL_CSV, "metadata", cache=str(tmp_path)) == 0
    counts = json.loads((tmp_path / "check.json").read_text())["counts"]
    assert counts == {
        "fields": 13200,
        "wells": 3300,
        "plates": 55,
        "batches": 10,
        "compounds": 113,
        "treatments": 906,
        "moas": 12,
        "compounds_with_moa": 38,
        "treatments_with_moa": 103,
        "fields_with_moa": 2528,
        "control_fields": 1320,
    }
