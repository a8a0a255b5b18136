"""Processes: dying with whoever started us, and libraries that talk too much."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, and exit at once if `parent` (a process id) has already gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Forgiving:
    """A text stream that never raises when its reader has gone, its disk is full, or it has no letter for a character."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class Lines:
    """Standard error for a progress bar that nobody watches: in a file it is read line by line."""

    @property
    def encoding(self) -> str:
        """Return standard error's encoding, which decides how a bar is drawn."""
        return sys.stderr.encoding

    def write(self, text: str) -> None:
        """Write what is there of a bar as a line of its own."""
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        """Pass on what was written."""
        sys.stderr.flush()


def bar_options() -> dict[str, object]:
    """Return where a tqdm bar goes and how often it is drawn: in place on a terminal, else a line every ten seconds."""
    return {"file": sys.stderr, "mininterval": 0.2} if sys.stderr.isatty() else {"file": Lines(), "mininterval": 10}


def forgive_standard_streams() -> None:
    """Make standard output and error safe: what happens to a terminal or a pipe must not decide the fate of a training."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(number, "w", closefd=False)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            setattr(sys, name, Forgiving(stream))


@contextmanager
def held_back_output(but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Hold back what native libraries print (file descriptors 1 and 2) inside the context; it is shown by `show_held_output`, or if the context raises
    anything `but` this. A context inside another leaves it all to the outer one.
    """
    global _held
    if _held is not None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 1)
        os.dup2(held.fileno(), 2)
        _held = kept, held.fileno()
        try:
            yield
        except BaseException as error:
            if not isinstance(error, but):
                show_held_output()
            raise
        finally:
            _held = None
            _restore(kept)
            for copy in kept:
                os.close(copy)


_held: tuple[list[int], int] | None = None  # while output is held back: the true file descriptors 1 and 2, and the file it goes to


def show_held_output() -> None:
    """Where output is held back, in this or another thread, show it, and from now on all that is printed: for last words before the process ends."""
    if _held is None:
        return
    kept, file = _held
    _restore(kept)
    with suppress(OSError):
        os.write(2, os.pread(file, os.fstat(file).st_size, 0))


def _restore(kept: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number, copy in zip((1, 2), kept, strict=True):
        os.dup2(copy, number)
