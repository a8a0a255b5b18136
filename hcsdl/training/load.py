"""A run folder → a network and all that is needed to feed it, for notebooks and later commands.

In: the path of a run folder or checkpoint. Out: a `LoadedRun`. Nothing of the plates is read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from hcsdl.config import ConfigError, ModelConfig
from hcsdl.data.preprocessing import Preprocessing
from hcsdl.data.reading import read_field
from hcsdl.models import build_model
from hcsdl.training.checkpoint import Checkpoint, find_checkpoint, load_model_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedRun:
    """A trained network in evaluation mode, fp32, with its preprocessing, class and channel names, and the checkpoint it came from."""

    model: torch.nn.Module = field(repr=False)
    preprocessing: Preprocessing = field(repr=False)
    classes: list[str]
    channels: list[str]
    checkpoint: Checkpoint = field(repr=False)

    def prepare(self, paths: Sequence[str | Path], plate: str) -> torch.Tensor:
        """Return one field, read from a TIFF file per channel (in `channels` order), as the network sees it: float32 (1, C, H, W).

        A plate that was not in the training plates is scaled by the values pooled over them. Raises DataError at an unreadable file.
        """
        if plate not in self.preprocessing.plates:
            log.warning(
                "plate %s is not one of the run's: its intensities are scaled with the values of all the run's plates together.", plate
            )
        image: np.ndarray = read_field([Path(path) for path in paths])
        return torch.from_numpy(self.preprocessing.apply(image, plate))[None]

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Return the class probabilities (N, K) float32 of prepared images (N, C, H, W)."""
        with torch.no_grad():
            return self.model(images).softmax(1)


def load_run(path: str | Path, checkpoint: str = "last") -> LoadedRun:
    """Return the network of a run folder (its `last` checkpoint, or the `best`) or of a checkpoint file.

    `last` is the default because the best epoch was chosen by the held-out fields themselves. Raises DataError, ConfigError.
    """
    if checkpoint not in ("last", "best"):
        raise ConfigError(f"load_run's second argument must be 'last' or 'best'. Got {checkpoint!r} instead.")
    if not Path(path).exists():
        raise ConfigError(f"load_run needs the path of a run folder or checkpoint. There is nothing at {path}.")
    found = find_checkpoint(path, checkpoint)
    model = build_model(ModelConfig(**found.model_config), len(found.channels), len(found.classes), tuple(found.image_size))
    load_model_state(model, found)
    return LoadedRun(model.eval(), Preprocessing.from_state_dict(found.preprocessing), found.classes, found.channels, found)
