"""Initial weights from a local file: torchvision's .pth, or .safetensors.

In: a network of `hcsdl.models` and a path. Out: the network's weights changed in place, and a sentence on what was loaded. Promised:
nothing is left out silently, and nothing is changed when the file does not fit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hcsdl.config import ConfigError, DataError

CLASSIFIER = ("fc.weight", "fc.bias")


def load_weights(model: nn.Module, path: str | Path) -> str:
    """Load weights from `path` into `model`, in place, and return a sentence on what was loaded, adapted and left fresh.

    The stem is adapted to the network's channels by `adapt_stem`. The classifier keeps its fresh weights when the file has none or one
    of another shape. Counters of batch norm (`num_batches_tracked`), which older files lack, may be missing.

    Raises
    ------
    ConfigError : no such file, or a suffix other than .pth, .pt and .safetensors.
    DataError : the file cannot be read, or names or shapes differ otherwise; the text names the first few.
    """
    found = _read(Path(path))
    wanted = model.state_dict()
    notes = []
    for name in model.stem_weights:
        if name in found and found[name].ndim == 4 and found[name].shape[1] == 3 != wanted[name].shape[1]:
            found[name] = adapt_stem(found[name], wanted[name].shape[1])
            notes.append(f"stem {name} adapted from 3 to {wanted[name].shape[1]} channels")
    if any(name not in found or found[name].shape != wanted[name].shape for name in CLASSIFIER):
        notes.append(f"classifier left fresh ({wanted[CLASSIFIER[0]].shape[0]} classes)")
        found.update({name: wanted[name] for name in CLASSIFIER})
    for name in wanted:
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, wanted[name])
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is not the network's" for name in found if name not in wanted]
    wrong += [
        f"{name} has shape {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    if wrong:
        raise DataError(
            f"The weights in {path} must fit the network. {len(wrong)} differ: {'; '.join(wrong[:3])}. "
            "Set model.name and model.width to those of the file, or model.weights=null."
        )
    model.load_state_dict(found)
    return "; ".join([f"weights loaded from {path} ({len(wanted)} tensors)", *notes])


def adapt_stem(weight: Tensor, in_channels: int) -> Tensor:
    """Return a stem for `in_channels` made from `weight` (outputs, 3, rows, columns), whose input is red, green, blue.

    For one channel the sum over the three; otherwise the three repeated in order as far as needed and multiplied by 3 / in_channels,
    so that the outputs keep their size (exactly so on grey images where in_channels is 1 or a multiple of 3). The rule of timm's
    `adapt_input_conv` (huggingface/pytorch-image-models, timm/models/_manipulate.py).
    """
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    order = torch.arange(in_channels) % weight.shape[1]
    return weight[:, order] * (weight.shape[1] / in_channels)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"model.weights must name a file. Found none at {path}.")
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ConfigError(f"model.weights must end in .pth, .pt or .safetensors. Got {path.name!r} instead.")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in the parser wherever the damage is
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"The weights in {path} cannot be read ({reason}): is the file whole, and only tensors?") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DataError(f"The weights in {path} must be one dictionary of tensors (a state dict). Got something else: save its inner part.")
    return dict(content)
