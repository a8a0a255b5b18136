"""Named sizes of a simulation.

In: a `SimulateConfig`, whose null fields mean "as the preset has it". Out: a `Preset` with every number filled in.
Promised: presets are data; a number given in the config always wins over the preset's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hcsdl.config import SimulateConfig


@dataclass(frozen=True)
class Preset:
    """Every number that decides what is drawn, besides the seed, the control's name and the effect.

    `control_wells` is the number of wells of the negative control on every plate; the others are the fields of `SimulateConfig`.
    """

    height_px: int
    width_px: int
    moas: int
    compounds_per_moa: int
    concentrations: int
    replicates: int
    sites: int
    batches: int
    plates_per_batch: int
    control_wells: int


PRESETS = {
    "tiny": Preset(
        height_px=128,
        width_px=160,
        moas=3,
        compounds_per_moa=2,
        concentrations=1,
        replicates=3,
        sites=2,
        batches=1,
        plates_per_batch=3,
        control_wells=2,
    ),
    "demo": Preset(
        height_px=1024,
        width_px=1280,
        moas=6,
        compounds_per_moa=2,
        concentrations=1,
        replicates=6,
        sites=2,
        batches=2,
        plates_per_batch=3,
        control_wells=2,
    ),
}


def resolve(config: SimulateConfig) -> Preset:
    """Return the preset named in `config` with every field that `config` sets put in its place."""
    given = {item.name: getattr(config, item.name, None) for item in fields(Preset)}
    return replace(PRESETS[config.preset], **{name: value for name, value in given.items() if value is not None})
