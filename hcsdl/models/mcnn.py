"""M-CNN, the multi-scale network of Godinez et al. 2017 in the layout Datta et al. 2019 trained on whole BBBC021 images.

In: images (N, in_channels, H, W), float. Out: feature map (N, num_features, H // 64, W // 64), embedding (N, head_hidden_size),
logits (N, num_classes). Promised: at 3 × 1024 × 1280 and 13 classes the published 42.58 M parameters and 25.7 GMAC forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcsdl.config import ConfigError, DataError
from hcsdl.models.layers import check_image_size, check_images, recomputed, scaled_channels

COLUMN_CHANNELS = (16, 16, 16, 32, 32, 32, 64)
"""Channels of the column that sees the image at 1, 1/2, 1/4, … 1/64 of its size."""
MIXED_CHANNELS = 1024
HIDDEN_FEATURES = 512
STRIDE = 64
"""Pixels of the image a side, for one point of the grid all columns meet on."""


class MCNN(nn.Module):
    """Seven columns of three 5×5 convolutions, each at its own scale.

    Godinez et al. 2017, Bioinformatics 33:2010; the layout is that of Datta et al. 2019, arXiv:1910.04852. Column n max-pools the
    image by 2^n, convolves, and max-pools by 2^(6-n); the columns meet on one grid, where a 1×1 convolution mixes them. There is no
    batch norm and no dropout. Image sizes need not be divisible by 64: pooling drops incomplete windows, and as
    floor(floor(H / 2^n) / 2^(6-n)) = floor(H / 64) all columns end on the same grid; the last H mod 64 rows and W mod 64 columns
    are then seen only in part, through the convolutions.

    Parameters
    ----------
    in_channels : channels of an image.
    num_classes : length of the logits.
    image_size : rows and columns of every image; `head="fc"` needs it, `head="pool"` does not use it.
    head : "fc": 2×2 max-pool and a fully connected layer of 512 with ReLU, as published; the embedding is its output.
        "pool": the embedding is the mean of the feature map over pixels.
    width : multiplies the channels of every layer, the fully connected one's too, see `scaled_channels`.
    checkpoint_activations : full: keep only the columns' inputs and recompute the rest in the backward pass; none and selective: keep all, for there
        is nothing between the convolutions.

    Attributes
    ----------
    num_features : channels of the feature map, 1024 with width 1.
    head_hidden_size : length of the embedding: 512 for `head="fc"`, `num_features` for `head="pool"`.
    minimum_size : rows and columns an image must have: for one grid point, with `head="fc"` for 2 × 2.
    stem_weights : names of the weights that see the image's channels.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        image_size: tuple[int, int] | None = None,
        head: str = "fc",
        width: float = 1.0,
        checkpoint_activations: str = "none",
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.image_size = image_size if head == "fc" else None
        self.checkpoint_activations = checkpoint_activations
        channels = [scaled_channels(count, width) for count in COLUMN_CHANNELS]
        self.columns = nn.ModuleList(_column(in_channels, count, STRIDE // 2**n) for n, count in enumerate(channels))
        self.halve = nn.MaxPool2d(2)
        self.stem_weights = tuple(f"columns.{n}.0.weight" for n in range(len(channels)))
        self.num_features = self.head_hidden_size = scaled_channels(MIXED_CHANNELS, width)
        self.mix = nn.Conv2d(sum(channels), self.num_features, kernel_size=1)
        self.minimum_size = (STRIDE, STRIDE)
        if head == "fc":
            if image_size is None:
                raise ConfigError("model.head=fc of M-CNN needs the size of the images. Got none: give one, or use model.head=pool.")
            self.minimum_size = (2 * STRIDE, 2 * STRIDE)
            check_image_size(image_size, self.minimum_size)
            points = (image_size[0] // STRIDE // 2) * (image_size[1] // STRIDE // 2)
            self.head_hidden_size = scaled_channels(HIDDEN_FEATURES, width)
            self.hidden = nn.Linear(self.num_features * points, self.head_hidden_size)
        self.fc = nn.Linear(self.head_hidden_size, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # Glorot and Bengio 2010, AISTATS
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the feature map (N, num_features, H // 64, W // 64) of `images` (N, in_channels, H, W): 1×1 convolution and ReLU.

        Raises `DataError` on another number of channels, an image below `minimum_size`, or with `head="fc"` another size than built for.
        """
        check_images(images, self.in_channels, self.minimum_size)
        rows, columns = images.shape[2:]
        if self.image_size is not None and (rows, columns) != tuple(self.image_size):
            raise DataError(
                f"M-CNN with model.head=fc takes only the image size it was built for. Expected "
                f"{self.image_size[0]} × {self.image_size[1]}, got {rows} × {columns}: use one size, or model.head=pool."
            )
        parts = []
        for n, column in enumerate(self.columns):
            if n > 0:
                images = self.halve(images)
            parts.append(
                recomputed(column, images, buffers_of=column, selective=False) if self.checkpoint_activations == "full" else column(images)
            )
        return F.relu(self.mix(torch.cat(parts, dim=1)))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (N, num_classes) of a feature map, or with `pre_logits` its embedding (N, head_hidden_size)."""
        if self.image_size is None:
            embedding = torch.flatten(F.adaptive_avg_pool2d(features, 1), 1)
        else:
            embedding = F.relu(self.hidden(torch.flatten(self.halve(features), 1)))
        return embedding if pre_logits else self.fc(embedding)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of `images` (N, in_channels, H, W)."""
        return self.forward_head(self.forward_features(images))


def _column(in_channels: int, channels: int, window: int) -> nn.Sequential:
    # The last ReLU stands after the pooling: the same numbers and gradients as before it, at 1 / window² of the work.
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, kernel_size=5, padding=2),
        nn.MaxPool2d(window),
        nn.ReLU(inplace=True),
    )
