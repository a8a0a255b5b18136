"""Grad-CAM against what it must be: a class activation map of a ResNet, and a plain backward pass through all of M-CNN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hcsdl.config import ConfigError, ModelConfig
from hcsdl.models import build_model
from hcsdl.training.attention import grad_cam


def network(name: str, size: tuple[int, int] = (128, 160)) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, width=0.25), 3, 4, size).eval()


def images(number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, 128, 160, generator=torch.Generator().manual_seed(1))


def scaled(maps: torch.Tensor) -> np.ndarray:
    """Return maps without what speaks against the class, each with a maximum of 1."""
    maps = maps.clamp(min=0)
    return (maps / maps.amax((1, 2), keepdim=True)).numpy()


def test_of_a_resnet_it_is_the_class_activation_map():
    model, given = network("resnet18"), images()
    maps, probabilities = grad_cam(model, given, [2, 0])
    with torch.no_grad():
        features = model.forward_features(given)
        expected = scaled(torch.einsum("nchw,nc->nhw", features, model.fc.weight[[2, 0]]))
        assert np.allclose(probabilities, model(given).softmax(1).numpy(), atol=1e-6)
    assert maps.shape == (2, 4, 5) and np.allclose(maps, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet50", "mcnn"])
def test_it_is_what_a_whole_backward_pass_gives_and_leaves_nothing_behind(name):
    model, given = network(name), images(1)
    maps, probabilities = grad_cam(model, given)
    assert all(parameter.grad is None for parameter in model.parameters())
    kept = {}
    features = model.forward_features(given)
    features.retain_grad()
    kept["features"] = features
    logits = model.forward_head(features)
    logits[0, int(probabilities[0].argmax())].backward()
    expected = scaled((features.grad.mean((2, 3), keepdim=True) * features).sum(1).detach())
    assert maps.shape == tuple(features.shape[0:1]) + tuple(features.shape[2:]) and np.allclose(maps, expected, atol=1e-4)
    assert maps.max() == pytest.approx(1.0)


def test_where_nothing_speaks_for_a_class_the_map_is_zero():
    model = network("resnet18")
    with torch.no_grad():
        model.fc.weight[3] = -model.fc.weight[3].abs()
    maps, _ = grad_cam(model, images(1), [3])
    assert maps.max() == 0


def test_a_network_that_trains_is_refused():
    with pytest.raises(ConfigError, match="evaluation mode"):
        grad_cam(network("resnet18").train(), images(1))
