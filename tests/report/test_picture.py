"""What every picture promises: files, their names, the same bytes twice, colours that can be told apart."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from hcsdl.report.picture import COLOURS, WIDTH_IN, Picture, encode, looks, safe_name, save, styled

pytestmark = pytest.mark.xeon_only
# Linear RGB as seen without the long-, middle- and short-wave cones: Machado 2009 (doi:10.1109/TVCG.2009.113), severity 1.0.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@styled()
def draw(name: str = "a_picture", **options: object) -> Picture:
    figure = Figure(figsize=(WIDTH_IN, 3))
    figure.subplots().plot([1, 2, 3], label="line")
    return Picture(name, "Lines rise", "Up is more.", figure, **options)


def test_saved_twice_is_the_same_and_carries_its_title(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(draw(), tmp_path / folder)
    for suffix in ("png", "svg"):
        assert (tmp_path / f"a/a_picture.{suffix}").read_bytes() == (tmp_path / f"b/a_picture.{suffix}").read_bytes()
    with Image.open(tmp_path / "a/a_picture.png") as image:
        assert image.width == pytest.approx(WIDTH_IN * 200, abs=1) and image.text["Title"] == "Lines rise"
    assert "Lines rise" in (tmp_path / "a/a_picture.svg").read_text()


def test_page_holds_drawings_as_small_png_and_photographs_as_jpeg(tmp_path):
    png, _ = save(draw(), tmp_path)
    data, mime = encode(png, photographic=False)
    assert mime == "image/png" and data.startswith(b"\x89PNG") and len(data) < png.stat().st_size
    data, mime = encode(png, photographic=True)
    assert mime == "image/jpeg" and data.startswith(b"\xff\xd8")


def test_a_drawing_of_photographs_holds_them_as_jpeg_and_what_is_translucent_as_it_is(tmp_path):
    """A sheet of fields at full resolution weighed 5 MB as SVG; its text stays text."""
    noise = np.random.default_rng(0).random((400, 500, 3))
    sizes = {}
    for photographic in (True, False):
        with styled():
            figure = Figure(figsize=(WIDTH_IN, 3))
            left, right = figure.subplots(1, 2)
            left.imshow(noise)
            right.imshow(noise[:20, :20, 0], alpha=0.5)
            left.set_title("a name")
        _, svg = save(Picture("sheet", "t", "r", figure, photographic=photographic), tmp_path)
        text = svg.read_text()
        sizes[photographic] = len(text)
        assert text.count("data:image/jpeg") == photographic and text.count("data:image/png") == 2 - photographic and ">a name<" in text
    assert sizes[True] < sizes[False] / 2


@pytest.mark.parametrize("text", ["costs $5 and $6", r"$\\frac{$"])
def test_names_with_dollar_signs_are_text(tmp_path, text):
    with styled():
        figure = Figure(figsize=(WIDTH_IN, 3))
        figure.subplots().set_title(text)
    assert f">{text}<" in save(Picture("a", "t", "r", figure), tmp_path)[1].read_text()


@pytest.mark.parametrize("name", ["", "With Space", "a/b", "ä"])
def test_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="lower-case letters"):
        draw(name)


def test_safe_name_can_be_a_name():
    assert safe_name("Eg5 inhibitors / 0.3 µM") == "eg5_inhibitors_0_3_m" and safe_name("µ") == "unnamed"


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_can_be_told_apart_without_one_kind_of_cone(kind):
    """Any two of the palette differ by a tenth of the way from black to white as a colour-blind reader sees them; by half that without blue's cone, which
    one in ten thousand lacks."""
    colours = np.array([to_rgb(c) for c in COLOURS])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(BLINDNESS[kind]).T, 0, 1) ** (1 / 2.2)
    distance = np.linalg.norm(seen[:, None] - seen, axis=2) / np.sqrt(3)
    assert distance[~np.eye(len(COLOURS), dtype=bool)].min() > (0.05 if kind == "tritanopia" else 0.1)


def test_looks_of_many_names_differ_and_do_not_depend_on_order():
    names = [f"mechanism {i}" for i in range(30)] + ["DMSO"]
    found = looks(names)
    assert len(set(found.values())) == 31 and found == looks(names[::-1])
    assert found["DMSO"][0] == "#767676"
