"""Tensor → feature map → embedding → logits.

In: a `ModelConfig`, the images' channels and size, the number of classes. Out: an `nn.Module` in timm's manners: `forward_features`,
`forward_head(pre_logits=)`, `forward`, `num_features` (channels of the feature map), `head_hidden_size` (length of the embedding),
`num_classes`, `in_channels`, `minimum_size` (rows, columns). Promised: a setting or an image that cannot be is an error, not a guess.
"""

from __future__ import annotations

from torch import nn

from hcsdl.config import ConfigError, ModelConfig
from hcsdl.models.layers import check_image_size
from hcsdl.models.mcnn import MCNN
from hcsdl.models.resnet import ResNet


def build_model(config: ModelConfig, in_channels: int, num_classes: int, image_size: tuple[int, int] | None = None) -> nn.Module:
    """Return the network of `config` with fresh weights, drawn from torch's global random state.

    Parameters
    ----------
    in_channels : channels of an image.
    num_classes : length of the logits.
    image_size : rows and columns of the images as the network sees them. M-CNN with `head="fc"` needs it; the others use it
        only to refuse too small images here and not at the first step.

    Raises
    ------
    ConfigError : no channel, fewer than two classes, images below the network's minimum size, or M-CNN's `head="fc"` without a size.
    """
    if in_channels < 1:
        raise ConfigError(f"Images must have at least 1 channel. Got {in_channels} instead.")
    if num_classes < 2:
        raise ConfigError(f"training.target must have at least 2 classes. Got {num_classes} instead.")
    common = {"width": config.width, "checkpoint_activations": config.checkpoint_activations}
    if config.name == "mcnn":
        model: nn.Module = MCNN(in_channels, num_classes, image_size=image_size, head=config.head, **common)
    else:
        model = ResNet(config.name, in_channels, num_classes, zero_init_residual=config.zero_init_residual, **common)
    if image_size is not None:
        check_image_size(image_size, model.minimum_size)
    return model
