"""The network for inference is the network: the same numbers but for rounding, nothing left to fold, the original as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hcsdl.config import ModelConfig
from hcsdl.kernels import Kernels
from hcsdl.kernels.inference import fold_batch_norm, for_inference
from hcsdl.models import build_model

BATCH_NORMS = {"resnet18": 20, "resnet34": 36, "resnet50": 53, "mcnn": 0}


def network(name: str) -> nn.Module:
    """Return a small network whose batch norms and residual branches all do something."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, width=0.25, zero_init_residual=False), 3, 5, (128, 160)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                nn.init.uniform_(tensor, low, high)
    return model


def images(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 128, 160, generator=generator).contiguous(memory_format=torch.channels_last)


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", BATCH_NORMS)
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 0.03)])
@torch.no_grad()
def test_folded_is_the_plain_network(name: str, precision: str, limit: float) -> None:
    model, kernels = network(name), Kernels("native", precision, "asked for")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    embedding = model.forward_head(model.forward_features(images()), pre_logits=True)
    folded = for_inference(model, kernels)
    with kernels.autocast():
        found, logits = folded(images())
    assert found.dtype == logits.dtype == torch.float32 and found.shape == (2, model.head_hidden_size)
    print(f"{name} {precision}: embedding {far(found, embedding):.1e}, logits {far(logits, model.fc(embedding)):.1e}")
    assert far(found, embedding) < limit and far(logits, model.fc(embedding)) < limit
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the network itself stays as it is"


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_every_batch_norm_is_folded(name: str) -> None:
    model = network(name)
    assert fold_batch_norm(model) == BATCH_NORMS[name]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@torch.no_grad()
def test_reference_runs_the_network_itself() -> None:
    model = network("resnet18")
    embedding, logits = for_inference(model, Kernels("reference", "fp32", "asked for"))(images())
    assert torch.equal(logits, model(images()))
    assert torch.equal(model.fc(embedding), logits)


def test_unknown_networks_are_refused() -> None:
    with pytest.raises(TypeError, match="follow a convolution"):
        fold_batch_norm(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
