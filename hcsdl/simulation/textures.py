"""Tiles of random texture that cells are filled with: filaments, bundles, fibres, grains, haze.

In: nothing. Out: `tile(kind, turn)`, a square float32 array that joins itself at its edges, and `window`, a random cut of one.
Promised: every kind has the same histogram, so that textures differ in arrangement and never in brightness; tiles are the same in
every process and for every seed.
"""

from __future__ import annotations

from functools import cache

import numpy as np

SIZE_PX = 512
TURNS = 8  # directions of a directed texture, from 0 to π

# kind → (sd along, sd across in px, ridge width or None). A ridge is the line on which smooth noise crosses zero: a filament.
KINDS: dict[str, tuple[float, float, float | None]] = {
    "smooth": (4.5, 4.5, None),
    "fine": (2.2, 2.2, None),
    "grain": (1.4, 1.4, None),
    "mesh": (5.0, 5.0, 0.16),
    "haze": (12.0, 12.0, None),
    "bundle": (28.0, 4.0, 0.3),
    "fibre": (40.0, 2.2, None),
    "puncta": (3.2, 3.2, None),
    "arc": (18.0, 5.0, 0.2),
}
_ISOTROPIC = {"smooth", "fine", "grain", "mesh", "haze", "puncta"}


@cache
def tile(kind: str, turn: int = 0) -> np.ndarray:
    """Return the tile of a kind: float32 (SIZE_PX, SIZE_PX), values 0 … 1 with density 0.5 / sqrt(v) (mean 1/3); `turn` × π / TURNS is the
    direction of a directed kind."""
    along, across, ridge = KINDS[kind]
    turn = 0 if kind in _ISOTROPIC else turn % TURNS
    rng = np.random.default_rng([3, list(KINDS).index(kind), turn])
    layers = [_noise(rng, along, across, np.pi * turn / TURNS) for _ in range(3 if ridge else 1)]
    if ridge:
        values = np.sum([np.exp(-((layer / ridge) ** 2)) for layer in layers], axis=0) + 0.05 * layers[0]
    elif kind == "puncta":
        values = layers[0] - _noise(rng, 3 * along, 3 * across, 0.0)
    else:
        values = layers[0]
    rank = np.empty(values.size, np.float32)
    rank[np.argsort(values, axis=None, kind="stable")] = np.linspace(0, 1, values.size, dtype=np.float32)
    return (rank**2).reshape(values.shape)


def _noise(rng: np.random.Generator, along: float, across: float, angle: float) -> np.ndarray:
    """Return Gaussian noise, smoothed by `along` × `across` px (sd) in the direction `angle`, with sd 1."""
    fy, fx = np.fft.fftfreq(SIZE_PX)[:, None], np.fft.rfftfreq(SIZE_PX)[None]
    u, v = fx * np.cos(angle) + fy * np.sin(angle), -fx * np.sin(angle) + fy * np.cos(angle)
    smoothing = np.exp(-2 * np.pi**2 * ((along * u) ** 2 + (across * v) ** 2))
    values = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((SIZE_PX, SIZE_PX))) * smoothing, s=(SIZE_PX, SIZE_PX))
    return (values - values.mean()) / values.std()


def window(kind: str, size: int, rng: np.random.Generator, angle: float = 0.0) -> np.ndarray:
    """Return a random cut of `size` × `size` px from a tile, directed kinds along `angle` (radians; rows are y)."""
    values = tile(kind, round(angle / np.pi * TURNS))
    y, x = rng.integers(0, SIZE_PX - size, 2)
    cut = values[y : y + size, x : x + size]
    return cut[::-1, ::-1] if rng.random() < 0.5 else cut
