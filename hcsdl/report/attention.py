"""A network's attention over whole fields, drawn.

In: fields with the heat maps of `hcsdl.training.attention.grad_cam`. Out: a `Picture`. Promised: the map is laid over the field at full resolution, on the
pixels its points stand for; the field stands beside it, so that nothing is hidden by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from scipy.ndimage import map_coordinates

from hcsdl.plates.quality import otsu_threshold
from hcsdl.report.fields import FieldView, caption, composite, contrast, grey, scale_bar, show, smaller
from hcsdl.report.picture import WIDTH_IN, Picture, styled

HEAT = "magma"  # runs evenly from dark to light, for colour-blind readers too
NEAR = 1.5  # attention per pixel of the cells over that of the background from which it is said to lie on the cells. A guess


def spread_heat(heat: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a map (h, w) on an image of `shape` rows and columns, float32: linear between the centres of the pixels its points stand for."""
    rows = ((np.arange(shape[0]) + 0.5) * heat.shape[0] / shape[0] - 0.5).clip(0, heat.shape[0] - 1)
    columns = ((np.arange(shape[1]) + 0.5) * heat.shape[1] / shape[1] - 0.5).clip(0, heat.shape[1] - 1)
    grid = np.meshgrid(rows, columns, indexing="ij")
    return map_coordinates(heat.astype(np.float32), grid, order=1)


def share_on_cells(image: np.ndarray, heat: np.ndarray) -> tuple[float, float]:
    """Return the share of the attention that lies on cells, and the share of pixels that are cells: brighter than Otsu's threshold in some channel.

    Both nan where the map is zero.
    """
    cells = np.zeros(image.shape[1:], dtype=bool)
    for plane in image:
        low, high = np.percentile(plane[::4, ::4], (0.1, 99.9))
        levels = ((plane - low) / max(high - low, 1e-6) * 255).clip(0, 255).astype(np.uint8)
        cells |= levels > otsu_threshold(np.bincount(levels.ravel(), minlength=256))
    weight = spread_heat(heat, image.shape[1:])
    if not weight.any():
        return np.nan, np.nan
    return float(weight[cells].sum() / weight.sum()), float(cells.mean())


@styled()
def attention_picture(
    views: Sequence[FieldView], *, pixel_size_um: float | None = None, name: str = "attention", unit: str = "the predicted class"
) -> Picture:
    """Return fields, whole, and beside each where in it the network finds what speaks for a class.

    Parameters
    ----------
    views : at least one, all with `heat` (h, w), 0 … 1.
    pixel_size_um : edge of a pixel in µm; None: unknown.
    unit : which class the maps are of.
    """
    limits = contrast([view.image for view in views])
    shape = views[0].image.shape[1:]
    figure = Figure(figsize=(WIDTH_IN, WIDTH_IN / 2 * shape[0] / shape[1] * len(views) + 0.75))
    figure.get_layout_engine().set(w_pad=0.012, h_pad=0.012, wspace=0.0, hspace=0.0)
    grid = figure.subplots(len(views), 2, squeeze=False)
    drawn = None
    for (left, right), view in zip(grid, views, strict=True):
        shape = view.image.shape[1:]
        show(left, smaller(composite(view.image, limits), 640), shape)
        caption(left, shape, view.caption)
        scale_bar(left, shape, pixel_size_um)
        show(right, smaller(grey(view.image, limits).mean(axis=0), 640), shape)
        heat = smaller(spread_heat(view.heat, shape), 640)
        drawn = right.imshow(heat, cmap=HEAT, vmin=0, vmax=1, alpha=0.25 + 0.45 * heat, extent=(0, shape[1], shape[0], 0))
    scale = ScalarMappable(drawn.norm, drawn.cmap)
    figure.colorbar(
        scale, ax=list(grid[-1]), location="bottom", shrink=0.6, aspect=40, pad=0.02, label="attention (share of the field's highest)"
    )
    reading = (
        f"Left, what the network is given of a field; right, in bright colours what of it speaks for {unit} (Grad-CAM, a point of the network's last map stands for "
        f"{shape[0] // views[0].heat.shape[0]} pixels a side): it should lie on cells, not on empty ground, dirt or the field's rim."
    )
    return Picture(name, _title(views), reading, figure, photographic=True)


def _title(views: Sequence[FieldView]) -> str:
    shares = np.array([share_on_cells(view.image, view.heat) for view in views])
    shares = shares[~np.isnan(shares[:, 0])]
    if not len(shares):
        return "Nothing in these fields speaks for the class: the network decides by what is missing"
    on, cells = shares.mean(axis=0)
    density = on / max(cells, 1e-9) / max((1 - on) / max(1 - cells, 1e-9), 1e-9)
    figures = f"{on:.0%} of its attention is on the {cells:.0%} of pixels that are cells"
    if density >= NEAR:
        return f"The network looks at cells: {figures}"
    if density <= 1 / NEAR:
        return f"The network looks beside the cells: only {figures}"
    return f"The network looks at cells and ground alike: {figures}"
