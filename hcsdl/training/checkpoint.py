"""Checkpoints: one file per saved step, written so that no crash leaves a broken one as the only one.

In: a `Checkpoint`, or a folder of them. Out: files, or the newest that is whole. Loaded with `weights_only=True`: tensors and plain values.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from hcsdl.config import ConfigError, DataError
from hcsdl.training.run_folder import SCHEMA_VERSION, written_atomically

log = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """All that a run needs to go on, and all that later commands need to use its network.

    `model` is a state_dict with plain torchvision-like names, its batch-norm statistics averaged over the ranks; `ranks` holds what each rank
    keeps for itself: its own batch-norm buffers and random state. `step` counts optimizer steps; the sampler's state is that number. `backend`
    and `ran_on` (what: its name) say on what it was computed, so that a resume elsewhere can tell what is different.
    """

    step: int
    model: dict
    optimizer: dict
    ranks: list[dict]
    history: list[dict]
    elapsed_s: float
    classes: list[str]
    channels: list[str]
    target: str
    image_size: list[int]
    model_config: dict
    preprocessing: dict
    config: str
    config_hash: str
    index_hash: str
    backend: str = ""
    ran_on: dict = field(default_factory=dict)
    sampler: dict = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def save_checkpoint(checkpoint: Checkpoint, folder: Path, *, keep: int, best: bool) -> Path:
    """Write `folder/step-<step>.pt`, drop all but the `keep` newest, and let `best.pt` be this one where `best`. Raises OSError (full disk).

    The tensors go to the file one by one: no second copy of them is made.
    """
    path = folder / f"step-{checkpoint.step:08d}.pt"
    for begun in folder.glob(".step-*.tmp"):  # by a writer that was killed
        begun.unlink(missing_ok=True)
    with written_atomically(path) as file:
        through = _Through(file)
        torch.save({f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}, through)
        if through.error:
            raise through.error
    if best:
        _link(path, folder / "best.pt")
    own = [p for p in list_checkpoints(folder) if p <= path]
    for old in [
        *own[keep:],
        *(p for p in list_checkpoints(folder) if p > path),
    ]:  # newer ones are broken: this run went on from before them
        old.unlink(missing_ok=True)
    return path


class _Through:
    """A file for `torch.save`, which makes of a full disk's OSError a RuntimeError without its number: kept here, to be raised after it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        if not self.error:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: the file is flushed when all is written."""


def _link(path: Path, link: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, link)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Return one checkpoint. Raises DataError where the file is missing, cut short, altered (every record's CRC is checked) or foreign."""
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum in {broken}")
        values = torch.load(path, map_location="cpu", weights_only=True)
        if values["schema_version"] != SCHEMA_VERSION:
            raise DataError(f"a checkpoint must have schema version {SCHEMA_VERSION}. {path} has {values['schema_version']}.")
        return Checkpoint(**values)
    except FileNotFoundError as error:
        raise DataError(f"a checkpoint must exist. There is none at {path}.") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"a checkpoint must be whole and made by hcsdl. {path} is not: {first}.") from error


def load_newest(paths: Sequence[Path]) -> Checkpoint | None:
    """Return the first of `paths` (newest first) that is whole, saying which were passed over; None where there are no paths.

    Raises DataError where none is whole.
    """
    for path in paths:
        try:
            return load_checkpoint(path)
        except DataError as error:
            log.warning("%s Trying the one before.", error)
    if paths:
        raise DataError(
            f"one checkpoint at least must be whole. None of {len(paths)} in {paths[0].parent} is; start anew in another run_dir."
        )
    return None


def find_checkpoint(path: str | Path, which: str = "last") -> Checkpoint:
    """Return the checkpoint a user means by `path`: a file, or a run folder, of which the `last` (default) or the `best`."""
    path = Path(path)
    if path.is_dir():
        folder = path / "checkpoints"
        if which == "best":
            return load_checkpoint(folder / "best.pt")
        found = load_newest(list_checkpoints(folder))
        if found is None:
            raise DataError(f"a run folder must hold a checkpoint. {folder} holds none.")
        return found
    if not path.exists():
        raise ConfigError(f"training.resume must be auto, never, or the path of a checkpoint or run folder. There is nothing at {path}.")
    return load_checkpoint(path)


def load_model_state(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights into `model`. Raises DataError naming the first differences where it is another model's."""
    own, saved = model.state_dict(), checkpoint.model
    wrong = [k for k in own if k not in saved or saved[k].shape != own[k].shape] + [k for k in saved if k not in own]
    if wrong:
        raise DataError(f"a checkpoint must be of the same model. {len(wrong)} tensors differ: {', '.join(wrong[:3])} …")
    model.load_state_dict(saved)
