"""Where in a field a network finds what it names: Grad-CAM.

In: a network with `forward_features` and `forward_head` (both of ours), prepared images. Out: heat maps on the feature map's grid. Promised: the network is
left as it was, and memory stays that of a prediction: gradients go back to the feature map and no further.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hcsdl.config import ConfigError


def grad_cam(model: torch.nn.Module, images: torch.Tensor, classes: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return what in each image speaks for a class (Selvaraju 2017, arXiv:1610.02391): ReLU(Σ_c α_c A_c).

    A is the feature map, α_c the mean over its points of the gradient of the class's logit by channel c. Of a ResNet, whose head is a mean and one layer, this
    is Zhou 2016's class activation map; of M-CNN the map is what the columns share after their 1 × 1 convolution, 64 px to a point.

    Parameters
    ----------
    model : in evaluation mode, any precision.
    images : (N, C, H, W), prepared; whole fields.
    classes : N class numbers; None: the class predicted of each image.

    Returns
    -------
    Maps (N, h, w) float32, each scaled to a maximum of 1, all zeros where nothing speaks for the class; class probabilities (N, K) float32.

    Raises
    ------
    ConfigError : the model is in training mode: batch norm would take the images' own statistics.
    """
    if model.training:
        raise ConfigError("Grad-CAM takes a network in evaluation mode. Got one that is training: call model.eval() first.")
    with torch.no_grad():
        features = model.forward_features(images)
    features = features.detach().requires_grad_()
    with torch.enable_grad():
        logits = model.forward_head(features).float()
        chosen = logits.argmax(1) if classes is None else torch.as_tensor(list(classes))
        (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), features)
    maps = torch.relu((gradient.float().mean((2, 3), keepdim=True) * features.detach().float()).sum(1))
    highest = maps.amax((1, 2), keepdim=True)
    return (maps / torch.where(highest > 0, highest, 1.0)).numpy(), logits.detach().softmax(1).numpy()
