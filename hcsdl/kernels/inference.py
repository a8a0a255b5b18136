"""A trained network as it runs when nothing is learned any more: batch norm folded into the convolutions, weights in the type they are computed in.

In: a network in evaluation mode, the chosen kernels. Out: a module, images (N, C, H, W) float32 → (embedding (N, F), logits (N, K)), both float32.
Promised: the same function as the network's own, but for rounding; `reference` runs the network's own. Convolutions with ReLU and residual sum in one
oneDNN call (`torch.ops.mkldnn`, as torch's compiler makes them) were tried for ResNet-50, torch 2.8: 1.06× with the sum in place, 0.75× without (three
rounds, measured here); not enough to depend on private operators.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hcsdl.kernels import Kernels
from hcsdl.kernels.convolution import replace_for_inference
from hcsdl.kernels.max_pool import replace_max_pools


def for_inference(model: nn.Module, kernels: Kernels) -> Embedder:
    """Return a copy of `model` that maps images to embedding and logits, as fast as `kernels` allow; it is to run under `kernels.autocast()`.

    With `reference` nothing is folded. In bf16 convolutions take and give bf16 and add up in fp32, as under autocast, but for weights that are rounded
    after the folding; the mean over the feature map and the classifier are fp32. `fused` runs 3×3 convolutions by `winograd`, whose weights stay fp32.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if kernels.name == "reference":
        return Embedder(model, torch.float32, 0)
    if kernels.name == "fused":
        replace_max_pools(model)  # there are no batch norms to fuse, and torch adds and cuts off in place
    folded = fold_batch_norm(model)
    model.to(memory_format=torch.channels_last)
    float_parts = [model.fc, *(replace_for_inference(model) if kernels.name == "fused" and kernels.dtype == torch.bfloat16 else [])]
    floats = [(parameter, parameter.data) for part in float_parts for parameter in part.parameters()]
    model.to(kernels.dtype)
    for parameter, value in floats:
        parameter.data = value
    return Embedder(model, kernels.dtype, folded)


class Embedder(nn.Module):
    """`model` (in timm's manners) with two outputs; `dtype` is what its convolutions take, `folded` the number of batch norms folded into them."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, folded: int) -> None:
        super().__init__()
        self.model, self.dtype, self.folded = model, dtype, folded

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return embedding (N, F) and logits (N, K), float32, of images (N, C, H, W)."""
        features = self.model.forward_features(images.to(self.dtype))
        embedding = self.model.forward_head(features.float(), pre_logits=True).float()
        with torch.autocast(images.device.type, enabled=False):
            return embedding, self.model.fc(embedding)


def fold_batch_norm(model: nn.Module) -> int:
    """Fold every batch norm into the convolution that was registered just before it, in place; return how many there were.

    Raises TypeError at a batch norm without one.
    """
    count = 0
    for parent in list(model.modules()):
        before: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                if before is None or not isinstance(before[1], nn.Conv2d):
                    raise TypeError(
                        f"a batch norm must follow a convolution to be folded into it. {name} of {type(parent).__name__} does not."
                    )
                setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
                setattr(parent, name, nn.Identity())
                count += 1
            before = name, child
    return count
