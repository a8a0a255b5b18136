"""One thread that calls oneCCL, and what is waited for.

In: `Work`, a function to be run and who asked for it. Out: the same, finished or failed, with a latch for threads that wait and a future for
DistributedDataParallel. Promised: work is run in the order it was handed in, over all process groups of this process; each is finished exactly
once; after a time-out or a lost rank every pending and later work fails at once with that sentence, although the thread may be stuck for good.

One thread for all groups, because oneCCL's progress is driven by whoever calls it (CCL_WORKER_OFFLOAD=0: no spinning worker threads that take the
compute threads' cores), and two callers at once corrupt it (tried: credits of its flow control run over). So groups that share ranks must issue
their collectives in the same order on each of them, as NCCL asks for, too.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue

import torch
import torch.distributed as dist

from hcsdl.config import ExitCode
from hcsdl.distributed import segments
from hcsdl.distributed.oneccl.api import CclError

log = logging.getLogger(__name__)
WATCH_S = 0.2  # how often the running work is held against its time-out
CLOSE_S = 5.0  # what an idle thread has for ending; a guess


class Work(dist.distributed_c10d.Work):
    """A collective that was handed in. `wait` and `get_future` are torch's; `label` says what it is, for messages."""

    def __init__(self, run: Callable[[], None], label: str, outputs: list, timeout_s: float, overdue: Callable[[Work], str]) -> None:
        super().__init__()
        self.label, self.timeout_s, self.overdue = label, timeout_s, overdue
        self.error: CclError | None = None
        self._run: Callable[[], None] | None = run  # holds on to every tensor it needs, until it is done
        self._outputs, self._done, self._future, self._chained = outputs, False, None, None
        self._latch = threading.Lock()
        self._latch.acquire()

    def run(self) -> None:
        """Do it, in the thread that calls oneCCL."""
        error = None
        try:
            with torch.no_grad():
                self._run()  # type: ignore[misc]
        except Exception as caught:  # whatever it is, whoever waits must hear of it
            error = CclError(f"{self.label} failed: {caught}")
        self.finish(error)

    def finish(self, error: CclError | None) -> None:
        """Let everybody go on who waits; the first of several calls counts."""
        with _finishing:
            if self._done:
                return
            self.error, self._done, self._run = error, True, None
            future = self._future
        self._latch.release()
        if future is not None:
            future.set_result(None)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return True once it is done; raise CclError where it failed, or has not been done within `timeout` (zero: the group's time-out)."""
        if not self._done:
            limit_s = timeout.total_seconds()
            if not self._latch.acquire(timeout=limit_s if limit_s > 0 else -1):
                raise CclError(f"{self.label} was not done within the {limit_s:g} s that were given to wait().")
            self._latch.release()
        if self.error is not None:
            raise self.error
        return True

    def get_future(self) -> torch.futures.Future:
        """Return a future of the output tensors. A failure raises where it is asked for its value.

        Never through `set_exception`: DistributedDataParallel ends with a segmentation fault on that. A callback that raises does no harm.
        """
        with _finishing:
            if self._chained is None:
                self._future = torch.futures.Future()
                self._chained = self._future.then(self._deliver)
                done = self._done
            else:
                done = False
        if done:
            self._future.set_result(None)
        return self._chained

    def _deliver(self, _: torch.futures.Future) -> list:
        if self.error is not None:
            raise self.error
        return self._outputs

    def result(self) -> list:
        """Return the output tensors."""
        self.wait()
        return self._outputs

    def is_completed(self) -> bool:
        """Return whether it is done or has failed."""
        return self._done

    def is_success(self) -> bool:
        """Return whether it is done and has not failed."""
        return self._done and self.error is None

    def exception(self) -> CclError | None:
        """Return what it failed with, None where it has not."""
        return self.error


_finishing = threading.Lock()


class Lane:
    """The thread that calls oneCCL, and one that watches its time."""

    def __init__(self) -> None:
        self.broken: CclError | None = None
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._running: tuple[Work, float] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._call, daemon=True, name="oneccl")  # daemon: it may be stuck for good
        self._thread.start()
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="oneccl-watch")
        self._watcher.start()
        atexit.register(self.close)

    def submit(self, work: Work) -> Work:
        """Hand `work` in; return it."""
        if self.broken is None:
            self._queue.put(work)
        if self.broken is not None:
            work.finish(self.broken)
        return work

    def fail(self, sentence: str) -> None:
        """Fail the running, every waiting and every later work with `sentence`. The process can do no more over oneCCL."""
        self.broken = self.broken or CclError(sentence)
        segments.remove_own()  # before the process ends by whatever way
        running = self._running
        if running is not None:
            running[0].finish(self.broken)
        while True:
            try:
                work = self._queue.get_nowait()
            except Empty:
                return
            if work is not None:
                work.finish(self.broken)

    def close(self) -> None:
        """End the thread before the interpreter does; where a rank was lost or the thread is stuck, log that and end the process with code 5."""
        self._ended.set()
        self._queue.put(None)
        if self._running is None or self.broken is None:
            self._thread.join(CLOSE_S)
        self._watcher.join(CLOSE_S)
        if self.broken is not None or self._thread.is_alive():
            log.error("hcsdl: %s", self.broken or f"{self._running[0].label if self._running else 'a collective'} was never done.")
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ExitCode.LOST_RANK)

    def _call(self) -> None:
        while True:
            work = self._queue.get()
            if work is None:
                return
            self._running = work, time.monotonic()
            if self.broken is None:
                work.run()
            else:
                work.finish(self.broken)
            self._running = None
            del work  # and with it perhaps a process group, which must not live until this thread is torn down

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_S):
            self._look()

    def _look(self) -> None:
        running = self._running
        if running is not None and self.broken is None and time.monotonic() - running[1] > running[0].timeout_s:
            sentence = running[0].overdue(running[0])
            if self._running is running:  # it may have been done while the others were asked
                self.fail(sentence)


_lane: Lane | None = None


def lane() -> Lane:
    """Return this process's lane; the first call starts it."""
    global _lane
    if _lane is None:
        _lane = Lane()
    return _lane
