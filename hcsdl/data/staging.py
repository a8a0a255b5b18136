"""The image files of a run → copies on the node's own disk, made once, which the loaders then read.

In: an index and a folder on the node's disk. Out: an index of the same fields whose `paths` lead to the copies. Promised: a copy that
has its name has, byte for byte, the contents of its source; a source whose size or time of change differs from its copy's is copied again;
a staging that was killed goes on with what is missing; the ranks of a node, runs that begin at once and later runs share one set of copies;
a copy that vanishes or was never made is read from its source. Nothing is ever deleted: that is the user's folder.

Files are copied as they are, not decoded. Decoding a whole field of 3 × 1024 × 1280 px takes a loader thread 1 ms uncompressed and 16 ms
(zstd) to 45 ms (LZW) otherwise (measured here); a rank of the published job has 270 ms for each, and compressed copies need less disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from hcsdl.config import ConfigError, DataError
from hcsdl.plates.index import Index

THREADS = 8  # a network disk answers many requests at once; a guess
SAY_EVERY_S = 10.0
BLOCK_BYTES = 4096  # what a file system gives a file at least

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StagedIndex(Index):
    """An index whose files have copies in the folder `copies`, under the same relative paths; a file without one is read from `root`."""

    copies: Path = Path()
    _gone: list[Path] = field(default_factory=list, repr=False)

    def paths(self, row: int) -> list[Path]:
        """Return the image files of row `row`, one per channel: the copy, or the source where there is no copy (any more)."""
        found = []
        for source in super().paths(row):
            copy = self.copies / source.relative_to(self.root)
            if not copy.is_file():
                if not self._gone:
                    log.warning("%s is not there (any more): it, and any other file without a copy, is read from %s.", copy, self.root)
                    self._gone.append(copy)
                copy = source
            found.append(copy)
        return found


@dataclass(frozen=True)
class Progress:
    """How far one node is. `there`: files that needed no copying; `left_out`: files whose source could not be read."""

    node: str
    there: int = 0
    to_copy: int = 0
    copied: int = 0
    copied_bytes: int = 0
    bytes_to_copy: int = 0
    left_out: int = 0
    seconds: float = 0.0
    waiting: bool = False
    finished: bool = False
    error: Exception | None = None


def stage_fields(
    index: Index,
    folder: Path,
    *,
    node: str,
    leads: bool,
    meet: Callable[[Progress | None], list[Progress | None]],
    say: Callable[[str], None],
) -> StagedIndex:
    """Have the files of `index` copied into `folder` on every node, and return the index that reads the copies.

    Parameters
    ----------
    index : the fields of this run.
    folder : data.stage; each node may have another disk there.
    node : the name of this one, for messages.
    leads : whether this rank copies; true for one rank of each node.
    meet : called by every rank again and again with its progress (None where it does not lead); gives every rank's. A collective, so that no
        rank waits in one for longer than a second, however long the copying takes.
    say : is given a sentence from time to time, and one at the end.

    Raises
    ------
    ConfigError : on every rank, where a node's folder cannot be written, or has too little room.
    DataError : on every rank, where a copy differs from its source: that disk is not to be trusted.
    """
    folder = folder.expanduser().absolute()
    staged = StagedIndex(**vars(index), copies=copies_folder(index.root, folder))
    stager = Stager(staged, node) if leads else None
    pause_s, said = 0.05, time.monotonic()
    try:
        while True:
            nodes = [progress for progress in meet(stager.progress() if stager else None) if progress]
            error = next((node.error for node in nodes if node.error), None)
            if error:
                raise error
            if all(node.finished for node in nodes):
                say(summary(nodes, staged.copies))
                return staged
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                say(interim(nodes))
            time.sleep(pause_s)
            pause_s = min(1.0, 2 * pause_s)
    finally:
        if stager:
            stager.close()


def copies_folder(root: Path, stage: Path) -> Path:
    """Return where the copies of the plates at `root` stand: one folder in `stage` for each root, named after it."""
    root = root.resolve()
    return stage / f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"


def summary(nodes: Sequence[Progress], folder: Path) -> str:
    """Return what was done, in a sentence."""
    copied, there, size = (sum(getattr(node, name) for node in nodes) for name in ("copied", "there", "copied_bytes"))
    left_out = sum(node.left_out for node in nodes)
    where = f" on {len(nodes)} nodes" if len(nodes) > 1 else ""
    found = f"staged {copied:,} files, {_words(size)}{where}"
    if copied:
        slowest = min((node for node in nodes if node.copied), key=lambda node: node.copied_bytes / node.seconds)
        each = " a node" if where else ""
        seconds = max(node.seconds for node in nodes)
        found += f" in {seconds:.3g} s ({_words(slowest.copied_bytes / slowest.seconds)}/s{each})"
    found += f", {there:,} were there: {folder}"
    return found + (f"; {left_out:,} could not be copied and are read from their source" if left_out else "")


def interim(nodes: Sequence[Progress]) -> str:
    """Return how far the nodes are, in a sentence that names the slowest of them."""
    open_ones = [node for node in nodes if not node.finished]
    last = min(open_ones, key=lambda node: node.copied_bytes / max(1, node.bytes_to_copy))
    if last.waiting:
        return f"staging: {last.node} waits for another run that stages the same plates there"
    rate = last.copied_bytes / max(1e-9, last.seconds)
    done = len(nodes) - len(open_ones)
    others = f", {done} of {len(nodes)} nodes are done" if len(nodes) > 1 else ""
    return (
        f"staging: {last.node} has {last.copied:,} of {last.to_copy:,} files, {_words(last.copied_bytes)} of {_words(last.bytes_to_copy)} "
        f"({_words(rate)}/s){others}"
    )


class Stager:
    """Copies the files of an index in threads of its own, from the moment it is made. `progress()` tells how far it is; `close()` ends it."""

    def __init__(self, index: StagedIndex, node: str) -> None:
        self.index, self._progress = index, Progress(node)
        self._begun, self._ended = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="hcsdl-stager", daemon=True)
        self._thread.start()

    def progress(self) -> Progress:
        """Return how far this node is."""
        return self._progress

    def close(self) -> None:
        """Begin no further file, and wait until those begun are copied."""
        self._ended.set()
        self._thread.join()

    def _tell(self, **news: object) -> None:
        self._progress = replace(self._progress, seconds=time.monotonic() - self._begun, **news)

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(THREADS, thread_name_prefix="hcsdl-stager") as pool:
                self._stage(pool)
        except OSError as error:
            now, room = self._progress, ""
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                left, free = now.bytes_to_copy - now.copied_bytes, shutil.disk_usage(self.index.copies).free
                room = f", {_words(left)} more are needed for {now.to_copy - now.copied:,} files, {_words(free)} are free"
            self._tell(error=self._unusable(f"{error.strerror}: {error.filename or self.index.copies}{room}"))
        except (ConfigError, DataError) as error:
            self._tell(error=error)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            log.exception("staging failed")
            self._tell(error=RuntimeError(f"staging on {self._progress.node} failed: {type(error).__name__}: {error}"))

    def _stage(self, pool: ThreadPoolExecutor) -> None:
        table = self.index.table
        files = sorted({path for channel in self.index.channels for path in table[f"Path_{channel}"]})
        lacking = self._lacking(pool, files)
        if lacking:  # where all is there no right to write is needed
            self.index.copies.mkdir(parents=True, exist_ok=True)
            with self._alone():
                lacking = self._lacking(pool, list(lacking))
                self._begun = time.monotonic()
                self._tell(to_copy=len(lacking), bytes_to_copy=sum(lacking.values()), there=len(files) - len(lacking))
                self._require_room(lacking)
                self._copy(pool, list(lacking))
        else:
            self._tell(there=len(files))
        if not self._ended.is_set():
            self._tell(finished=True)

    def _lacking(self, pool: ThreadPoolExecutor, files: Sequence[str]) -> dict[str, int]:
        """Return {path: bytes} of the files that have no copy, or one of another size or time of change than their source."""

        def size(path: str) -> int | None:
            try:
                source = (self.index.root / path).stat()
            except OSError:  # nobody can tell what it holds now
                return 0
            with suppress(FileNotFoundError):
                if _same(source, (self.index.copies / path).stat()):
                    return None
            return source.st_size

        return {path: found for path, found in zip(files, pool.map(size, files), strict=True) if found is not None}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the copies' lock, which the kernel frees however we end; wait for another process that has it."""
        held = os.open(self.index.copies / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while not self._ended.is_set():
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._tell(waiting=True)
                    self._ended.wait(0.2)
            self._tell(waiting=False)
            yield
        finally:
            os.close(held)

    def _unusable(self, why: str) -> ConfigError:
        return ConfigError(
            f"data.stage must be a writable folder with room for the fields of the run. {why}, on {self._progress.node}; make room, or name another."
        )

    def _require_room(self, lacking: dict[str, int]) -> None:
        needed, free = sum(-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in lacking.values()), shutil.disk_usage(self.index.copies).free
        if needed > free:
            raise self._unusable(f"It has too little room: {_words(needed)} are needed for {len(lacking):,} files, {_words(free)} are free")

    def _copy(self, pool: ThreadPoolExecutor, files: Sequence[str]) -> None:
        def one(path: str) -> int | None:
            if self._ended.is_set():
                return None
            copy = self.index.copies / path
            size = copy_checked(self.index.root / path, copy)
            if size is None:
                copy.unlink(missing_ok=True)  # of what the source was before
            return size

        tasks = [pool.submit(one, path) for path in files]
        try:
            for task in as_completed(tasks):
                size, now = task.result(), self._progress
                if size is None:
                    self._tell(left_out=now.left_out + 1)
                else:
                    self._tell(copied=now.copied + 1, copied_bytes=now.copied_bytes + size)
        finally:
            for task in tasks:
                task.cancel()


def copy_checked(source: Path, copy: Path) -> int | None:
    """Copy a file, read it back from the disk and compare; only then does it get its name and its source's time of change.

    Returns
    -------
    Its size in bytes; None, and no copy, where the source cannot be read or changes meanwhile: whoever reads it there will say so.

    Raises
    ------
    DataError : what was read back is not what was written.
    OSError : the copy cannot be written, for lack of room for example.
    """
    try:
        before = source.stat()
        content = source.read_bytes()
        if not _same(before, source.stat()) or len(content) != before.st_size:
            return None
    except OSError:
        return None
    part = copy.with_name(f"{copy.name}.part")  # one process at a time writes here; what a killed one left is overwritten
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "w+b") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read from the disk, not from memory
            file.seek(0)
            if file.read() != content:
                raise DataError(
                    f"a copy must equal its source. {part} is read back otherwise than it was written: name another disk with data.stage."
                )
        os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(part, copy)
    except (OSError, DataError):
        part.unlink(missing_ok=True)
        raise
    return len(content)


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _words(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
