"""Optimizers decay what they should, LARS follows its paper, and states survive a save."""

import copy

import pytest
import torch
from torch import nn

from hcsdl.config import ModelConfig, TrainingConfig
from hcsdl.models import build_model
from hcsdl.training.optimizers import LARS, build_optimizer

OPTIMIZERS = ("sgd", "adamw", "lars")


def network(seed=0):
    """Return a small network with convolutions, norms and a classifier."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))


def step(model, optimizer, seed):
    """Take one optimizer step on fixed noise."""
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(5, 2, 8, 8, generator=generator)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("network_name", ["resnet18", "mcnn"])
def test_norms_and_biases_are_not_decayed(name, network_name):
    """Every parameter is in one group; those with one dimension have no weight decay."""
    with torch.device("meta"):
        model = build_model(ModelConfig(name=network_name), 3, 5, (128, 128))
    optimizer = build_optimizer(model, TrainingConfig(optimizer=name, weight_decay=0.01))
    decay = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        plain = key.endswith(".bias") or "bn" in key or "downsample.1" in key
        assert decay[parameter] == (0.0 if plain else 0.01), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_shrinks_only_weights(name):
    """With zero gradients a step leaves norms and biases alone and, but for LARS, shrinks the weights."""
    model = network()
    before = copy.deepcopy(model)
    optimizer = build_optimizer(model, TrainingConfig(optimizer=name, weight_decay=0.5, learning_rate=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (key, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, old) == (parameter.ndim == 1), key
        assert parameter.ndim == 1 or parameter.norm() < old.norm(), key


def test_settings_arrive():
    """Momentum, learning rate and Nesterov are the configured ones; without momentum there is no Nesterov."""
    sgd = build_optimizer(network(), TrainingConfig(optimizer="sgd", learning_rate=0.3, momentum=0.8))
    assert [(group["lr"], group["momentum"], group["nesterov"]) for group in sgd.param_groups] == [(0.3, 0.8, True)] * 2
    assert not build_optimizer(network(), TrainingConfig(optimizer="sgd", momentum=0.0)).param_groups[0]["nesterov"]
    lars = build_optimizer(network(), TrainingConfig(optimizer="lars", momentum=0.7))
    assert [(group["momentum"], group["trust_coefficient"]) for group in lars.param_groups] == [(0.7, 0.001), (0.7, None)]


def test_frozen_parameters_are_left_out():
    """A parameter that needs no gradient is in no group."""
    model = network()
    model[0].weight.requires_grad_(False)
    groups = build_optimizer(model, TrainingConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_round_trip(name, tmp_path):
    """Three steps, a save and two more end where five steps end, bit for bit."""
    config = TrainingConfig(optimizer=name, learning_rate=0.01, weight_decay=0.01)
    straight = network()
    optimizer = build_optimizer(straight, config)
    for number in range(5):
        step(straight, optimizer, number)
    first = network()
    optimizer = build_optimizer(first, config)
    for number in range(3):
        step(first, optimizer, number)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    second = network(seed=9)
    optimizer = build_optimizer(second, config)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for number in range(3, 5):
        step(second, optimizer, number)
    for key, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


def test_lars_follows_its_paper():
    """Two steps of algorithm 1, written out by hand for one weight of two numbers."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LARS([weight], lr=2.0, momentum=0.9, weight_decay=0.1, trust_coefficient=0.01)
    w, velocity = torch.tensor([3.0, 4.0]), torch.zeros(2)
    for gradient in (torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 0.5])):
        weight.grad = gradient.clone()
        optimizer.step()
        rate = 0.01 * w.norm() / (gradient.norm() + 0.1 * w.norm())
        velocity = 0.9 * velocity + 2.0 * rate * (gradient + 0.1 * w)
        w = w - velocity
        torch.testing.assert_close(weight.detach(), w)
        torch.testing.assert_close(weight.grad, gradient)


def test_lars_does_not_see_the_gradient_scale():
    """Without decay a weight moves by lr × trust coefficient × its norm, whatever the gradient's size; a plain group does not."""
    for trust, expected in ((0.01, (0.05, 0.05)), (None, (1.0, 1000.0))):
        moved = []
        for scale in (1.0, 1000.0):
            weight = nn.Parameter(torch.tensor([3.0, 4.0]))
            weight.grad = torch.tensor([scale, 0.0])
            LARS([weight], lr=1.0, momentum=0.0, trust_coefficient=trust).step()
            moved.append((weight.detach() - torch.tensor([3.0, 4.0])).norm().item())
        assert moved == pytest.approx(expected, rel=1e-5)


def test_lars_moves_a_zero_weight():
    """A tensor that starts at zero has no norm to scale by and takes the plain step."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, -1.0])
    LARS([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.5, 0.5]))
