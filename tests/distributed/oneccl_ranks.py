"""Run a function of a test module on real ranks under plain torch.distributed, as a stranger to hcsdl would: import the backend, init, call."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from datetime import timedelta

from hcsdl.distributed.launcher import _free_port

# Variables a user's shell may have set; the tests set their own.
OURS = ("CCL_", "FI_", "GLOO_", "HCSDL_", "MASTER_", "SLURM_", "LOCAL_")


def start(
    function: object,
    world_size: int,
    backend: str = "ccl",
    timeout_s: float = 60,
    env: Mapping[str, str] | None = None,
) -> list[subprocess.Popen]:
    """Start `function()` on `world_size` ranks, inside a process group of `backend`."""
    port, name = str(_free_port()), f"{function.__module__}.{function.__name__}"  # type: ignore[attr-defined]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(OURS)} | {"OMP_NUM_THREADS": "1"} | dict(env or {})
    return [
        subprocess.Popen(
            [sys.executable, "-m", __name__, name, backend, str(timeout_s)],
            env=clean | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish(ranks: list[subprocess.Popen], timeout_s: float = 240) -> list[dict]:
    """Return what each rank gave: {"value": …} or {"error": …, "text": …}, with "code", its return code, and "stderr"."""
    said = []
    for rank in ranks:
        out, err = rank.communicate(timeout=timeout_s)
        lines = [line for line in out.splitlines() if line.startswith("{")]
        said.append((json.loads(lines[-1]) if lines else {}) | {"code": rank.returncode, "stderr": err})
    return said


def on_ranks(function: object, world_size: int, **options: object) -> list[dict]:
    """Start and finish; every rank must have ended well."""
    said = finish(start(function, world_size, **options))  # type: ignore[arg-type]
    assert all(one["code"] == 0 and "value" in one for one in said), said
    return said


def main() -> None:
    """Be one rank: print what the function gave, and end as any program does."""
    name, backend, timeout_s = sys.argv[1:]
    module, _, function = name.rpartition(".")
    import torch
    import torch.distributed as dist

    import hcsdl.distributed.oneccl  # noqa: F401  registers ccl

    torch.set_num_threads(1)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=float(timeout_s)))
        value = getattr(importlib.import_module(module), function)()
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": type(error).__name__, "text": str(error)}), flush=True)
        sys.exit(1)
    print(json.dumps({"value": value}), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
