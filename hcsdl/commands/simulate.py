"""`hcsdl simulate`: draw plates into plates.root.

In: a `SimulateCommand`. Out: plates in BBBC021's layout, a short table on standard output, exit code 0.
"""

from __future__ import annotations

from pathlib import Path

from hcsdl.config import ConfigError, SimulateCommand


def run(config: SimulateCommand) -> int:
    """Draw the plates unless they are there already, and say what is where.

    Raises
    ------
    ConfigError
        If `plates.root` is null or holds other plates.
    """
    if config.plates.root is None:
        raise ConfigError("plates.root must be the folder to draw plates into. Got null instead; set plates.root=<folder>.")
    from hcsdl.simulation import simulate

    counts = simulate(config.simulate, Path(config.plates.root), config.seed, control=config.plates.control)
    drawn = counts.pop("drawn")
    for name, count in counts.items():
        print(f"{'MoA classes' if name == 'moas' else name:12s}{count:8d}")  # the control is one of them
    print(f"plates {'drawn into' if drawn else 'as asked for were already in, nothing drawn:'} {Path(config.plates.root).resolve()}")
    return 0
