"""Measuring an index: aligned, parallel, cached, and never stopped by a bad image."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from hcsdl.config import PlatesConfig
from hcsdl.data import measure
from hcsdl.data.measure import breaks_training, count_problems, measure_index
from hcsdl.data.reading import read_field
from hcsdl.plates.index import Index, read_index
from hcsdl.plates.quality import measure_field
from tests.plates.screens import write_screen

pytestmark = pytest.mark.xeon_only


@pytest.fixture
def index(tmp_path: Path) -> Index:
    write_screen(tmp_path / "screen", plates=2, wells=10)
    return read_index(PlatesConfig(root=str(tmp_path / "screen")))


def measured(index: Index, **options: object) -> pd.DataFrame:
    return measure_index(index, **{"workers": 1, "progress": False} | options)


def test_rows_are_the_index_rows(index):
    table = measured(index)
    assert len(table) == len(index.table) == 40 and table["QC_Problem"].isna().all()
    for row in (0, 17, 39):
        expected = measure_field(read_field(index.paths(row)), index.channels)
        assert {name: table.at[row, name] for name in expected} == expected
    assert set(table["QC_Height"]) == {32} and set(table["QC_Width"]) == {40} and set(table["QC_Dtype"]) == {"uint16"}


def test_processes_give_what_one_gives(index, monkeypatch):
    monkeypatch.setattr(measure, "ALONE", 0)
    pd.testing.assert_frame_equal(measured(index, workers=2), measured(index))
    pd.testing.assert_frame_equal(measured(index, workers=3, level="files"), measured(index, level="files"))


def spoil(index: Index) -> dict[int, str]:
    """Spoil some images; return the start of the problem of each row hit."""
    index.paths(0)[1].unlink()
    index.paths(5)[0].write_bytes(b"no image")
    path = index.paths(9)[2]
    path.write_bytes(path.read_bytes()[:1500])
    for path in index.paths(12):
        tifffile.imwrite(path, np.ones((30, 40), "uint16"))
    tifffile.imwrite(index.paths(15)[1], np.ones((32, 40), "uint8"))
    tifffile.imwrite(index.paths(20)[0], np.zeros((32, 40), "uint16"))
    tifffile.imwrite(index.paths(25)[0], np.repeat(np.uint16([[65535], [7]]), 40, 1).repeat(16, 0))
    return {
        0: "missing: ",
        5: "unreadable: ",
        9: "unreadable: ",
        12: "wrong shape: 30 x 40 uint16, most fields are 32 x 40 uint16",
        15: "wrong shape: the channels differ, DAPI 32 x 40 uint16, Tubulin 32 x 40 uint8",
        20: "constant: every pixel of DAPI is 0.",
        25: "saturated: 50% of DAPI",
    }


@pytest.mark.parametrize("level", ["files", "pixels"])
def test_bad_images_are_named_and_do_not_stop_the_pass(index, level):
    expected = {row: text for row, text in spoil(index).items() if level == "pixels" or not text.startswith(("constant", "saturated"))}
    problems = measured(index, level=level)["QC_Problem"]
    assert set(problems.index[problems.notna()]) == set(expected)
    assert all(problems[row].startswith(text) for row, text in expected.items())
    assert index.paths(0)[1].name in problems[0] and index.paths(9)[2].name in problems[9]
    assert set(problems.index[breaks_training(problems)]) == {0, 5, 9, 12, 15} | ({20} if level == "pixels" else set())
    pixels = int(level == "pixels")
    assert count_problems(problems) == {"missing": 1, "unreadable": 2, "wrong shape": 2, "constant": pixels, "saturated": pixels}


def test_every_image_missing(index):
    for row in range(len(index.table)):
        for path in index.paths(row):
            path.unlink()
    assert count_problems(measured(index)["QC_Problem"])["missing"] == 40


def test_cache_measures_only_what_changed(index, tmp_path, monkeypatch):
    """A replaced image, and one that was missing, are measured again; so is nothing else, also of a part of the index."""
    cache = tmp_path / "cache"
    away = index.paths(30)[0].rename(tmp_path / "away.tif")
    first = measured(index, cache=cache)
    assert first["QC_Problem"].notna().sum() == 1
    tifffile.imwrite(index.paths(3)[0], np.full((32, 40), 500, "uint16") + np.arange(40, dtype="uint16"))
    away.rename(index.paths(30)[0])
    measured_now: list[str] = []
    one = measure._measure_one
    monkeypatch.setattr(measure, "_measure_one", lambda paths, *rest: measured_now.append(paths[0].name) or one(paths, *rest))
    second = measured(index, cache=cache)
    assert measured_now == [index.paths(row)[0].name for row in (3, 30)]
    pd.testing.assert_frame_equal(second, measured(index))
    measured_now.clear()
    part = index.select(index.table["Metadata_Site"] == 2)
    pd.testing.assert_frame_equal(measured(part, cache=cache), measured(part))
    assert len(measured_now) == 20  # by the second call alone, which has no cache


def test_cache_that_cannot_be_used(index, tmp_path, caplog):
    """A folder that cannot be written and a file that cannot be read cost a line in the log each, no more."""
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        table = measured(index, cache=tmp_path / "file" / "cache", level="files")
    assert len(table) == 40 and "Measurements are not kept" in caplog.text
    (tmp_path / "cache").mkdir()
    measure._cache_file(tmp_path / "cache", "files").write_text("no parquet")
    with caplog.at_level(logging.WARNING):
        assert len(measured(index, cache=tmp_path / "cache", level="files")) == 40
    assert "Earlier measurements are ignored" in caplog.text
