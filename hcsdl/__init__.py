"""Train networks on whole, full-resolution high-content-screening images, on CPU servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from hcsdl.training.load import LoadedRun

__version__ = "0.1.0"


def load_run(path: str | Path, checkpoint: str = "last") -> LoadedRun:
    """Open a run folder: the network and all that is needed to feed it. See `hcsdl.training.load.load_run`."""
    from hcsdl.training.load import load_run as load

    return load(path, checkpoint)
