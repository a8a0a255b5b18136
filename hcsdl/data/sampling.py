"""Which fields make up which step: an endless, seeded order of fields, cut into global batches.

In: the rows of the training fields with their names, classes and treatments, and the data settings. Out: for any step the rows of
its global batch, and any rank's share of them. Promised: a pure function of (fields, settings, seed, step), so the state to save is the
step's number; independent of the order of the table's rows and of the number of ranks.

Passes (epochs) are laid end to end, so a pass may end inside a global batch and no field is left out to make sizes even.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hcsdl.config import ConfigError

_KEPT_PASSES = 4


class Sampler:
    """Seeded permutations of the sampled fields, laid end to end and cut into global batches.

    Parameters
    ----------
    rows
        (n,) int, positions of the training fields in the index table, in any order.
    names
        (n,) field names, ``plate/well/site``; the permutation acts on the fields sorted by them.
    classes
        (n,) int, the class of each field; used by ``balanced``.
    treatments
        (n,) strings, the treatment of each field; used by ``capped``.
    sampling
        ``all``: every field once a pass. ``capped``: at most `cap` fields a treatment and pass, chosen anew each pass.
        ``balanced``: each of the K classes ``n // K`` times a pass; a class with fewer fields has all of them equally often, ± 1;
        one with more gives another random choice each pass.
    cap
        Fields a treatment and pass, with ``capped``.
    global_batch_size
        Fields an optimizer step takes, over all ranks.
    seed
        The run's seed.

    Raises
    ------
    ConfigError
        There are no fields, or a pass has fewer fields than a global batch, or `sampling` is unknown.
    """

    def __init__(
        self,
        rows: Sequence[int] | np.ndarray,
        names: Sequence[str],
        classes: Sequence[int] | np.ndarray,
        treatments: Sequence[str],
        *,
        sampling: str,
        cap: int,
        global_batch_size: int,
        seed: int,
    ) -> None:
        if sampling not in ("all", "capped", "balanced"):
            raise ConfigError(f"data.sampling must be one of all, capped, balanced. Got {sampling!r} instead.")
        if len(rows) == 0:
            raise ConfigError("Training needs at least one field. Found none: see plates.query, plates.split and training.target.")
        order = np.array(sorted(range(len(rows)), key=lambda i: names[i]))
        self.rows = np.asarray(rows, dtype=np.int64)[order]
        self.sampling, self.cap, self.global_batch_size, self.seed = sampling, cap, global_batch_size, seed
        self._groups = self._group(np.asarray(classes)[order], np.asarray(treatments, dtype=str)[order])
        counts = [self._count(group) for group in self._groups]
        self.pass_length = sum(counts)
        self.visits_per_pass = max(-(-count // len(group)) for count, group in zip(counts, self._groups, strict=True))
        self._passes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        if self.pass_length < global_batch_size:
            raise ConfigError(
                f"training.global_batch_size must be at most the {self.pass_length} fields of a pass "
                f"({len(self.rows)} training fields, data.sampling={sampling}). Got {global_batch_size} instead: "
                "make it smaller, or train on more fields."
            )

    def _group(self, classes: np.ndarray, treatments: np.ndarray) -> list[np.ndarray]:
        """Return the positions (in name order) of the fields that are sampled together."""
        if self.sampling == "all":
            return [np.arange(len(self.rows))]
        labels = classes if self.sampling == "balanced" else treatments
        return [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def _count(self, group: np.ndarray) -> int:
        """Return how many places a pass gives to a group."""
        if self.sampling == "balanced":
            return len(self.rows) // len(self._groups)
        return len(group) if self.sampling == "all" else min(len(group), self.cap)

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and visits, both int64 (pass_length,), of one pass in their order."""
        if number not in self._passes:
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, number])))
            chosen, repeats = [], []
            for group in self._groups:
                place = np.arange(self._count(group))
                shuffled = random.permutation(group) if self.sampling != "all" else group
                chosen.append(shuffled[place % len(group)])
                repeats.append(place // len(group))
            order = random.permutation(self.pass_length)
            if len(self._passes) >= _KEPT_PASSES:
                self._passes.pop(next(iter(self._passes)))
            visits = number * self.visits_per_pass + np.concatenate(repeats)[order]
            self._passes[number] = self.rows[np.concatenate(chosen)[order]], visits.astype(np.int64)
        return self._passes[number]

    def global_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the fields of one optimizer step, over all ranks: a pure function of `step` (from 0).

        Returns
        -------
        rows
            int64 (G,), positions in the index table.
        epochs
            int64 (G,), the number that makes a field's augmentation differ from visit to visit: the number of its pass; with
            ``balanced``, where a pass may come to a field several times, ``pass * visits_per_pass + repeat``.
        """
        first = step * self.global_batch_size
        place = np.arange(first, first + self.global_batch_size)
        numbers, within = place // self.pass_length, place % self.pass_length
        rows, epochs = np.empty(len(place), np.int64), np.empty(len(place), np.int64)
        for number in np.unique(numbers):
            here = numbers == number
            pass_rows, pass_visits = self._pass(int(number))
            rows[here], epochs[here] = pass_rows[within[here]], pass_visits[within[here]]
        return rows, epochs

    def rank_share(self, step: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rank `rank`'s contiguous slice of `global_batch(step)`; the shares of ranks 0, 1, … laid end to end are the global batch.

        Raises
        ------
        ConfigError
            `global_batch_size` is not a multiple of `world_size`; so also when there are more ranks than fields.
        """
        if self.global_batch_size % world_size:
            raise ConfigError(
                f"training.global_batch_size must be a multiple of the number of ranks, {world_size}. Got "
                f"{self.global_batch_size} instead, of {len(self.rows)} training fields: change it, or distributed.ranks."
            )
        share = self.global_batch_size // world_size
        rows, epochs = self.global_batch(step)
        return rows[rank * share : (rank + 1) * share], epochs[rank * share : (rank + 1) * share]

    def describe(self) -> dict[str, int | str]:
        """Return what the summary says about the sampling."""
        found: dict[str, int | str] = {"sampling": self.sampling, "num_train_fields": len(self.rows), "fields_per_pass": self.pass_length}
        if self.sampling == "capped":
            found |= {"cap": self.cap, "treatments": len(self._groups)}
        if self.sampling == "balanced":
            found |= {"classes": len(self._groups), "fields_per_class_and_pass": len(self.rows) // len(self._groups)}
        return found


def evaluation_rows(n: int, rank: int, world_size: int) -> np.ndarray:
    """Return the positions 0 … n-1 that rank `rank` evaluates, int64: every `world_size`-th. A rank may have none."""
    return np.arange(rank, n, world_size, dtype=np.int64)
