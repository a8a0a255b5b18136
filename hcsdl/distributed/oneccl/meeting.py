"""Where the ranks of a process group meet, in the rendezvous store, before the first communicator; and how far each has come since.

In: the group's store. Out: every rank's place, and the communicator's shared id. Promised: who does not come, or lags behind, is named.
"""

from __future__ import annotations

import atexit
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple
from datetime import timedelta

import torch.distributed as dist

from hcsdl.distributed.oneccl.api import CclError
from hcsdl.distributed.oneccl.settings import Whereabouts

TELL_S = 1.0  # how often a rank tells how far it has come; also what the answer of a store that may be gone is waited for
STOP_S = 5.0  # the interpreter must not end while the thread is inside the store's code, unless the store hangs; a guess
STORE_GONE = "the rendezvous store is gone, so the process that holds it, rank 0's as a rule, has ended."
NAMED = 8  # of many missing ranks so many are named


def attempt(store: dist.Store, rank: int) -> dist.Store:
    """Return the part of `store` that belongs to this group alone: a store may outlive a group, and hold what an earlier one of the same name left."""
    try:
        return dist.PrefixStore(f"attempt {store.add(f'attempts/{rank}', 1)}", store)
    except dist.DistError as error:
        raise CclError(f"rank {rank}: {STORE_GONE}") from error


def meet(store: dist.Store, rank: int, size: int, timeout_s: float) -> list[Whereabouts]:
    """Return every rank's place, in rank order, once all have come. Raises CclError naming the ranks that have not within `timeout_s`."""
    here = Whereabouts.here()
    keys = [f"place/{other}" for other in range(size)]
    try:
        store.set(keys[rank], json.dumps(astuple(here)))
        store.wait(keys, timedelta(seconds=timeout_s))
        return [Whereabouts(*json.loads(value)) for value in store.multi_get(keys)]
    except dist.DistError as error:
        raise CclError(f"rank {rank} of {size} ({here.host}): {_who_is_missing(store, keys, timeout_s)}") from error


def _who_is_missing(store: dist.Store, keys: Sequence[str], timeout_s: float) -> str:
    try:
        came = [store.check([key]) for key in keys]
        places = [json.loads(store.get(key)) if there else None for key, there in zip(keys, came, strict=True)]
    except dist.DistError:
        return STORE_GONE
    hosts = sorted({place[0] for place in places if place})
    missing = [f"rank {rank}" for rank, place in enumerate(places) if place is None]
    return (
        f"all ranks must meet before oneCCL starts. After {timeout_s:g} s {listed(missing)} had not come; "
        f"the other {len(keys) - len(missing)} came from {', '.join(hosts)}. Their own output says why."
    )


def share_id(store: dist.Store, rank: int, make: Callable[[], bytes], timeout_s: float) -> bytes:
    """Return on every rank what `make` gives on rank 0. Raises CclError on every rank where it raises there."""
    if rank == 0:
        try:
            made = b"=" + make()
        except (CclError, OSError) as error:
            store.set("id", f"!{error}")
            raise
        store.set("id", made)
        return made[1:]
    store.wait(["id"], timedelta(seconds=timeout_s))
    shared = store.get("id")
    if shared[:1] == b"!":
        raise CclError(f"rank 0 could not start oneCCL: {shared[1:].decode()}")
    return shared[1:]


def leave_together(store: dist.Store, size: int, limit_s: float) -> bool:
    """Return, the same on every rank, whether all ranks of a group have come to end it within `limit_s` of each other; not where the store is gone.

    The first to run out of patience and the last to come may meet; the store takes one word of the two.
    """
    try:
        last = store.add("leaving", 1) == size
        if not last:
            with suppress(dist.DistError):
                store.wait(["left"], timedelta(seconds=limit_s))
        return store.compare_set("left", "", "together" if last else "apart") == b"together"
    except dist.DistError:
        return False


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


class Progress:
    """How far every rank of a group has come: told to the store by a thread with a connection of its own, which may hang without harm."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float) -> None:
        self._store, self._rank, self._size = store.clone(), rank, size
        self._tell_s = min(TELL_S, timeout_s / 4)
        self._reached, self._told = (0, ""), (0, "")
        self._asked, self._answered, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._others: dict[int, tuple[int, str]] | None = None
        self._thread = threading.Thread(target=self._talk, daemon=True, name="oneccl-progress")
        self._thread.start()
        atexit.register(self.stop)

    def reached(self, number: int, label: str) -> None:
        """This rank begins its `number`-th collective. Cheap: it is told later."""
        self._reached = number, label

    def others(self) -> dict[int, tuple[int, str]] | None:
        """Return number and label of the collective each rank began last, by rank; None where the store does not answer."""
        self._others = None
        self._answered.clear()
        self._asked.set()
        self._answered.wait(TELL_S + self._tell_s)
        return self._others

    def stop(self) -> None:
        """Tell a last time, and nothing more."""
        self._ended.set()
        self._asked.set()
        self._thread.join(STOP_S)

    def _talk(self) -> None:
        try:
            while True:
                ended = self._ended.is_set()
                if self._reached != self._told:
                    told = self._reached
                    self._store.set(f"reached/{self._rank}", json.dumps(told))
                    self._told = told
                if ended:
                    return
                if self._asked.is_set():
                    self._asked.clear()
                    keys = {rank: f"reached/{rank}" for rank in range(self._size)}
                    there = {rank: key for rank, key in keys.items() if self._store.check([key])}
                    told_by = zip(there, self._store.multi_get(list(there.values())), strict=True) if there else ()
                    self._others = {rank: (0, "") for rank in keys} | {rank: tuple(json.loads(value)) for rank, value in told_by}
                    self._answered.set()
                self._asked.wait(self._tell_s)
        except dist.DistError:
            self._answered.set()
