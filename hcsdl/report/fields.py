"""Fields of view as pictures: which were predicted best and worst, and sheets that show them.

In: predictions and images, as stored or as the network sees them. Out: tables of chosen fields, `Picture`s. Promised: a field is shown whole, and a part of
it pixel by pixel; one contrast per channel holds for all fields of a picture; a scale bar is in µm where the pixel size is known, else in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hcsdl.config import DataError
from hcsdl.data.preprocessing import Preprocessing
from hcsdl.data.reading import read_field
from hcsdl.plates.index import Index
from hcsdl.plates.tables import KEYS
from hcsdl.report.picture import DPI, WIDTH_IN, Picture, styled

COLOURS = np.array([[0.1, 0.4, 1.0], [0.75, 0.8, 0.0], [1.0, 0.1, 0.6], [0.0, 0.75, 0.55]])
"""Light of the first channels: blue, yellow, rose, green. Blue against the others is what readers with red-green blindness tell apart best; the
single channels stand beside the mixture in grey, so that nobody depends on its colours."""
LIGHTS = ("blue", "yellow", "rose", "green")
LOW, HIGH = 1.0, 99.8  # percentiles a channel's contrast goes between; usual in fluorescence, exact values a guess
CROP_PX = (210, 380)  # rows and columns of the part shown pixel by pixel: what fits beside a field


@dataclass(frozen=True)
class FieldView:
    """A field to show: `image` (C, H, W), as stored or preprocessed; `caption`, up to three short lines; `heat` (h, w) of a network's attention, or None."""

    image: np.ndarray
    caption: str
    heat: np.ndarray | None = None


def predicted_fields(rows: pd.DataFrame, probabilities: pd.DataFrame, target: str, *, split: str | None = "val") -> pd.DataFrame:
    """Return what the network says of each field that has a class, the surest right ones first and the surest wrong ones last.

    Parameters
    ----------
    rows : metadata of fields (N, …).
    probabilities : (N, K), columns named by class.
    target : metadata column of the labels.
    split : Metadata_Split that counts; None, or a table that knows no split: all.

    Returns
    -------
    DataFrame : the rows' metadata, Label, Predicted, Probability (of the predicted class), Label_Probability; sorted by the latter.
    """
    place = {name: number for number, name in enumerate(probabilities.columns)}
    values = probabilities.to_numpy(dtype=np.float64)
    good = rows[target].isin(place).to_numpy() & ~np.isnan(values).any(axis=1)
    if split is not None and "Metadata_Split" in rows:
        good &= (rows["Metadata_Split"] == split).to_numpy()
    values, found = values[good], rows[good].reset_index(drop=True)
    labels = found[target].map(place).to_numpy(dtype=int)
    found["Label"] = found[target].astype(str)
    found["Predicted"] = np.array(list(place), dtype=object)[values.argmax(axis=1)] if len(found) else ""
    found["Probability"] = values.max(axis=1, initial=0.0)
    found["Label_Probability"] = values[np.arange(len(found)), labels]
    return found.sort_values("Label_Probability", ascending=False, kind="stable", ignore_index=True)


def best_and_worst(predicted: pd.DataFrame, number: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the `number` best and worst fields of `predicted_fields`: of every class, or of every confusion, one first, so that four fields tell four things."""

    def spread(fields: pd.DataFrame) -> pd.DataFrame:
        fields = fields.assign(turn=fields.groupby(["Label", "Predicted"]).cumcount())
        return fields.sort_values("turn", kind="stable").head(number).drop(columns="turn").reset_index(drop=True)

    right = predicted["Label"] == predicted["Predicted"]
    return spread(predicted[right]), spread((predicted[~right] if (~right).any() else predicted)[::-1])


def read_fields(index: Index, rows: pd.DataFrame, preprocessing: Preprocessing | None = None) -> list[np.ndarray]:
    """Read the fields that `rows` (Metadata_Plate, _Well, _Site) name: (C, H, W) each, as stored, or float32 as the network sees them.

    Raises
    ------
    DataError : the index has no such field, or it cannot be read.
    """
    place = {tuple(map(str, key)): row for row, key in enumerate(index.table[KEYS].itertuples(index=False))}
    images = []
    for key in rows[KEYS].itertuples(index=False):
        row = place.get(tuple(map(str, key)))
        if row is None:
            raise DataError(
                f"A field to show must be in the plates. {'/'.join(map(str, key))} is not in {index.root}: give the plates the table was made of."
            )
        image = read_field(index.paths(row))
        images.append(image if preprocessing is None else preprocessing.apply(image, str(key[0])))
    return images


def contrast(images: Sequence[np.ndarray]) -> np.ndarray:
    """Return the values shown black and white, (C, 2) float64: the 1st and 99.8th percentile of each channel over all images, every 4th pixel a side of them."""
    limits = np.array(
        [np.percentile(np.concatenate([image[c, ::4, ::4].ravel() for image in images]), (LOW, HIGH)) for c in range(len(images[0]))]
    )
    limits[:, 1] = np.maximum(limits[:, 1], limits[:, 0] + 1e-6)
    return limits


def grey(image: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return channels (C, H, W) stretched to 0 … 1, float32."""
    low, high = limits[:, 0, None, None], limits[:, 1, None, None]
    return ((image - low) / (high - low)).clip(0, 1).astype(np.float32)


def composite(image: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return the mixture of the first four channels, each in its own light: (H, W, 3) float32, 0 … 1; one channel stays grey."""
    channels = grey(image, limits)[: len(COLOURS)]
    if len(channels) == 1:
        return np.repeat(channels[0][:, :, None], 3, axis=2)
    return np.einsum("chw,cr->hwr", channels, COLOURS[: len(channels)].astype(np.float32)).clip(0, 1)


def smaller(picture: np.ndarray, width_px: int) -> np.ndarray:
    """Return (H, W, …) averaged over whole blocks to not less than `width_px` columns."""
    step = max(1, picture.shape[1] // width_px)
    height, width = picture.shape[0] // step * step, picture.shape[1] // step * step
    blocks = picture[:height, :width].reshape(height // step, step, width // step, step, *picture.shape[2:])
    return blocks.mean(axis=(1, 3))


def middle(shape: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Return the middle part of an image of `shape` rows and columns, of `size` or as much as there is."""
    parts = [min(have, want) for have, want in zip(shape, size, strict=True)]
    starts = [(have - part) // 2 for have, part in zip(shape, parts, strict=True)]
    return slice(starts[0], starts[0] + parts[0]), slice(starts[1], starts[1] + parts[1])


def show(axes: Axes, picture: np.ndarray, shape: tuple[int, int]) -> None:
    """Show (h, w[, 3]) on `axes` without frame, in coordinates of an image of `shape` rows and columns."""
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(0, shape[1], shape[0], 0), interpolation="antialiased")
    axes.set_axis_off()


def scale_bar(axes: Axes, shape: tuple[int, int], pixel_size_um: float | None, *, share: float = 0.22) -> None:
    """Draw a bar of a round length, near `share` of the width of an image of `shape` rows and columns, and write what it is."""
    unit, size = ("px", 1.0) if pixel_size_um is None else ("µm", pixel_size_um)
    length = _round_length(shape[1] * share * size)
    width = length / size
    right, bottom = shape[1] * 0.96, shape[0] * 0.945
    for colour, thick in (("black", 5.0), ("white", 2.6)):
        axes.plot([right - width, right], [bottom, bottom], color=colour, linewidth=thick, solid_capstyle="butt")
    _write(axes, right - width / 2, bottom - shape[0] * 0.03, f"{length:g} {unit}", horizontal="center", vertical="bottom")


def _round_length(length: float) -> float:
    """Return the largest of 1, 2, 5 × a power of ten not above `length`."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(max(step * power for step in (1, 2, 5) if step * power <= length * (1 + 1e-9)))


def _write(axes: Axes, x: float, y: float, text: str, *, horizontal: str = "left", vertical: str = "top", size: float = 8.5) -> None:

    effects = [patheffects.withStroke(linewidth=2.2, foreground="black")]
    axes.text(x, y, text, color="white", fontsize=size, ha=horizontal, va=vertical, path_effects=effects, clip_on=True)


def caption(axes: Axes, shape: tuple[int, int], text: str, size: float = 8.5) -> None:
    """Write `text` into the upper left corner of an image of `shape` rows and columns."""
    _write(axes, shape[1] * 0.02, shape[0] * 0.02, text, size=size)


@styled()
def fields_picture(
    views: Sequence[FieldView],
    channels: Sequence[str],
    *,
    name: str,
    title: str,
    pixel_size_um: float | None = None,
    scaled: bool = False,
) -> Picture:
    """Return a sheet: a field a row, whole on the left, a part of it pixel by pixel on the right: the mixture, and every channel in grey.

    Parameters
    ----------
    views : at least one, all of one number of channels; every channel's contrast is theirs together.
    channels : C names.
    pixel_size_um : edge of a pixel in µm; None: unknown.
    scaled : whether the images went through a network's preprocessing, which the picture's reader must know.
    """
    limits = contrast([view.image for view in views])
    panels = [None, *range(len(channels))] if len(channels) > 1 else [0]
    down = 1 if len(panels) == 1 else 2
    across = -(-len(panels) // down)
    shape = views[0].image.shape[1:]
    left_in = WIDTH_IN * 0.4
    height_in = left_in * shape[0] / shape[1]
    figure = Figure(figsize=(WIDTH_IN, height_in * len(views) + 0.06 * len(views)))
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.012, wspace=0.0, hspace=0.0)
    size = _crop_size(height_in / down, (WIDTH_IN - left_in) / across)
    for view, part in zip(views, np.atleast_1d(figure.subfigures(len(views), 1)), strict=True):
        whole, parts = part.subfigures(1, 2, width_ratios=[left_in, WIDTH_IN - left_in])
        shape = view.image.shape[1:]
        crop = middle(shape, size)
        axes = whole.subplots()
        show(axes, smaller(composite(view.image, limits), 512), shape)
        box = (crop[1].start, crop[0].start, crop[1].stop - crop[1].start, crop[0].stop - crop[0].start)

        axes.add_patch(Rectangle(box[:2], *box[2:], fill=False, edgecolor="white", linewidth=0.9))
        caption(axes, shape, view.caption, 8)
        scale_bar(axes, shape, pixel_size_um)
        piece = view.image[:, crop[0], crop[1]]
        for number, (axes, channel) in enumerate(zip(parts.subplots(down, across, squeeze=False).ravel(), panels, strict=False)):
            picture = composite(piece, limits) if channel is None else grey(piece, limits)[channel]
            show(axes, picture, piece.shape[1:])
            caption(axes, piece.shape[1:], "all channels" if channel is None else channels[channel])
            if number == len(panels) - 1:
                scale_bar(axes, piece.shape[1:], pixel_size_um)
    return Picture(name, title, _reading(channels, scaled), figure, photographic=True)


def _crop_size(height_in: float, width_in: float) -> tuple[int, int]:
    """Return rows and columns of an image that fill a panel pixel by pixel at the picture's resolution."""
    return int(height_in * DPI), int(width_in * DPI)


def _reading(channels: Sequence[str], scaled: bool) -> str:
    colours = ", ".join(f"{channel} {colour}" for channel, colour in zip(channels, LIGHTS, strict=False))
    mixture = f" ({colours})" if len(channels) > 1 else ""
    return (
        f"Left, the whole field{mixture}; right, the part in the box pixel by pixel, all channels and each in grey; black and white are "
        f"the {LOW:g}st and {HIGH:g}th percentile of a channel over all fields of the picture"
        + (", scaled plate by plate as the network gets them" if scaled else ", as stored")
        + ", so that fields can be compared."
    )


def _lines(row: object) -> str:
    place = f"{row.Metadata_Plate} {row.Metadata_Well}" + (f" site {row.Metadata_Site}" if hasattr(row, "Metadata_Site") else "")
    what = f"{row.Metadata_Treatment} ({row.Label})" if row.Metadata_Treatment != row.Label else row.Label
    own = "" if row.Predicted == row.Label else f", own class {row.Label_Probability:.2f}"
    return f"{place}\n{what}\nsays {row.Predicted} {row.Probability:.2f}{own}"


def prediction_pictures(
    best: pd.DataFrame,
    worst: pd.DataFrame,
    images: Sequence[np.ndarray],
    channels: Sequence[str],
    *,
    pixel_size_um: float | None = None,
    scaled: bool = False,
) -> list[Picture]:
    """Return the sheets of the best and of the worst predicted fields; of a group without fields, none.

    Parameters
    ----------
    best, worst : of `best_and_worst`.
    images : their fields, best first.
    scaled : whether they went through a network's preprocessing.
    """
    how = {"pixel_size_um": pixel_size_um, "scaled": scaled}
    views = [FieldView(image, _lines(row)) for row, image in zip([*best.itertuples(), *worst.itertuples()], images, strict=True)]
    pictures = []
    if len(best):
        classes = list(dict.fromkeys(best["Label"]))
        title = f"Surest and right: {_listed(classes)}, each field with {best['Label_Probability'].min():.2f} or more for its own class"
        pictures.append(fields_picture(views[: len(best)], channels, name="fields_best", title=title, **how))
    if len(worst):
        pictures.append(fields_picture(views[len(best) :], channels, name="fields_worst", title=_worst_title(worst), **how))
    return pictures


def _worst_title(worst: pd.DataFrame) -> str:
    wrong = worst[worst["Label"] != worst["Predicted"]]
    if wrong.empty:
        return f"No field is misread; the least sure give their own class {worst['Label_Probability'].min():.2f} to {worst['Label_Probability'].max():.2f}"
    first = wrong.iloc[0]
    return f"Surest and wrong: {first['Label']} taken for {first['Predicted']} with {first['Probability']:.2f}" + (
        "" if len(wrong) < 2 else f", and {len(wrong) - 1} other{'s' if len(wrong) > 2 else ''}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
