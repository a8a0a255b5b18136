"""A network of plain operators → the same network with ours in the places where they are faster.

In: a `ResNet` or an `MCNN`, bare. Out: the same object, whose blocks, columns, poolings and convolutions run `batch_norm_relu`, `SparseColumn`,
`max_pool` and `convolution.Conv2d`.
Promised: parameters and buffers stay the same objects under the same names, so a `state_dict` knows nothing of this; submodules stay those that
folding for inference looks for; what was replaced is counted and not guessed.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from hcsdl.kernels import batch_norm, columns, convolution, max_pool, winograd
from hcsdl.kernels.batch_norm import batch_norm_relu, batch_norm_relu_twice
from hcsdl.kernels.native.build import instruction_set
from hcsdl.models.resnet import ResNet


def compile_operators() -> str:
    """Compile and load whatever `replace_operators` puts into a network; return the name of the instruction set. Raises `NoLibrary`."""
    name = instruction_set().name
    with ThreadPoolExecutor() as pool:  # each compiler is a process of its own
        for making in [pool.submit(module.operators) for module in (batch_norm, columns, convolution, max_pool, winograd)]:
            making.result()
    return name


def replace_operators(model: nn.Module) -> Counter[str]:
    """Put our operators into `model`, in place; return how many of each kind. None where it has nothing that they know."""
    for module in model.modules():
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]  # only `forward` or `stem` differs: nothing to build or to copy
    columns.replace_columns(model)
    max_pool.replace_max_pools(model)
    convolution.replace_convolutions(
        [part for module in model.modules() for part in module.children() if not isinstance(module, columns.SparseColumn)]
    )
    return replaced(model)


def replaced(model: nn.Module) -> Counter[str]:
    """Return how many of our operators of each kind a step of `model` runs: `batch norms`, `sparse columns`, `max-pools`, `convolutions`."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, tuple(_FUSED.values())):
            parts = module.children() if isinstance(module, ResNet) else module.modules()
            found["batch norms"] += sum(isinstance(part, nn.BatchNorm2d) for part in parts)
        found["sparse columns"] += isinstance(module, columns.SparseColumn)
        found["max-pools"] += isinstance(module, max_pool.MaxPool2d)
        found["convolutions"] += isinstance(module, convolution.Conv2d)
    return +found


class FusedBasicBlock(BasicBlock):
    """torchvision's block of two 3×3 convolutions. Given its input twice, for its branch and for its shortcut, it returns its output twice."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the block's output, of `x` (N, C, H, W)."""
        out = batch_norm_relu(self.conv1(x), self.bn1)
        return _sum(self, self.conv2(out), self.bn2, x, shortcut)


class FusedBottleneck(Bottleneck):
    """torchvision's block of a 1×1, a 3×3 and a 1×1 convolution. Given its input twice, as the other."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the block's output, of `x` (N, C, H, W)."""
        out = batch_norm_relu(self.conv1(x), self.bn1)
        out = batch_norm_relu(self.conv2(out), self.bn2)
        return _sum(self, self.conv3(out), self.bn3, x, shortcut)


class FusedResNet(ResNet):
    """Our ResNet, whose stem is no block, and whose blocks hand their outputs on twice."""

    def stem(self, images: Tensor) -> Tensor:
        """Return what the first block takes, of `images` (N, in_channels, H, W)."""
        return self.maxpool(batch_norm_relu(self.conv1(images), self.bn1))

    def blocks(self, features: Tensor) -> Tensor:
        """Return the feature map, of what the stem makes."""
        twice = features, features
        del features  # which else lived through the whole pass
        for block in chain(self.layer1, self.layer2, self.layer3, self.layer4):
            twice = self.kept_or_recomputed(block, *twice, buffers_of=block)
        return twice[0]


_FUSED: dict[type, type] = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck, ResNet: FusedResNet}


def _sum(
    block: BasicBlock | Bottleneck, branch: Tensor, norm: nn.Module, x: Tensor, shortcut: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    if shortcut is None:
        return batch_norm_relu(branch, norm, _shortcut(block, x))
    return batch_norm_relu_twice(branch, norm, _shortcut(block, shortcut))


def _shortcut(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    if block.downsample is None:
        return x
    convolution, norm = block.downsample
    return batch_norm_relu(convolution(x), norm, relu=False)
