"""How ranks that were started with the user's own command line (torchrun, srun, mpirun) become one run: before anything else they compare what
each was asked for, then rank 0 prepares the run and hands the others a text through the rendezvous store.

In: an `Identity` and each rank's settings. Out: rank 0's text on every rank. A rank that does not come in time is named.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

from hcsdl.config import ConfigError, DistributedConfig, ExitCode
from hcsdl.distributed.heartbeat import LostRank, watch
from hcsdl.distributed.identity import Identity
from hcsdl.machine.process import held_back_output

PREPARING_S = 2 * 24 * 3600.0  # rank 0 may have many plates to look at first
LISTEN_S = 1.0  # a signal is heard within
ANSWER_S = 2.0  # what torch may take beyond its own time-out; a guess
HEARD_S = 10.0  # what ranks that wait for an answer have to read it; a guess
# What tells one start from another: two clusters may give a host's port to one job each, and torchrun's store outlives the ranks.
START = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
_kept: list[dist.Store] = []  # rank 0's end of the store must outlive what the others read from it


def shared_store(timeout_s: float) -> dist.Store:
    """Return the store in which all ranks of this start, and no others, have met; rank 0 holds it, with torchrun its agent.

    Raises LostRank where its port is taken, or naming the ranks that have not come within `timeout_s`.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        with held_back_output(but=dist.DistError):  # torch tells each try, and where in its code it gave up
            store = _connected(host, port, rank == 0 and not agents, timeout_s)
    except dist.DistError as error:
        first = str(error).splitlines()[0]
        if "EADDRINUSE" in first:
            raise LostRank(f"rank 0 must open port {port} for the others to meet at. Another program has taken it; start again.") from error
        raise LostRank(
            f"rank {rank} of {world_size} must reach rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout_s:g} s. It could not: {first}"
        ) from error
    store = dist.PrefixStore(" ".join(["start", *(os.environ.get(name, "0") for name in START)]), store)
    keys = [f"hcsdl/here/{other}" for other in range(world_size)]
    try:
        store.set(keys[rank], "")
        _wait(store, keys, timeout_s)
    except dist.DistError as error:
        raise LostRank(
            f"rank {rank} of {world_size}: all ranks must come within {timeout_s:g} s. {_who_is_missing(store, keys)}"
        ) from error
    return store


def _connected(host: str, port: int, holds: bool, timeout_s: float) -> dist.Store:
    """Return the store at an address. Raises DistError, also where something listens there that is no store: torch would wait for its words for ever."""
    found: list[dist.Store | Exception] = []

    def connect() -> None:
        try:
            found.append(dist.TCPStore(host, port, None, holds, timedelta(seconds=timeout_s), wait_for_workers=False, multi_tenant=True))
        except dist.DistError as error:
            found.append(error)

    thread = threading.Thread(target=connect, daemon=True, name="hcsdl-rendezvous")
    thread.start()
    thread.join(timeout_s + ANSWER_S)
    if not found:
        raise dist.DistNetworkError("what listens there does not answer as a rendezvous store does; it may be another program.")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _wait(store: dist.Store, keys: Sequence[str], timeout_s: float) -> None:
    """Wait until all `keys` are there, in pieces: a signal is heard between them only. Raises DistError."""
    limit = time.monotonic() + timeout_s
    while True:
        left_s = limit - time.monotonic()
        try:
            return store.wait(keys, timedelta(seconds=max(0.001, min(LISTEN_S, left_s))))
        except dist.DistStoreError:  # not yet
            if left_s <= LISTEN_S:
                raise


def _who_is_missing(store: dist.Store, keys: Sequence[str]) -> str:
    try:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    except dist.DistError:
        return "Rank 0, which holds their store, has ended: its log says why."
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return f"Rank {', '.join(missing[:8])}{more} did not: its log, or its launcher's, says why."


def hand_out(identity: Identity, asked: Mapping[str, object], make: Callable[[], str], config: DistributedConfig) -> str:
    """Return `make()`'s text on every rank; rank 0 alone calls it.

    Parameters
    ----------
    identity : who this rank is.
    asked : this rank's settings and versions by name, plain values; they must be equal on all ranks.
    make : prepares the run.
    config : how long the ranks wait for each other, though not for `make`, and when one is lost: rank 0 may vanish while the others wait.

    Raises
    ------
    ConfigError : on every rank, where two ranks were asked for different things: keys, both values, ranks and hosts.
    LostRank : where a rank does not come, or rank 0 goes away.
    SystemExit : on the other ranks, with the exit code of what `make` raises on rank 0, where it is raised itself.
    """
    timeout_s = config.timeout_s
    try:
        store = shared_store(timeout_s)
        _kept.append(store)
        watch(store, identity.rank, identity.world_size, config.silence_s, config.stall_s)
        store.set(f"hcsdl/asked/{identity.rank}", json.dumps({"host": identity.host, "asked": dict(asked)}))
        if identity.rank == 0:
            keys = [f"hcsdl/asked/{rank}" for rank in range(identity.world_size)]
            _wait(store, keys, timeout_s)
            difference = compare([json.loads(store.get(key)) for key in keys])
            store.set("hcsdl/difference", difference)
        else:
            _wait(store, ["hcsdl/difference"], 2 * timeout_s)
            difference = store.get("hcsdl/difference").decode()
    except dist.DistError as error:
        raise LostRank(
            f"{identity}: the other ranks must say within {timeout_s:g} s what they were asked for. {str(error).splitlines()[0]}"
        ) from error
    if identity.rank > 0:
        if difference:
            store.add("hcsdl/heard", 1)
            raise ConfigError(difference)
        return _receive(store, identity)
    try:
        if difference:
            raise ConfigError(difference)
        text = make()
        store.set("hcsdl/text", "=" + text)
    except BaseException as error:
        store.set("hcsdl/text", f"!{getattr(error, 'exit_code', ExitCode.FAILED)}")
        raise
    finally:
        _until_heard(store, identity.world_size - 1)
    return text


def _receive(store: dist.Store, identity: Identity) -> str:
    try:
        _wait(store, ["hcsdl/text"], PREPARING_S)
        text = store.get("hcsdl/text").decode()
    except dist.DistError as error:
        raise LostRank(f"{identity}: rank 0 went away while it prepared the run. {str(error).splitlines()[0]}") from error
    store.add("hcsdl/heard", 1)
    if text.startswith("!"):
        raise SystemExit(int(text[1:]))
    return text[1:]


def _until_heard(store: dist.Store, ranks: int) -> None:
    """Wait until the other ranks have read what rank 0 wrote, or do not answer: with rank 0's process the store may go."""
    limit = time.monotonic() + HEARD_S
    while store.add("hcsdl/heard", 0) < ranks and time.monotonic() < limit:
        time.sleep(0.01)


def compare(asked: list[dict]) -> str:
    """Return the first difference between what ranks were asked for, as a sentence with both values; empty without one.

    `asked` holds {"host": name, "asked": {key: value}} of every rank.
    """
    first = asked[0]
    for rank, other in enumerate(asked):
        keys = [key for key in first["asked"] | other["asked"] if first["asked"].get(key) != other["asked"].get(key)]
        if keys:
            said = ", ".join(
                f"{key} is {first['asked'].get(key)!r} on rank 0 ({first['host']}) and {other['asked'].get(key)!r} on rank {rank} ({other['host']})"
                for key in keys[:3]
            )
            more = f" (+{len(keys) - 3} more)" if len(keys) > 3 else ""
            return (
                f"every rank must have the same settings and packages. {said}{more}; start all ranks with one command line and environment."
            )
    return ""
