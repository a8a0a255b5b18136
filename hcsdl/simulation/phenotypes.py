"""What each mechanism of action does to a cell, as its biology has it.

In: a MoA and a compound. Out: `looks(moa, compound)`, pairs of (share of the changed cells, `Look`).
Promised: data only; untreated cells have `UNTREATED`; compounds of one MoA have the same looks with shares and sizes a little apart,
fixed by the compound's name alone. Shapes follow Caie 2010 and Ljosa 2013 in words; the numbers are guesses.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cache

import numpy as np


@dataclass(frozen=True)
class Look:
    """The kind of a cell: what its nucleus, body, microtubules and actin look like. Sizes are relative to an untreated cell's."""

    nucleus: str = "oval"  # oval, lobed, pair, shards (micronuclei), plate (metaphase), rosette (monopolar), clump (arrested)
    nucleus_size: float = 1.0
    chromatin: str = "smooth"  # texture
    body_size: float = 1.0
    elongation: float = 1.25
    arms: int = 3
    arm_depth: float = 0.08
    tubulin: str = "mesh"  # texture, or `aster`
    actin: str = "fibre"  # texture
    rim: float = 0.25  # share of the actin at the cell's edge
    spot: float = 0.0  # share of the tubulin in one body beside the nucleus (aggresome)
    holes: bool = False  # vesicles


UNTREATED = ((0.96, Look()), (0.04, Look("plate", body_size=0.62, elongation=1.05, arm_depth=0.02, tubulin="aster", actin="fine", rim=0.5)))
_ROUND = Look(body_size=0.72, elongation=1.05, arm_depth=0.02, actin="fine", rim=0.5)

PHENOTYPES: dict[str, tuple[tuple[float, Look], ...]] = {
    "Microtubule stabilizers": ((0.8, Look("shards", 1.1, tubulin="bundle")), (0.2, replace(_ROUND, nucleus="clump", tubulin="bundle"))),
    "Actin disruptors": (
        (0.8, Look("oval", body_size=0.92, arms=5, arm_depth=0.4, tubulin="fine", actin="puncta", rim=0.02)),
        (0.2, Look("pair", body_size=0.92, arms=5, arm_depth=0.35, tubulin="fine", actin="puncta", rim=0.02)),
    ),
    "Eg5 inhibitors": ((0.85, replace(_ROUND, nucleus="rosette", tubulin="aster")), (0.15, Look("lobed", 1.1))),
    "Aurora kinase inhibitors": (
        (0.85, Look("lobed", 1.5, "grain", body_size=1.12, actin="arc")),
        (0.15, Look("pair", 1.2, "grain", body_size=1.1, actin="arc")),
    ),
    "Epithelial": ((1.0, Look(body_size=0.9, elongation=1.1, arms=6, arm_depth=0.04, tubulin="fine", actin="smooth", rim=0.8)),),
    "Microtubule destabilizers": (
        (0.4, Look("lobed", 0.95, body_size=0.9, tubulin="haze", arms=5, arm_depth=0.15)),
        (0.6, replace(_ROUND, nucleus="clump", tubulin="haze")),
    ),
    "Protein degradation": ((1.0, Look("oval", 0.9, "fine", body_size=0.9, spot=0.25, holes=True, actin="smooth")),),
    "DNA damage": ((1.0, Look("oval", 1.6, "puncta", body_size=1.3, elongation=1.15)),),
    "Cholesterol-lowering": (
        (0.8, Look("oval", 0.85, elongation=2.6, arms=2, arm_depth=0.2, tubulin="bundle", actin="smooth", rim=0.4)),
        (0.2, replace(_ROUND, tubulin="mesh")),
    ),
    "DNA replication": ((1.0, Look("oval", 1.3, "grain", body_size=1.1, elongation=1.45)),),
    "Protein synthesis": ((1.0, Look("oval", 0.8, "smooth", body_size=0.8, tubulin="smooth", actin="haze", rim=0.15)),),
    "Kinase inhibitors": ((1.0, Look("oval", 1.0, body_size=1.1, arms=9, arm_depth=0.13, actin="arc", rim=0.6)),),
}


@cache
def looks(moa: str, compound: str) -> tuple[tuple[float, Look], ...]:
    """Return the looks of the cells that `compound` changes, with their shares (they sum to 1)."""
    rng = np.random.default_rng(zlib.crc32(compound.encode()))
    shares = np.array([share for share, _ in PHENOTYPES[moa]]) * rng.uniform(0.8, 1.25, len(PHENOTYPES[moa]))
    nucleus, body, length, rim = rng.uniform(0.92, 1.08, 4)
    changed = [
        replace(
            look,
            nucleus_size=look.nucleus_size * nucleus,
            body_size=look.body_size * body,
            elongation=max(1.0, look.elongation * length),
            rim=min(0.9, look.rim * rim),
        )
        for _, look in PHENOTYPES[moa]
    ]
    return tuple(zip((shares / shares.sum()).tolist(), changed, strict=True))
