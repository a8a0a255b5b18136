"""Who am I among the ranks. In: the environment a launcher set. Out: an `Identity`. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hcsdl.config import ConfigError

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OWN_LAUNCHER = "HCSDL_LAUNCHER_PID"


@dataclass(frozen=True)
class Identity:
    """One rank of `world_size`, the `local_rank`-th of `local_world_size` on its host, started by `launcher` (own, torchrun or alone)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "alone"


def who_am_i(environment: Mapping[str, str] | None = None) -> Identity:
    """Return this process's identity. Raises ConfigError naming what is missing where only a part of the variables is set."""
    env = os.environ if environment is None else environment
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return Identity()
    missing = [name for name in NEEDED if not env.get(name)]
    if missing:
        raise ConfigError(f"a rank needs {', '.join(NEEDED)} in its environment. {', '.join(missing)} is missing; torchrun sets them all.")
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not env[name].isdigit():
            raise ConfigError(f"{name} must be a whole number from 0. Got {env[name]!r} in the environment instead.")
        values[name] = int(env[name])
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise ConfigError(f"RANK must be below WORLD_SIZE. Got {values['RANK']} of {values['WORLD_SIZE']} in the environment instead.")
    launcher = "own" if OWN_LAUNCHER in env else "torchrun"
    local = env.get("LOCAL_WORLD_SIZE", "")
    return Identity(
        values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], int(local) if local.isdigit() else values["WORLD_SIZE"], launcher
    )


def launcher_process() -> int:
    """Return the process id of whoever started this rank: our launcher, else our parent."""
    return int(os.environ.get(OWN_LAUNCHER, os.getppid()))
