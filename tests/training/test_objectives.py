"""The loss is the smoothed cross-entropy in fp32, whatever comes in."""

import math

import pytest
import torch

from hcsdl.config import ObjectiveConfig
from hcsdl.training.objectives import build_objective


def loss(logits, labels, smoothing):
    """Return the loss of the configured objective."""
    return build_objective(ObjectiveConfig(label_smoothing=smoothing)).loss(logits, labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_by_hand(smoothing):
    """The mean over fields of -sum(target × log softmax), with smoothing / K on each class besides the label's rest."""
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]]), torch.tensor([0, 1])
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total = math.log(sum(math.exp(value) for value in row))
        for k, value in enumerate(row):
            target = smoothing / 3 + (1 - smoothing) * (k == label)
            expected -= target * (value - total) / 2
    assert loss(logits, labels, smoothing).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fp32_out_and_gradient_in(dtype):
    """Scalar fp32 for any float; the gradient comes back in the logits' own precision; the sum is not rounded to theirs."""
    logits = torch.linspace(-3, 3, 4096).reshape(512, 8).to(dtype).requires_grad_()
    labels = torch.arange(512) % 8
    value = loss(logits, labels, 0.1)
    value.backward()
    assert value.shape == () and value.dtype == torch.float32
    assert logits.grad.dtype == dtype and logits.grad.any()
    assert value.item() == pytest.approx(loss(logits.detach().double(), labels, 0.1).item(), rel=1e-6)
