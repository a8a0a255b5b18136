"""ResNet-18, 34 and 50 for any number of channels and any width, built from torchvision's blocks.

In: images (N, in_channels, H, W), float. Out: feature map (N, num_features, ceil(H/32), ceil(W/32)), embedding (N, num_features),
logits (N, num_classes). Promised: with width 1 the names and shapes in the state dict are torchvision's, and so are the initial
weights drawn from a given seed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from hcsdl.models.layers import check_images, recomputed, scaled_channels

LAYOUTS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
"""Block and blocks a stage: He et al. 2016, arXiv:1512.03385, table 1."""


class ResNet(nn.Module):
    """A residual network (He et al. 2016), with the stride of a bottleneck on its 3×3 convolution as torchvision has it.

    Parameters
    ----------
    name : key of `LAYOUTS`.
    in_channels : channels of an image.
    num_classes : length of the logits.
    width : multiplies every layer's channels, see `scaled_channels`.
    zero_init_residual : start the last batch norm of every block at zero (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
    checkpoint_activations : what the backward pass computes again. none: nothing. selective: all but the outputs of convolutions that cost much, see
        `recomputed`. full: all but the inputs of stem and blocks. (By stage saves far less: the first alone holds 40 % of the activations.)

    Attributes
    ----------
    num_features : channels of the feature map.
    head_hidden_size : length of the embedding, here the same.
    minimum_size : rows and columns an image must have. One more than the total stride of 32, so that the last feature map has more
        than one pixel and batch norm can train on a mini-batch of one.
    stem_weights : names of the weights that see the image's channels.
    """

    minimum_size = (33, 33)
    stem_weights = ("conv1.weight",)

    def __init__(
        self,
        name: str,
        in_channels: int,
        num_classes: int,
        *,
        width: float = 1.0,
        zero_init_residual: bool = True,
        checkpoint_activations: str = "none",
    ) -> None:
        super().__init__()
        block, depths = LAYOUTS[name]
        planes = [scaled_channels(channels, width) for channels in (64, 128, 256, 512)]
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = planes[-1] * block.expansion
        self.checkpoint_activations = checkpoint_activations
        self.conv1 = nn.Conv2d(in_channels, planes[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(block, planes[0], planes[0], depths[0], stride=1)
        self.layer2 = _stage(block, planes[0] * block.expansion, planes[1], depths[1], stride=2)
        self.layer3 = _stage(block, planes[1] * block.expansion, planes[2], depths[2], stride=2)
        self.layer4 = _stage(block, planes[2] * block.expansion, planes[3], depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.num_features, num_classes)
        self._initialise(zero_init_residual)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the feature map (N, num_features, ceil(H/32), ceil(W/32)) of `images` (N, in_channels, H, W).

        Raises `DataError` on another number of channels or an image below `minimum_size`.
        """
        check_images(images, self.in_channels, self.minimum_size)
        return self.blocks(self.kept_or_recomputed(self.stem, images, buffers_of=self.bn1))

    def blocks(self, features: Tensor) -> Tensor:
        """Return the feature map, of what the stem makes."""
        for block in chain(self.layer1, self.layer2, self.layer3, self.layer4):
            features = self.kept_or_recomputed(block, features, buffers_of=block)
        return features

    def kept_or_recomputed(self, function: Callable, *inputs: Tensor, buffers_of: nn.Module) -> Any:
        """Return `function(*inputs)`, whose inner activations are kept or not as `checkpoint_activations` says; `buffers_of` as in `recomputed`."""
        if self.checkpoint_activations == "none":
            return function(*inputs)
        return recomputed(function, *inputs, buffers_of=buffers_of, selective=self.checkpoint_activations == "selective")

    def stem(self, images: Tensor) -> Tensor:
        """Return what the first block takes, (N, C, ceil(H/4), ceil(W/4)), of `images` (N, in_channels, H, W)."""
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (N, num_classes) of a feature map, with `pre_logits` its mean over pixels, the embedding (N, num_features)."""
        embedding = torch.flatten(self.avgpool(features), 1)
        return embedding if pre_logits else self.fc(embedding)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of `images` (N, in_channels, H, W)."""
        return self.forward_head(self.forward_features(images))

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, arXiv:1502.01852, by fan-out as torchvision has it
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                    nn.init.zeros_(last.weight)


def _stage(block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, depth: int, stride: int) -> nn.Sequential:
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(block(inputs, planes, stride, shortcut), *(block(outputs, planes) for _ in range(1, depth)))
