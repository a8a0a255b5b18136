"""Draws one cell: nucleus, microtubules and actin on three canvases.

In: canvases (float32), a position, a `Look`, a random generator. Out: the canvases, with the cell added.
Promised: a cell's mean brightness over its own area is the same whatever its look; looks differ in shape and arrangement.
"""

from __future__ import annotations

import numpy as np

from hcsdl.simulation.phenotypes import Look
from hcsdl.simulation.textures import window

MARGIN_PX = 110  # half the largest box a cell may take
NUCLEUS_PX, BODY_PX = 20.0, 50.0  # radii of an untreated cell's nucleus and body
_DIRECTIONS = 256
_EDGE = np.arange(-MARGIN_PX, MARGIN_PX + 1, dtype=np.float32)
_RADIUS = np.hypot(_EDGE[:, None], _EDGE[None])
_ANGLE = np.floor((np.arctan2(_EDGE[:, None], _EDGE[None]) / (2 * np.pi) % 1.0) * _DIRECTIONS).astype(np.intp) % _DIRECTIONS
_THETA = np.arange(_DIRECTIONS) * 2 * np.pi / _DIRECTIONS


def draw_cell(canvases: np.ndarray, y: int, x: int, look: Look, rng: np.random.Generator) -> None:
    """Add a cell centred on row `y`, column `x` of `canvases`, float32 (3, rows, columns): DAPI, Tubulin, Actin."""
    angle = rng.uniform(0, np.pi)
    outline = _outline(
        BODY_PX * look.body_size * rng.lognormal(0, 0.12),
        look.elongation * rng.uniform(0.95, 1.15),
        angle,
        look.arms,
        look.arm_depth * rng.uniform(0.7, 1.3),
        rng,
    )
    half = int(min(MARGIN_PX, outline.max() + 3))
    size = 2 * half + 1
    box = slice(MARGIN_PX - half, MARGIN_PX + half + 1)
    place = (slice(y - half, y + half + 1), slice(x - half, x + half + 1))
    reach = outline[_ANGLE[box, box]]
    depth = reach - _RADIUS[box, box]  # px inside the edge, along the radius
    body = np.clip(depth / 3, 0, 1)
    nucleus = _nucleus(look, angle, half, rng)
    tubulin = (0.12 + _tubulin(look, half, angle, rng)) * (1.3 - 0.9 * _RADIUS[box, box] / np.maximum(reach, 1))
    actin = (1 - look.rim) * (0.15 + window(look.actin, size, rng, angle)) + look.rim * 1.8 * np.exp(-(((depth - 4) / 3) ** 2))
    if look.holes:
        vesicles = 1 - 0.85 * np.clip(6 * window("puncta", size, rng) - 3, 0, 1)
        tubulin *= vesicles
        actin *= vesicles
    if look.spot:
        tubulin = (1 - look.spot) * tubulin + look.spot * 2.5 * _blob(half, 15 * np.cos(angle), 15 * np.sin(angle), 9, 7, angle + 1.57)
    canvases[1:, *place] *= 1 - 0.8 * body  # a cell hides most of what lies under it, nuclei excepted
    content = rng.lognormal(0, 0.15, 3)
    for canvas, mask, pattern, amount in zip(canvases, (nucleus > 0, body, body), (nucleus, tubulin, actin), content, strict=True):
        drawn = mask * pattern
        canvas[place] += drawn * np.float32(amount * mask.sum() / max(float(drawn.sum()), 1e-6))


def _outline(radius: float, elongation: float, angle: float, arms: int, depth: float, rng: np.random.Generator) -> np.ndarray:
    """Return an outline, float32 (256,): the distance (px) from the centre to the edge in 256 directions.

    An ellipse of area π radius², with about `arms` uneven waves around it whose relative sd is `depth`.
    """
    long, short = radius * np.sqrt(elongation), radius / np.sqrt(elongation)
    ellipse = long * short / np.hypot(short * np.cos(_THETA - angle), long * np.sin(_THETA - angle))
    orders = np.array([2, arms - 1, arms, arms + 1])[:, None]
    heights = rng.normal(0, 1, 4) * (0.04, depth / 2, depth, depth / 2)
    waves = heights @ np.cos(orders * _THETA + rng.uniform(0, 2 * np.pi, (4, 1)))
    return np.minimum(ellipse * np.exp(waves - (waves**2).mean()), MARGIN_PX - 3).astype(np.float32)


def _blob(half: int, dx: float, dy: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    """Return a soft ellipse, 1 inside and 0 outside, in a box of 2 × half + 1 px."""
    axis = np.arange(-half, half + 1, dtype=np.float32)
    y, x = axis[:, None] - np.float32(dy), axis[None] - np.float32(dx)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = (x * c + y * s) / np.float32(rx), (y * c - x * s) / np.float32(ry)
    return np.clip((1 - np.sqrt(u * u + v * v)) * np.float32(min(rx, ry) / 2), 0, 1)


def _nucleus(look: Look, angle: float, half: int, rng: np.random.Generator) -> np.ndarray:
    """Return the nucleus: its mask times its texture, in the cell's box."""
    radius = NUCLEUS_PX * look.nucleus_size * rng.lognormal(0, 0.08)
    box = slice(MARGIN_PX - half, MARGIN_PX + half + 1)
    if look.nucleus == "oval":
        reach = _outline(radius, 1.25, angle, 3, 0.03, rng)[_ANGLE[box, box]]
        mask = np.clip((reach - _RADIUS[box, box]) / 2, 0, 1)
    else:
        mask = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
        for blob in _parts(look.nucleus, radius, angle, rng):
            np.maximum(mask, _blob(half, *blob), out=mask)
    return mask * (0.35 + window(look.chromatin, 2 * half + 1, rng))


def _parts(kind: str, radius: float, angle: float, rng: np.random.Generator) -> list[tuple[float, float, float, float, float]]:
    """Return the ellipses (x, y, radius, radius, angle) that a nucleus of several parts, or a mitotic one, is made of."""
    if kind == "pair":
        dx, dy = 0.95 * radius * np.cos(angle), 0.95 * radius * np.sin(angle)
        return [(dx, dy, 0.8 * radius, 0.8 * radius, 0), (-dx, -dy, 0.8 * radius, 0.8 * radius, 0)]
    if kind == "plate":
        return [(0, 0, 0.95 * radius, 0.33 * radius, angle)]
    count = {"shards": int(rng.integers(5, 10)), "lobed": int(rng.integers(3, 6)), "rosette": 11, "clump": 9}[kind]
    around = np.arange(count) * 2 * np.pi / count + rng.uniform(0, 0.4, count)
    if kind == "rosette":
        return [(0.62 * radius * np.cos(a), 0.62 * radius * np.sin(a), 0.34 * radius, 0.15 * radius, a) for a in around]
    if kind == "lobed":
        far, size = rng.uniform(0.45, 0.7, count) * radius, rng.uniform(0.42, 0.6, count) * radius
        return [(d * np.cos(a), d * np.sin(a), s, 0.8 * s, a) for a, d, s in zip(around, far, size, strict=True)]
    if kind == "clump":
        far = rng.uniform(0, 0.6, count) * radius
        turned = rng.uniform(0, np.pi, count)
        return [(d * np.cos(a), d * np.sin(a), 0.32 * radius, 0.2 * radius, t) for a, d, t in zip(around, far, turned, strict=True)]
    far, size = rng.uniform(0.35, 1.0, count) * radius, rng.uniform(0.2, 0.45, count) * radius
    return [(d * np.cos(a), d * np.sin(a), s, s, 0) for a, d, s in zip(around, far, size, strict=True)]


def _tubulin(look: Look, half: int, angle: float, rng: np.random.Generator) -> np.ndarray:
    if look.tubulin != "aster":
        return window(look.tubulin, 2 * half + 1, rng, angle).copy()
    rays = np.repeat(rng.random(_DIRECTIONS // 8) ** 2, 8).astype(np.float32)
    rays = (np.roll(rays, 2) + rays + np.roll(rays, -2)) / 3
    box = slice(MARGIN_PX - half, MARGIN_PX + half + 1)
    return rays[_ANGLE[box, box]]
