"""What a report's pictures have in common: name, title, reading, style, files.

In: a matplotlib figure, drawn by one of this package's modules. Out: a `Picture`, its PNG and SVG files, the bytes a page holds. Promised: the
title states the finding, `reading` says in one sentence how to read the picture; colours can be told apart by colour-blind readers, and
where there are more names than colours a marker's shape tells them apart too; text stays readable on a page 500 pixels wide; the same figure
gives the same bytes.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import BinaryIO

import matplotlib
from matplotlib.figure import Figure

WIDTH_IN = 6.4
"""Width of a figure: at 500 px of page its 10.5 pt text is about 10 px high."""

DPI = 200
QUALITY = 85  # of JPEG
EMBEDDED = re.compile(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)")  # an image in matplotlib's SVG

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Okabe and Ito's palette (https://jfly.uni-koeln.de/color), its yellow, too pale on white, replaced by a dark ochre (a guess)."""
GREY = "#767676"  # what is beside the point: baselines, chance, DMSO; contrast 4.5 on white (WCAG)
WARNING = "#D55E00"
SEQUENTIAL = "cividis"  # Nuñez et al. 2018: made to look the same to readers with red-green blindness
DIVERGING = "PuOr_r"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.grid": False,
    "grid.color": "#DDDDDD",
    "image.cmap": SEQUENTIAL,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text, for whoever edits the picture
    "svg.hashsalt": "hcsdl",
    "text.parse_math": False,  # names may hold dollar signs
}


@dataclass(frozen=True)
class Picture:
    """One picture of a report.

    Parameters
    ----------
    name : str
        Stem of its files: lower-case letters, digits and underscores; unique in a report.
    title : str
        The finding, in one sentence without a full stop ("Taxol's plates differ more than its wells"), never only the kind of chart.
    reading : str
        One sentence on how to read it.
    figure : matplotlib Figure
        Drawn, its axes labelled with units; without the title, which the page and the files' readers see beside it.
    photographic : bool
        Made of images: a page holds it as JPEG.
    """

    name: str
    title: str
    reading: str
    figure: Figure
    photographic: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_]+", self.name):
            raise ValueError(f"A picture's name must be lower-case letters, digits and underscores. Got {self.name!r} instead.")

    def _repr_html_(self) -> str:
        """Return the picture as a notebook shows it: its title, the picture, how to read it."""
        png = io.BytesIO()
        with styled():
            self.figure.savefig(png, dpi=DPI, format="png")
        data, mime = encode(png, photographic=self.photographic)
        image = f'<img width="760" alt="{escape(self.title)}" src="data:{mime};base64,{base64.b64encode(data).decode()}">'
        return f"<h4>{escape(self.title)}</h4>{image}<p>{escape(self.reading)}</p>"


def styled() -> AbstractContextManager:
    """Return the style as a context manager; also a decorator: `@styled()` above each function that draws."""
    return matplotlib.rc_context(STYLE)


def looks(names: list[str], *, control: str | None = "DMSO") -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for each name, the same in every picture that is given the same names; the control is grey."""
    others = sorted(set(names) - {control})
    result = {name: (COLOURS[i % len(COLOURS)], MARKERS[(i // len(COLOURS) + i) % len(MARKERS)]) for i, name in enumerate(others)}
    if control in names:
        result[control] = (GREY, ".")
    return result


def safe_name(text: str) -> str:
    """Return `text` as the stem of a picture's files."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "unnamed"


def save(picture: Picture, folder: Path) -> tuple[Path, Path]:
    """Write `<folder>/<name>.png` and `.svg` and return their paths; the images of photographic drawings are JPEG. Raises OSError."""
    paths = folder / f"{picture.name}.png", folder / f"{picture.name}.svg"
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in a script that the font lacks; the page's text has it
        picture.figure.savefig(paths[0], dpi=DPI, metadata={"Title": picture.title, "Description": picture.reading, "Software": None})
        drawing = io.StringIO()
        metadata = {"Title": picture.title, "Description": picture.reading, "Date": None}
        picture.figure.savefig(drawing, dpi=DPI, format="svg", metadata=metadata)
    text = drawing.getvalue()
    paths[1].write_text(EMBEDDED.sub(_as_jpeg, text) if picture.photographic else text, encoding="utf-8")
    return paths


def _as_jpeg(found: re.Match) -> str:
    """Return an image embedded in a drawing as JPEG, where it is opaque: a tenth of the size."""
    from PIL import Image

    result = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as image:
        if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < 255:
            return found[0]
        image.convert("RGB").save(result, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(result.getvalue()).decode()}"


def encode(png: Path | BinaryIO, *, photographic: bool) -> tuple[bytes, str]:
    """Return a saved picture as a page holds it, and its MIME type: a JPEG file where it is photographic, else a PNG file of 256 colours."""
    from PIL import Image

    result = io.BytesIO()
    with Image.open(png) as opened:
        image = opened.convert("RGB")
    if photographic:
        image.save(result, "JPEG", quality=QUALITY)
        return result.getvalue(), "image/jpeg"
    image.quantize(256, dither=Image.Dither.NONE).save(result, "PNG", optimize=True)
    return result.getvalue(), "image/png"
