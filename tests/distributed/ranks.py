"""Run a function of a test module on several real ranks, as child processes that meet over gloo or another backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from hcsdl.distributed.rendezvous import free_port

SCRIPT = """
import importlib, json, os, sys
from hcsdl.config import DistributedConfig
from hcsdl.distributed.group import Group
from hcsdl.distributed.identity import who_am_i
import torch
torch.set_num_threads(1)
module, name = sys.argv[1].rsplit(".", 1)
group = Group(who_am_i(), DistributedConfig(backend=sys.argv[3], timeout_s=float(sys.argv[2])))
try:
    value = getattr(importlib.import_module(module), name)(group)
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}), flush=True)
    os._exit(1)
print(json.dumps({"value": value}), flush=True)
os._exit(0)
"""


def on_ranks(function: object, world_size: int, timeout_s: float = 60, backend: str = "gloo") -> list[dict]:
    """Return what `function(group)` gave on each rank, as {"value": …} or {"error": …, "text": …}; {} for a rank that died."""
    port = str(free_port())
    name = f"{function.__module__}.{function.__name__}"  # type: ignore[attr-defined]
    ranks = []
    for rank in range(world_size):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, name, str(timeout_s), backend],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    said = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    return [json.loads(text.splitlines()[-1]) if text else {} for text in said]
