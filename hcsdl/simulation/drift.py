"""What differs from batch to batch, and from well to well, in a screen that ran for months: cells, staining, focus, potency.

In: a seed, a field, a strength. Out: a `Drift`. Promised: it depends on the field's batch, plate and well, and tells nothing of its
treatment; strength 0 is no drift. That screens have it is known (Ljosa 2013, Caicedo 2017); the sizes here are guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hcsdl.simulation.phenotypes import Look

LARGEST_BLUR_PX = 2.0
_BATCH, _WELL = 7, 8  # first words of the seeds of what is random here

# sd of the logarithm of each factor, blur: sd in px
OF_BATCH = {
    "gain": 0.3,
    "background": 0.3,
    "blur": 0.5,
    "density": 0.15,
    "nucleus": 0.06,
    "body": 0.06,
    "elongation": 0.1,
    "rim": 0.2,
    "potency": 0.3,
}
OF_WELL = {
    "gain": 0.2,
    "background": 0.2,
    "blur": 0.3,
    "density": 0.2,
    "nucleus": 0.03,
    "body": 0.04,
    "elongation": 0.04,
    "rim": 0.1,
    "potency": 0.2,
}


@dataclass(frozen=True)
class Drift:
    """What a batch and a well do to their fields: factors, but `blur_px`, which adds to the sd of the blur.

    `gain` and `background` have one number a channel; `potency` multiplies the odds that a treated cell is changed.
    """

    gain: np.ndarray
    background: np.ndarray
    blur_px: float
    density: float
    nucleus_size: float
    body_size: float
    elongation: float
    rim: float
    potency: float

    def of(self, look: Look) -> Look:
        """Return a cell's look here."""
        return replace(
            look,
            nucleus_size=look.nucleus_size * self.nucleus_size,
            body_size=look.body_size * self.body_size,
            elongation=max(1.0, look.elongation * self.elongation),
            rim=min(0.9, look.rim * self.rim),
        )

    def share(self, share: float) -> float:
        """Return the share of changed cells here, of what it usually is."""
        odds = self.potency * share / max(1 - share, 1e-6)
        return odds / (1 + odds)


def drift(seed: int, batch: int, plate: int, well: str, strength: float) -> Drift:
    """Return the drift of a well; `strength` multiplies every sd."""
    found = {}
    levels = (
        (np.random.default_rng([seed, _BATCH, batch]), OF_BATCH),
        (np.random.default_rng([seed, _WELL, plate, *well.encode()]), OF_WELL),
    )
    for name in OF_BATCH:
        channels = 3 if name in ("gain", "background") else 1
        drawn = [strength * sds[name] * rng.standard_normal(channels) for rng, sds in levels]
        found[name] = np.abs(drawn).sum(axis=0) if name == "blur" else np.exp(np.sum(drawn, axis=0))
    return Drift(
        found["gain"],
        found["background"],
        *(float(found[n][0]) for n in ("blur", "density", "nucleus", "body", "elongation", "rim", "potency")),
    )
