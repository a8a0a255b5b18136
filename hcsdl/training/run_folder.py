"""The run folder: where everything stands, who may write, and whether a command may go on in it. No torch.

    config.yaml        the resolved settings             model.safetensors   the network's weights after the last step
    plan.json          what was decided before the start  checkpoints/        step-*.pt, best.pt
    index.parquet      the fields used, with split and class   logs/           rank*.log
    preprocessing.npz  the fitted intensity and shading   tensorboard/        curves
    summary.json       what came out                     lock                who writes now: host, process, attempt
    journal.jsonl      what happened, a JSON object a line
    last_start.json    under Slurm: the job and its start that saved something last

Promises: one writer at a time; a dead writer's lock is taken over; a writer that is no longer the newest attempt refuses to save.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hcsdl.config import ConfigError

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1


class RunFolder:
    """Paths of one run folder, its lock and its attempt number (0 until `acquire` or `join`)."""

    kind, setting = "run folder", "run_dir"  # what it is called, and the setting that names it

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.plan, self.summary = self.path / "config.yaml", self.path / "plan.json", self.path / "summary.json"
        self.index, self.journal, self.weights = self.path / "index.parquet", self.path / "journal.jsonl", self.path / "model.safetensors"
        self.checkpoints, self.logs, self.tensorboard = self.path / "checkpoints", self.path / "logs", self.path / "tensorboard"
        self.preprocessing, self.lock = self.path / "preprocessing.npz", self.path / "lock"
        self.folders = (self.checkpoints, self.logs, self.tensorboard)
        self.attempt = 0
        self._held: int | None = None
        self._job = ("", 0)

    def acquire(self, job: tuple[str, int] = ("", 0)) -> int:
        """Make the folder if need be and become its only writer until `release` or our end; return the attempt number, from 1.

        `job` is the cluster job we run in and how often it was started again. A job takes the folder over from its own earlier start: the host of that
        may be gone without having given its lock back, and if it is not, it may no longer save.

        Raises ConfigError where another process on any host holds it, where the folder is something else, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.setting} must be a folder. {self.path} is a file; name another.")
        if self.path.is_dir() and not self.lock.exists() and any(self.path.iterdir()):
            raise ConfigError(f"{self.setting} must be new, empty or a {self.kind}. {self.path} holds other files; name another.")
        try:
            for folder in (self.path, *self.folders):
                folder.mkdir(parents=True, exist_ok=True)
            held = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{self.setting} must be writable. {error.strerror}: {error.filename}; name another, or mend its rights."
            ) from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = self._read_lock()
            if not job[0] or who.get("job") != job[0] or who["restarts"] >= job[1]:
                os.close(held)
                raise ConfigError(
                    f"one run at a time may write a {self.kind}. {self.path} is in use by process {who.get('process')} on {who.get('host')}; "
                    f"wait for it, stop it, or name another {self.setting}."
                ) from error
            log.warning("%s is taken over from this job's earlier start on %s.", self.path, who.get("host"))
        except OSError as error:
            log.warning("%s has no file locks (%s): make sure that no other run writes into it.", self.path, error.strerror)
        self._held, self._job = held, job
        return self.renew()

    def renew(self) -> int:
        """As the folder's only writer: begin the next attempt; return its number."""
        assert self._held is not None
        self.attempt = self._read_lock().get("attempt", 0) + 1
        who = {"host": socket.gethostname(), "process": os.getpid(), "job": self._job[0], "restarts": self._job[1]}
        text = json.dumps(who | {"attempt": self.attempt})
        os.ftruncate(self._held, 0)
        os.pwrite(self._held, text.encode(), 0)
        os.fsync(self._held)
        return self.attempt

    def join(self) -> None:
        """As a rank of the run that holds the folder: take over its attempt number."""
        self.attempt = self._read_lock().get("attempt", 0)

    def last_saved(self) -> int:
        """Return the step of the newest checkpoint, 0 where there is none."""
        return max((int(path.stem.removeprefix("step-")) for path in self.checkpoints.glob("step-*.pt")), default=0)

    def check_newest(self) -> None:
        """Raise ConfigError where a newer attempt has taken the folder over: whoever calls this must not save."""
        newest = self._read_lock().get("attempt", 0)
        if newest != self.attempt:
            raise ConfigError(f"only the newest attempt may save. {self.path} was taken over by attempt {newest}; this is {self.attempt}.")

    def release(self) -> None:
        """Let others write."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _read_lock(self) -> dict:
        try:
            return json.loads(self.lock.read_text(encoding="utf-8") or "{}")
        except (OSError, ValueError):
            return {}


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`, as `written_atomically` does."""
    with written_atomically(path) as file:
        file.write(data)


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Let what is written inside be `path`: a crash, a kill or a full disk leaves either the old file or the whole new one. Raises OSError, with the path."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as where an open file is written to
            error.filename = str(path)
        raise


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object atomically, indented; NaN becomes null, because JSON has none."""
    write_atomically(path, (json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n").encode())


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
