"""Operations and bytes of a training step: against torch's own counter, by hand, and the figure this project quotes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hcsdl.config import MODELS, ModelConfig
from hcsdl.models import build_model
from hcsdl.models.counts import SGD_BYTES, count

FULL = (3, 1024, 1280)


def network(name: str, width: float = 1.0, size: tuple[int, int] = FULL[1:]) -> nn.Module:
    with torch.device("meta"):
        return build_model(ModelConfig(name=name, width=width), 3, 13, size)


@pytest.mark.parametrize(
    ("name", "width", "size"), [*((name, 1.0, FULL[1:]) for name in MODELS), ("resnet50", 0.25, (333, 257)), ("mcnn", 0.5, (200, 333))]
)
def test_operations_are_those_of_torchs_counter(name: str, width: float, size: tuple[int, int]) -> None:
    model = network(name, width, size)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *size, device="meta")).sum().backward()
    assert count(network(name, width, size), (3, *size)).training_flop == counter.get_total_flops()


def test_resnet50_must_move_5_7_gb_an_image() -> None:
    counts = count(network("resnet50"), FULL)
    assert counts.moved_bytes == pytest.approx(5.7e9, rel=0.01)
    assert len(counts.convolutions) == 53 and counts.training_flop == pytest.approx(634e9, rel=0.001)
    assert counts.step_bytes(2) == 2 * counts.moved_bytes + SGD_BYTES * counts.parameters


def test_bytes_by_hand() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )  # fmt: skip
    counts = count(layers, (3, 8, 8))
    norm, pool, relu = (
        8 * 512 * 2,
        2 * (512 + 128) * 2 + 2 * 128,
        3 * 64 * 2,
    )  # values × bytes; a pool keeps a byte an output, written and read
    assert counts.moved_bytes == 192 * 6 + norm + pool + relu
    first, second = counts.convolutions
    assert (first.flop, first.training_flop, second.training_flop) == (2 * 27 * 512, 2 * 2 * 27 * 512, 3 * 2 * 8 * 64)
    assert counts.linear_flop == 3 * 2 * 64 * 5
    assert (first.pointwise, second.pointwise) == (False, True) and str(first) == "3×3, 3 → 8 at 8 × 8"
    assert layers[0].weight.device.type == "cpu"
