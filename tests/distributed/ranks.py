"""Run a function of a test module on several real ranks with a `Group` between them, over gloo or another backend.

Ranks are forked from a process that has imported torch.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from functools import partial
from pathlib import Path

from hcsdl.distributed.rendezvous import free_port
from tests.forked import Forked, identity


def on_ranks(function: object, world_size: int, timeout_s: float = 60, backend: str = "gloo") -> list[dict]:
    """Return what `function(group)` gave on each rank, as {"value": …} or {"error": …, "text": …}; {} for a rank that died."""
    port, name = free_port(), f"{function.__module__}.{function.__name__}"  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(prefix="hcsdl-ranks-") as folder:
        ranks = [
            Forked(
                partial(_be_rank, name, timeout_s, backend, identity(rank, world_size, rank, world_size, "127.0.0.1", port)),
                Path(folder) / f"{rank}.out",
            )
            for rank in range(world_size)
        ]
        try:
            for rank in ranks:
                rank.wait(120)
            lines = [[line for line in rank.said().splitlines() if line.startswith("{")] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    return [json.loads(found[-1]) if found else {} for found in lines]


def _be_rank(name: str, timeout_s: float, backend: str, environment: dict[str, str]) -> None:
    from hcsdl.config import DistributedConfig
    from hcsdl.distributed.group import Group
    from hcsdl.distributed.identity import who_am_i

    os.environ |= environment
    group = Group(who_am_i(), DistributedConfig(backend=backend, timeout_s=timeout_s))
    module, _, function = name.rpartition(".")
    try:
        said = {"value": getattr(importlib.import_module(module), function)(group)}
    except Exception as error:
        said = {"error": type(error).__name__, "text": str(error)}
    print("\n" + json.dumps(said), flush=True)
    os._exit("error" in said)
