"""Index table → mini-batches of tensors, loaded ahead by threads.

In: an index, a label for each of its rows, a fitted `Preprocessing`, and for training a `Sampler`. Out: `MiniBatch`es, in an order
and with contents that depend on the seed and the step only, not on the number of threads or ranks. Promised: no more mini-batches in
memory than stated; whatever goes wrong in a thread is raised where the mini-batches are used, with the field's name; threads end
with the iteration.

Threads, not processes: reading, copying and scaling release Python's lock, and a field never travels between processes.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch

from hcsdl.config import ConfigError, DataConfig, DataError
from hcsdl.data.augmentation import Augmentation, draw_augmentation
from hcsdl.data.preprocessing import Preprocessing
from hcsdl.data.reading import read_field
from hcsdl.data.sampling import Sampler
from hcsdl.data.sending import Sender
from hcsdl.plates.index import Index

_NOTHING = -1


@dataclass(frozen=True)
class MiniBatch:
    """Fields on their way to the network, images and labels where it computes.

    Attributes
    ----------
    images : float32 or bf16 (N, C, H, W), channels_last in memory.
    labels : int64 (N,).
    rows : int64 (N,), rows of the index table that are in here; always in this process's own memory.
    """

    images: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor


class _Loader:
    """What both loaders share: filling mini-batches field by field, ahead of their use."""

    def __init__(
        self,
        index: Index,
        labels: np.ndarray,
        preprocessing: Preprocessing,
        config: DataConfig,
        sender: Sender | None,
        dtype: torch.dtype,
    ) -> None:
        self.index, self.labels, self.preprocessing, self.config = index, np.asarray(labels, dtype=np.int64), preprocessing, config
        self.sender, self.dtype = sender, dtype
        self.wait_s = 0.0
        self.bad_fields: dict[str, str] = {}
        self._lock = threading.Lock()
        self._plates = index.table["Metadata_Plate"].to_numpy()
        self._field_shape: tuple[int, ...] | None = None
        self._running: weakref.WeakSet[Generator[MiniBatch, None, None]] = weakref.WeakSet()

    def close(self) -> None:
        """End all iterations and their threads. Leaving a loop early does the same."""
        for stream in list(self._running):
            stream.close()

    def _stream(self, plan: Iterator[tuple[np.ndarray, np.ndarray]], ahead: int) -> Iterator[MiniBatch]:
        """Yield a mini-batch for each (rows, epochs) of `plan`, `ahead` of them being loaded or ready meanwhile."""
        stream = self._run(plan, ahead)
        self._running.add(stream)
        return stream

    def _run(self, plan: Iterator[tuple[np.ndarray, np.ndarray]], ahead: int) -> Generator[MiniBatch, None, None]:
        pool = ThreadPoolExecutor(self.config.workers, thread_name_prefix="hcsdl-loader") if self.config.workers else None
        pending: deque[tuple[torch.Tensor, np.ndarray, list[Callable[[], torch.cuda.Event | None]]]] = deque()
        try:
            pending.extend(self._start(pool, *item) for item in islice(plan, ahead if pool else 1))
            while pending:
                started = time.perf_counter()
                images, rows, places = pending.popleft()
                sent = [finish() for finish in places]
                if self.sender:
                    self.sender.receive(images, sent)
                self.wait_s += time.perf_counter() - started
                pending.extend(self._start(pool, *item) for item in islice(plan, 1))
                ready = [self._mini_batch(images, rows)] if rows.max() > _NOTHING else []
                del images, places  # whoever takes it is the only one to hold it
                if ready:
                    yield ready.pop()
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _start(
        self, pool: ThreadPoolExecutor | None, rows: np.ndarray, epochs: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray, list[Callable[[], torch.cuda.Event | None]]]:
        """Return an empty mini-batch, the rows that will be in it, and for each place what to call to have it filled."""
        shape = self.preprocessing.output_shape(self._shape_of_fields(rows))
        if self.sender:
            places = images = self.sender.empty((len(rows), *shape))
        else:
            images = torch.empty((len(rows), *shape), dtype=self.dtype, memory_format=torch.channels_last)
            bits = images if self.dtype == torch.float32 else images.view(torch.uint16)  # numpy has no bf16
            places = bits.permute(0, 2, 3, 1).numpy().transpose(0, 3, 1, 2)
        loaded = np.full(len(rows), _NOTHING, np.int64)
        tasks = [partial(self._fill, places[at], loaded, at, int(rows[at]), int(epochs[at])) for at in range(len(rows))]
        return images, loaded, [pool.submit(task).result for task in tasks] if pool else tasks

    def _mini_batch(self, images: torch.Tensor, rows: np.ndarray) -> MiniBatch:
        if rows.min() == _NOTHING:
            there = np.flatnonzero(rows != _NOTHING)
            images, rows = images[torch.from_numpy(there)].contiguous(memory_format=torch.channels_last), rows[there]
        return MiniBatch(images, torch.from_numpy(self.labels[rows]).to(images.device), torch.from_numpy(rows))

    def _fill(self, place: np.ndarray | torch.Tensor, loaded: np.ndarray, at: int, row: int, epoch: int) -> torch.cuda.Event | None:
        """Load the field of `row`, or the first readable substitute, into `place` (C, H, W), and write down which row it is.

        What is sent to a GPU is there once the event that is returned has come.
        """
        for candidate in self._candidates(row):
            name = self.index.field_name(candidate)
            if name in self.bad_fields:
                continue
            try:
                image = self._read(candidate, name)
                changes, sent = (self._plates[candidate], self._augmentation(name, epoch, image.shape)), None
                if self.sender:
                    sent = self.sender.send(image, self.preprocessing.conversion(image.shape, *changes), place)
                else:
                    self.preprocessing.apply(image, *changes, out=place)
            except DataError as error:
                self._note_bad(name, error)
            except Exception as error:
                error.add_note(f"while loading field {name}")
                raise
            else:
                loaded[at] = candidate
                return sent
        return None

    def _read(self, row: int, name: str) -> np.ndarray:
        image = read_field(self.index.paths(row))
        if self._field_shape is not None and image.shape != self._field_shape:
            raise DataError(
                f"all fields must be alike, {_words(self._field_shape)} here. Found {_words(image.shape)} in "
                f"{self.index.paths(row)[0].parent}: leave field {name} out (plates.query)."
            )
        return image

    def _shape_of_fields(self, rows: np.ndarray) -> tuple[int, ...]:
        """Return the shape of the first readable field, which the others must have."""
        if self._field_shape is None:
            for row in dict.fromkeys([*rows.tolist(), *self._all_rows().tolist()]):
                name = self.index.field_name(row)
                try:
                    self._field_shape = self._read(row, name).shape
                    break
                except DataError as error:
                    self._note_bad(name, error)
            else:
                raise DataError(f"At least one field must be readable. Found none among {len(self.bad_fields)}: see `hcsdl check`.")
        return self._field_shape

    def _note_bad(self, name: str, error: DataError) -> None:
        """Put an unreadable field on the list, once.

        Raises
        ------
        DataError
            ``data.on_bad_image=raise``, or there are more such fields than ``data.max_bad_fields``.
        """
        if self.config.on_bad_image == "raise":
            raise DataError(f"Field {name} cannot be used: {error}") from error
        with self._lock:
            self.bad_fields[name] = str(error)
            count = len(self.bad_fields)
        if count > self.config.max_bad_fields:
            raise DataError(
                f"At most {self.config.max_bad_fields} fields may be unreadable (data.max_bad_fields). Found {count}, the last "
                f"{name}: {error} Run `hcsdl check` to list them."
            ) from error

    def _candidates(self, row: int) -> Iterable[int]:
        raise NotImplementedError

    def _all_rows(self) -> np.ndarray:
        raise NotImplementedError

    def _augmentation(self, name: str, epoch: int, shape: tuple[int, int, int]) -> Augmentation | None:
        raise NotImplementedError


class TrainLoader(_Loader):
    """One rank's mini-batches, step by step: iterating yields for each optimizer step the list of its mini-batches.

    Parameters
    ----------
    index, preprocessing, sampler
        Where the fields are, what to do to them, and which ones come when.
    labels
        int64 (rows of the index table,): the class of each row; rows that are not sampled may hold anything.
    config
        `workers` threads load fields; `prefetch` mini-batches are kept ready, or one step's, if that is more; besides those, the
        step in use is in memory. `on_bad_image=skip` gives an unreadable field's place to the next readable one of its class, in
        name order.
    seed
        The run's seed, for the augmentation.
    rank, world_size
        Which share of each global batch.
    mini_batch_size
        Fields of a mini-batch; a rank's share is cut into equal ones.
    first_step, last_step
        Steps ``first_step … last_step - 1`` are yielded; a resumed run starts where it stopped.
    sender
        Where the mini-batches are to be, as stored pixels are sent there and scaled; None: here.
    dtype
        Of the images, float32 or bf16; what a sender makes is float32.

    Attributes
    ----------
    wait_s : seconds that the consumer has waited for mini-batches so far; with no workers, the loading itself.
    bad_fields : field name → why it could not be used, each once, on this rank.

    Raises
    ------
    ConfigError
        A share cannot be cut into equal mini-batches.
    DataError
        While iterating: a field cannot be used (see `DataConfig.on_bad_image`).
    """

    def __init__(
        self,
        index: Index,
        labels: np.ndarray,
        preprocessing: Preprocessing,
        sampler: Sampler,
        config: DataConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        mini_batch_size: int,
        first_step: int,
        last_step: int,
        sender: Sender | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(index, labels, preprocessing, config, sender, dtype)
        share = len(sampler.rank_share(first_step, rank, world_size)[0])
        if share % mini_batch_size:
            raise ConfigError(
                f"training.mini_batch_size must divide a rank's share of the global batch, {share} fields "
                f"({sampler.global_batch_size} over {world_size} ranks). Got {mini_batch_size} instead."
            )
        self.sampler, self.seed, self.rank, self.world_size = sampler, seed, rank, world_size
        self.mini_batch_size, self.mini_batches_per_step = mini_batch_size, share // mini_batch_size
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step)

    def __iter__(self) -> Iterator[list[MiniBatch]]:
        stream = self._stream(self._plan(), max(self.config.prefetch, self.mini_batches_per_step))
        yield from iter(lambda: list(islice(stream, self.mini_batches_per_step)), [])

    def _plan(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for step in range(self.first_step, self.last_step):
            rows, epochs = self.sampler.rank_share(step, self.rank, self.world_size)
            for first in range(0, len(rows), self.mini_batch_size):
                here = slice(first, first + self.mini_batch_size)
                yield rows[here], epochs[here]

    def _candidates(self, row: int) -> Iterator[int]:
        yield row
        alike = self.sampler.rows[self.labels[self.sampler.rows] == self.labels[row]]
        at = int(np.flatnonzero(alike == row)[0])
        yield from (int(other) for other in np.concatenate([alike[at + 1 :], alike[:at]]))
        raise DataError(
            f"Every class must have a readable field. Found none of the {len(alike)} of class {self.labels[row]}: see `hcsdl check`."
        )

    def _all_rows(self) -> np.ndarray:
        return self.sampler.rows

    def _augmentation(self, name: str, epoch: int, shape: tuple[int, int, int]) -> Augmentation:
        return draw_augmentation(self.config, self.seed, epoch, name, shape)


class EvalLoader(_Loader):
    """Each of the given fields once, in their order, as it is: iterating yields mini-batches, the last of which may be smaller.

    Parameters, attributes and errors as of `TrainLoader`; `rows`, int64 (n,), are rows of the index table and may be none.
    With ``on_bad_image=skip`` an unreadable field is left out: `MiniBatch.rows` tells which are there.
    """

    def __init__(
        self,
        index: Index,
        rows: np.ndarray,
        labels: np.ndarray,
        preprocessing: Preprocessing,
        config: DataConfig,
        mini_batch_size: int,
        sender: Sender | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(index, labels, preprocessing, config, sender, dtype)
        self.rows, self.mini_batch_size = np.asarray(rows, dtype=np.int64), mini_batch_size

    def __len__(self) -> int:
        return len(range(0, len(self.rows), self.mini_batch_size))

    def __iter__(self) -> Iterator[MiniBatch]:
        starts = range(0, len(self.rows), self.mini_batch_size)
        plan = (self.rows[first : first + self.mini_batch_size] for first in starts)
        return self._stream(((rows, np.zeros_like(rows)) for rows in plan), self.config.prefetch)

    def _candidates(self, row: int) -> tuple[int]:
        return (row,)

    def _all_rows(self) -> np.ndarray:
        return self.rows

    def _augmentation(self, name: str, epoch: int, shape: tuple[int, int, int]) -> None:
        return None


def _words(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
