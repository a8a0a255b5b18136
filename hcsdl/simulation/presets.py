"""Named sizes of a simulation.

In: a `SimulateConfig`, whose null fields mean "as the preset has it". Out: a `Preset` with every number filled in.
Promised: presets are data; a number given in the config always wins over the preset's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hcsdl.config import ConfigError, SimulateConfig


@dataclass(frozen=True)
class Preset:
    """Every number that decides what is drawn, besides the seed, the control's name and the effect.

    `control_wells` is the number of wells of the negative control on every plate. With `plate_map` treatments stand where BBBC021 has them,
    with `taxol_wells` of the positive control on every plate, and replicates, batches and plates are the map's; `batch_effect` is the strength
    of the drift from batch to batch. The others are the fields of `SimulateConfig`. None is "not in this preset".
    """

    height_px: int
    width_px: int
    moas: int
    compounds_per_moa: int
    concentrations: int
    replicates: int | None
    sites: int
    batches: int | None
    plates_per_batch: int | None
    control_wells: int
    plate_map: bool | None = None
    taxol_wells: int | None = None
    batch_effect: float | None = None


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

# BBBC021's labelled treatments where it has them, in small: no plate of controls alone, 2 of 6 taxol wells, 2 of 4 sites.
_LIKE = Preset(
    height_px=1024,
    width_px=1280,
    moas=12,
    compounds_per_moa=4,
    concentrations=7,
    replicates=None,
    sites=2,
    batches=None,
    plates_per_batch=None,
    control_wells=6,
    plate_map=True,
    taxol_wells=2,
    batch_effect=1.0,
)
PRESETS |= {
    "bbbc021_like": _LIKE,
    "bbbc021_reduced": replace(_LIKE, height_px=512, width_px=640, taxol_wells=1),
    "bbbc021_tiny": replace(
        _LIKE, height_px=128, width_px=160, sites=1, moas=3, compounds_per_moa=2, concentrations=1, control_wells=2, taxol_wells=1
    ),
}


def resolve(config: SimulateConfig) -> Preset:
    """Return the preset named in `config` with every field that `config` sets put in its place.

    Raises
    ------
    ConfigError
        If one is set that the preset's plate map decides.
    """
    preset = PRESETS[config.preset]
    given = {item.name: value for item in fields(Preset) if (value := getattr(config, item.name, None)) is not None}
    if preset.plate_map and (fixed := [name for name in ("replicates", "batches", "plates_per_batch") if name in given]):
        raise ConfigError(
            f"simulate.{fixed[0]} must be null with simulate.preset={config.preset}: BBBC021's plate map has its own. "
            f"Got {given[fixed[0]]} instead; remove it, or use another preset."
        )
    return replace(preset, **given)
