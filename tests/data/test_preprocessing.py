"""Preprocessing: pixels against a plain oracle; fitting, caching, extending, and the state that travels with a checkpoint."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hcsdl.config import ConfigError, DataConfig, DataError, PlatesConfig
from hcsdl.data import preprocessing as module
from hcsdl.data.augmentation import Augmentation
from hcsdl.data.illumination import upsample
from hcsdl.data.preprocessing import Preprocessing, extend, fit_preprocessing
from hcsdl.data.reading import read_field
from hcsdl.plates.index import Index, read_index
from tests.plates.screens import write_screen


def make(channels: int = 3, *, shading: bool = True, crop_px=None, downsample: int = 1) -> Preprocessing:
    random = np.random.default_rng(0)
    grids = random.uniform(0.7, 1.3, (1, channels, 8, 10)).astype(np.float32) if shading else None
    offset, scale = random.uniform(50, 300, (1, channels)).astype(np.float32), random.uniform(0.01, 0.1, (1, channels)).astype(np.float32)
    return Preprocessing(
        channels=tuple("abcdef"[:channels]),
        plates=("p",),
        offset=offset,
        scale=scale,
        pooled_offset=offset[0] + 1,
        pooled_scale=scale[0] * 2,
        dark=offset / 3,
        pooled_dark=offset[0] / 4,
        shading=grids,
        pooled_shading=None if grids is None else grids[0] * 1.1,
        plates_without_control=(),
        illumination="median",
        intensity="dmso_meansd",
        control="DMSO",
        crop_px=crop_px,
        downsample=downsample,
    )


def oracle(made: Preprocessing, image: np.ndarray, a: Augmentation | None) -> np.ndarray:
    """Return what `apply` promises, step by step on copies of whole images in float64."""
    shape = image.shape[1:]
    crop = made.crop_px or shape
    top, left = a.origin_px if a else ((shape[0] - crop[0]) // 2, (shape[1] - crop[1]) // 2)
    d = made.downsample
    size = [side // d * d for side in crop]
    x = image.astype(np.float64)[:, top : top + size[0], left : left + size[1]]
    x = x.reshape(len(x), size[0] // d, d, size[1] // d, d).mean((2, 4))
    shading = np.ones_like(x)
    if made.shading is not None:
        centres = [first + np.arange(0, count, d) + (d - 1) / 2 for first, count in ((top, size[0]), (left, size[1]))]
        shading = np.stack([upsample(grid, *centres, shape) for grid in made.shading[0]])
    if made.shading is not None:
        x = x - made.dark[0][:, None, None]
    x = (x / shading - made.offset[0][:, None, None]) * made.scale[0][:, None, None]
    if a:
        x = np.rot90(x, a.quarter_turns, axes=(1, 2))[:, :: -1 if a.flip_rows else 1, :: -1 if a.flip_columns else 1]
        x = x * np.array(a.gain)[:, None, None] + np.array(a.offset)[:, None, None]
    return x


def change(channels: int, turns: int = 0, rows: bool = False, columns: bool = False, origin=(0, 0)) -> Augmentation:
    gain, offset = tuple(1 + 0.1 * c for c in range(channels)), tuple(0.2 * c - 0.1 for c in range(channels))
    return Augmentation(rows, columns, turns, gain, offset, origin)


@pytest.mark.parametrize("shading", [False, True])
@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint16), (5, np.uint16)])
@pytest.mark.parametrize(("crop", "downsample"), [(None, 1), ((24, 24), 1), (None, 2), ((30, 33), 4)])
def test_apply_is_what_it_promises_in_every_orientation(channels, dtype, shading, crop, downsample):
    """Crop, turns, flips, down-sampling, shading, scaling and jitter together, to float32 rounding, against whole-image numpy."""
    made = make(channels, shading=shading, crop_px=crop, downsample=downsample)
    image = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (channels, 41, 52), dtype=dtype, endpoint=True)
    square = crop == (24, 24)
    cases = [None] + [
        change(channels, turns, rows, columns, (5, 7) if crop else (0, 0))
        for turns in ((0, 1, 2, 3) if square else (0, 2))
        for rows in (False, True)
        for columns in (False, True)
    ]
    for case in cases:
        found, expected = made.apply(image, "p", case), oracle(made, image, case)
        assert found.shape == expected.shape == made.output_shape(image.shape)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max(), rtol=0)
        bits = made.apply(image, "p", case, out=np.empty(found.shape, np.uint16))
        np.testing.assert_array_equal(bits, torch.from_numpy(found).to(torch.bfloat16).view(torch.uint16).numpy())


def test_extremes_of_sixteen_bit_survive_unscaled():
    made = dataclasses.replace(make(1, shading=False), offset=np.zeros((1, 1), np.float32), scale=np.ones((1, 1), np.float32))
    image = np.array([[[0, 65535, 1], [32768, 65534, 255]]], np.uint16)
    np.testing.assert_array_equal(made.apply(image, "p"), image.astype(np.float32))
    averaged = dataclasses.replace(made, downsample=2).apply(np.full((1, 4, 4), 65535, np.uint16), "p")
    np.testing.assert_array_equal(averaged, np.full((1, 2, 2), 65535, np.float32))


def test_out_may_have_any_strides_and_the_image_stays_as_it_is():
    made, image = make(), np.random.default_rng(0).integers(0, 65536, (3, 300, 200), dtype=np.uint16)
    before, out = image.copy(), np.full((300, 200, 3), np.nan, np.float32).transpose(2, 0, 1)
    assert made.apply(image, "p", change(3, 2), out=out) is out
    np.testing.assert_array_equal(out, made.apply(image, "p", change(3, 2)))
    np.testing.assert_array_equal(image, before)


def test_plate_that_was_never_fitted_takes_the_pooled_values():
    made, image = make(shading=False), np.full((3, 8, 8), 1000, np.uint16)
    expected = (1000 - made.pooled_offset) * made.pooled_scale
    np.testing.assert_allclose(made.apply(image, "another")[:, 0, 0], expected, rtol=1e-5)


def test_wrong_number_of_channels_is_explained():
    with pytest.raises(DataError, match="must have the channels a, b, c"):
        make().apply(np.zeros((2, 8, 8), np.uint16), "p")


def test_state_travels_through_a_checkpoint_bit_by_bit():
    """Through torch.save and torch.load(weights_only=True), with and without shading and crop."""
    for made in (make(crop_px=(16, 20), downsample=2), make(1, shading=False)):
        buffer = io.BytesIO()
        torch.save({"preprocessing": made.state_dict()}, buffer)
        buffer.seek(0)
        back = Preprocessing.from_state_dict(torch.load(buffer, weights_only=True)["preprocessing"])
        for item in dataclasses.fields(made):
            one, other = getattr(made, item.name), getattr(back, item.name)
            assert type(one) is type(other)
            assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
        image = np.random.default_rng(0).integers(0, 65536, (len(made.channels), 33, 41), dtype=np.uint16)
        np.testing.assert_array_equal(back.apply(image, "p"), made.apply(image, "p"))


def test_state_of_another_schema_is_refused():
    with pytest.raises(DataError, match="schema version 1. Found 99"):
        Preprocessing.from_state_dict(make().state_dict() | {"schema_version": 99})


# Fitting.


def screen(root: Path, **options) -> Index:
    write_screen(root, **options)
    return read_index(PlatesConfig(root=str(root)))


def fit(index: Index, cache: Path | None = None, workers: int = 2, **settings) -> Preprocessing:
    return fit_preprocessing(index, DataConfig(**settings), "DMSO", cache, False, workers)


def pixels(index: Index, plate: str, made: Preprocessing | None = None) -> np.ndarray:
    """Return all control pixels of a plate, (C, n), raw or as the network sees them."""
    table = index.table
    rows = table.index[(table["Metadata_Plate"] == plate) & (table["Metadata_Compound"] == "DMSO")]
    fields = [read_field(index.paths(row)) for row in rows]
    if made is not None:
        fields = [made.apply(field, plate) for field in fields]
    return np.stack(fields, axis=1).reshape(len(fields[0]), -1).astype(np.float64)


@pytest.mark.parametrize("settings", [{}, {"downsample": 2}, {"illumination": "median"}])
def test_control_pixels_have_mean_zero_and_sd_one_on_every_plate(tmp_path, settings):
    index = screen(tmp_path, wells=25 if "illumination" in settings else 4)
    made = fit(index, **settings)
    for plate in made.plates:
        seen = pixels(index, plate, made)
        assert np.abs(seen.mean(1)).max() < 1e-3
        assert np.abs(seen.std(1) - 1).max() < 1e-3


def test_percentiles_put_the_control_between_zero_and_one(tmp_path):
    index = screen(tmp_path)
    made = fit(index, intensity="dmso_percentiles")
    seen = pixels(index, made.plates[0], made)
    assert ((seen < 0).mean(1) < 0.01).all()
    assert ((seen > 1).mean(1) <= 0.001).all()


def test_none_leaves_pixels_as_they_are_and_needs_no_control(tmp_path):
    index = screen(tmp_path, control_wells=0, dtype="uint8", channels=("only",))
    made = fit(index, intensity="none")
    image = read_field(index.paths(0))
    np.testing.assert_array_equal(made.apply(image, index.table["Metadata_Plate"][0]), image.astype(np.float32))


def test_fit_does_not_depend_on_the_number_of_workers(tmp_path):
    index = screen(tmp_path, wells=25)
    one, three = (fit(index, workers=workers, illumination="mean") for workers in (1, 3))
    assert one.state_dict() == three.state_dict()


def test_plate_without_controls_takes_the_others_together_and_is_listed(tmp_path, caplog):
    index = screen(tmp_path, plates=3)
    lacking = index.table["Metadata_Plate"].iloc[-1]
    keep = (index.table["Metadata_Plate"] != lacking) | (index.table["Metadata_Compound"] != "DMSO")
    made = fit(index.select(keep))
    assert made.plates_without_control == (lacking,)
    assert f"No wells of DMSO on 1 of 3 plates ({lacking})" in caplog.text
    together = np.concatenate([pixels(index, plate) for plate in made.plates if plate != lacking], axis=1)
    at = made.plates.index(lacking)
    np.testing.assert_allclose(made.offset[at], together.mean(1), rtol=1e-5)
    np.testing.assert_allclose(made.scale[at], 1 / together.std(1), rtol=1e-5)


def test_no_control_at_all_and_constant_controls_are_explained(tmp_path):
    index = screen(tmp_path)
    with pytest.raises(DataError, match=r"control compound 'Taxol' \(plates.control\)"):
        fit_preprocessing(index, DataConfig(), "Taxol", None, False, 1)
    for row in index.table.index[index.table["Metadata_Compound"] == "DMSO"]:
        shutil.copy(index.paths(row)[0], index.paths(row)[2])
    blank = index.paths(0)[1]
    for row in range(len(index.table)):
        _write_constant(index.paths(row)[1], blank)
    with pytest.raises(DataError, match=f"Channel Tubulin of plate {index.table['Metadata_Plate'][0]} is constant"):
        fit(index)


def _write_constant(path: Path, like: Path) -> None:
    import tifffile

    tifffile.imwrite(path, np.full_like(tifffile.imread(like), 7))


def test_illumination_needs_fifty_fields(tmp_path):
    with pytest.raises(ConfigError, match="at least 50 fields .* Got 12 on plate"):
        fit(screen(tmp_path), illumination="median")


def test_unreadable_field_stops_the_fit_or_is_left_out(tmp_path, caplog):
    index = screen(tmp_path)
    row = int(index.table.index[index.table["Metadata_Compound"] == "DMSO"][0])
    index.paths(row)[1].write_bytes(b"no image")
    with pytest.raises(DataError, match=f"Field {index.field_name(row)}: .*{index.paths(row)[1].name}"):
        fit(index)
    made = fit(index, on_bad_image="skip")
    assert index.field_name(row) in caplog.text
    assert made.plates_without_control == ()


# Caching.


def test_second_fit_reads_no_image_and_other_settings_fit_anew(tmp_path):
    index, cache = screen(tmp_path / "plates"), tmp_path / "cache"
    first = fit(index, cache)
    for paths in map(index.paths, range(len(index.table))):
        for path in paths:
            path.unlink()
    assert fit(index, cache).state_dict() == first.state_dict()
    cropped = fit(index, cache, crop_px=[8, 8])
    assert cropped.crop_px == (8, 8)
    np.testing.assert_array_equal(cropped.offset, first.offset)
    for other in ({"intensity": "dmso_percentiles"}, {"downsample": 2}, {"illumination": "mean"}):
        with pytest.raises(DataError, match="missing"):
            fit(index, cache, **other)
    with pytest.raises(DataError):
        fit_preprocessing(index, DataConfig(), "compound 0a", cache, False, 1)
    with pytest.raises(DataError, match="missing"):
        fit(index.select(list(range(len(index.table) - 1))), cache)


def test_plates_of_the_same_names_elsewhere_are_other_plates(tmp_path):
    cache = tmp_path / "cache"
    one, other = (screen(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other")))
    assert one.hash == other.hash
    assert (fit(one, cache).offset != fit(other, cache).offset).any()


def test_shading_is_cached_too(tmp_path):
    index, cache = screen(tmp_path / "plates", plates=1, wells=25), tmp_path / "cache"
    first = fit(index, cache, illumination="median")
    for row in range(len(index.table)):
        index.paths(row)[0].unlink()
    assert fit(index, cache, illumination="median").state_dict() == first.state_dict()


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "text"])
def test_corrupt_cache_is_made_anew(tmp_path, caplog, harm):
    index, cache = screen(tmp_path / "plates"), tmp_path / "cache"
    first = fit(index, cache)
    [path] = cache.iterdir()
    content = bytearray(path.read_bytes())
    flipped = content.replace(first.offset.tobytes(), (first.offset + 1).tobytes())
    harmed = {"truncate": content[:-100], "flip": flipped, "empty": b"", "text": b"hello"}
    assert bytes(harmed[harm]) != bytes(content)
    path.write_bytes(harmed[harm])
    assert fit(index, cache).state_dict() == first.state_dict()
    assert "is made anew" in caplog.text
    assert path.read_bytes()[:2] == b"PK"
    assert [one.name for one in cache.iterdir()] == [path.name]


def test_cache_older_than_the_images_is_made_anew(tmp_path, caplog):
    """Plates drawn or copied again into the same folder, under the same names, are other plates."""
    index, cache = screen(tmp_path / "plates"), tmp_path / "cache"
    first = fit(index, cache)
    screen(tmp_path / "plates", seed=1)
    for row in range(len(index.table)):
        os.utime(index.paths(row)[0], (4e9, 4e9))
    assert (fit(index, cache).offset != first.offset).any()
    assert "older than the images" in caplog.text


def test_cache_that_cannot_be_written_is_one_line_no_more(tmp_path, caplog, monkeypatch):
    index = screen(tmp_path / "plates")
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        blocked = tmp_path / "file"
        blocked.write_text("a file where the folder should be")
        made = fit(index, blocked / "cache")
    assert len(caplog.records) == 1
    assert "is not kept for the next run" in caplog.text
    assert made.state_dict() == fit(index).state_dict()


# New plates.


def test_extend_fits_new_plates_only_and_in_the_same_way(tmp_path):
    index = screen(tmp_path, plates=3)
    plates = list(dict.fromkeys(index.table["Metadata_Plate"]))
    known = index.select(index.table["Metadata_Plate"] != plates[2])
    base = fit(known, intensity="dmso_percentiles", downsample=2)
    for row in index.table.index[index.table["Metadata_Plate"] == plates[0]]:
        index.paths(row)[0].unlink()
    both = extend(base, index, False, 1)
    assert both.plates == tuple(plates)
    np.testing.assert_array_equal(both.offset[:2], base.offset)
    np.testing.assert_array_equal(both.pooled_scale, base.pooled_scale)
    alone = fit(index.select(index.table["Metadata_Plate"] == plates[2]), intensity="dmso_percentiles", downsample=2)
    np.testing.assert_array_equal(both.offset[2], alone.offset[0])
    assert extend(both, index, False, 1) is both


def test_extend_with_shading_and_without_controls(tmp_path):
    index = screen(tmp_path, plates=2, wells=26)
    first, second = dict.fromkeys(index.table["Metadata_Plate"])
    base = fit(index.select(index.table["Metadata_Plate"] == first), illumination="mean")
    treated = index.select((index.table["Metadata_Plate"] == second) & (index.table["Metadata_Compound"] != "DMSO"))
    with pytest.raises(ConfigError, match="Got 48 on plate"):
        extend(base, treated, False, 1)
    index.table.loc[index.table["Metadata_Plate"] == second, "Metadata_Compound"] = "none"
    both = extend(base, index, False, 1)
    assert both.shading.shape[0] == 2
    assert both.plates_without_control == (second,)
    np.testing.assert_array_equal(both.offset[1], base.pooled_offset)


def test_extend_refuses_other_channels(tmp_path):
    base = fit(screen(tmp_path / "a"))
    with pytest.raises(DataError, match="channels DAPI, Tubulin, Actin. Found DAPI, Actin"):
        extend(base, screen(tmp_path / "b", channels=("DAPI", "Actin")), False, 1)
