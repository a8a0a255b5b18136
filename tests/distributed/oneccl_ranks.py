"""Run a function of a test module on real ranks under plain torch.distributed, as a stranger to hcsdl would: import the backend, init, call.

Ranks are forked from a process that has imported torch, but not the backend.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

from hcsdl.distributed.rendezvous import free_port
from hcsdl.machine.process import die_with_parent
from tests.forked import Forked

# Variables a user's shell may have set; the tests set their own.
OURS = ("CCL_", "FI_", "GLOO_", "HCSDL_", "MASTER_", "SLURM_", "LOCAL_")


def start(function: object, world_size: int, timeout_s: float = 60) -> list[Forked]:
    """Start `function()` on `world_size` ranks, inside a process group over ccl."""
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="hcsdl-ranks-"))
    return [
        Forked(partial(end_after, name_of(function), timeout_s, identity(rank, world_size, port)), folder / f"{rank}.out")
        for rank in range(world_size)
    ]


def finish(ranks: list[Forked], timeout_s: float = 240) -> list[dict]:
    """Return what each rank gave: {"value": …} or {"error": …, "text": …}, with "code", its exit code, and "output"."""
    said = []
    try:
        for rank in ranks:
            code = rank.wait(timeout_s)
            lines = [line for line in rank.said().splitlines() if line.startswith("{")]
            said.append((json.loads(lines[-1]) if lines else {}) | {"code": code, "output": rank.said()})
    finally:
        for rank in ranks:
            rank.kill()
        shutil.rmtree(ranks[0].output.parent)
    return said


def on_ranks(function: object, world_size: int) -> list[dict]:
    """Start and finish; every rank must have ended well."""
    said = finish(start(function, world_size))
    assert all(one["code"] == 0 and "value" in one for one in said), said
    return said


def end_codes(functions: Sequence[object], pairs: int) -> list[int]:
    """Start each function on so many pairs of ranks at once, one function after the other; each rank ends as a Python of its own does; return their exit codes."""
    words = [sys.executable, "-m", __name__, str(pairs), *map(name_of, functions)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def name_of(function: object) -> str:
    """Return by which name another process finds a function."""
    return f"{function.__module__}.{function.__name__}"  # type: ignore[attr-defined]


def identity(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment of a rank."""
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def be_rank(name: str, timeout_s: float, environment: dict[str, str]) -> int:
    """Be one rank: print what the function gave, destroy the groups, and return the exit code."""
    import torch
    import torch.distributed as dist

    assert "hcsdl.distributed.oneccl" not in sys.modules, "its settings go with the environment that is cleared here"
    for key in [key for key in os.environ if key.startswith(OURS)]:
        del os.environ[key]
    os.environ |= environment
    import hcsdl.distributed.oneccl  # noqa: F401  registers ccl

    torch.set_num_threads(1)
    try:
        dist.init_process_group("ccl", timeout=timedelta(seconds=timeout_s))
        module, _, function = name.rpartition(".")
        value = getattr(importlib.import_module(module), function)()
    except Exception as error:
        traceback.print_exc()
        print("\n" + json.dumps({"error": type(error).__name__, "text": str(error)}), flush=True)
        return 1
    print("\n" + json.dumps({"value": value}), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def end_after(name: str, timeout_s: float, environment: dict[str, str]) -> None:
    """Be one rank and end with what stands in exit handlers, which multiprocessing leaves out; `end_codes` has a whole interpreter's end."""
    code = be_rank(name, timeout_s, environment)
    atexit._run_exitfuncs()
    sys.exit(code)


def main() -> int:
    """Be the one that forks pairs of ranks; print their exit codes. In a rank: be it, and return the exit code."""
    import pytest  # noqa: F401  what the ranks' test modules import, once for all
    import torch.distributed.nn  # noqa: F401

    pairs, names = int(sys.argv[1]), sys.argv[2:]
    parent, codes = os.getpid(), []
    for name in names:
        ranks = []
        for port in [free_port() for _ in range(pairs)]:
            for rank in range(2):
                if not (pid := os.fork()):
                    die_with_parent(parent)
                    return be_rank(name, 60, identity(rank, 2, port))
                ranks.append(pid)
        codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    print(json.dumps(codes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
