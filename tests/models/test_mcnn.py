"""M-CNN is the published network, at any size, and the same as its plain description."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hcsdl.config import ConfigError, DataError, ModelConfig
from hcsdl.models import build_model

FULL = (1024, 1280)


def mcnn(image_size=None, in_channels=3, num_classes=13, **settings):
    """Return an M-CNN."""
    return build_model(ModelConfig(name="mcnn", **settings), in_channels, num_classes, image_size)


def test_parameters_and_operations_are_the_published_ones():
    """42.58 M parameters, 162 MiB of fp32, 98.5 % in one layer, 25.7 GMAC forward for one whole image, an 8 × 10 × 1024 grid."""
    with torch.device("meta"):
        model = mcnn(FULL)
        with FlopCounterMode(display=False) as counter:
            features = model.forward_features(torch.empty(1, 3, *FULL))
            model.forward_head(features)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 42_577_261
    assert round(4 * count / 2**20) == 162
    assert model.hidden.in_features == 81_920
    assert model.hidden.weight.numel() / count == pytest.approx(0.985, abs=5e-4)
    assert features.shape == (1, 1024, 16, 20)
    assert counter.get_total_flops() / 2 == pytest.approx(25.7e9, rel=1e-3)


def test_pool_head_drops_the_large_layer():
    """What is left is the columns, the 1×1 convolution and a classifier on 1024 features."""
    with torch.device("meta"):
        model = mcnn(head="pool")
    left = 42_577_261 - (81_920 * 512 + 512) - (512 * 13 + 13) + (1024 * 13 + 13)
    assert sum(parameter.numel() for parameter in model.parameters()) == left
    assert model.head_hidden_size == model.num_features == 1024


def plainly(model, images):
    """Compute M-CNN as the paper tells it: every column from the image itself, ReLU after every convolution, then pooling."""
    parts = []
    for n, column in enumerate(model.columns):
        part = F.max_pool2d(images, 2**n)
        for place in (0, 2, 4):
            part = F.relu(F.conv2d(part, column[place].weight, column[place].bias, padding=2))
        parts.append(F.max_pool2d(part, 2 ** (6 - n)))
    grid = F.max_pool2d(F.relu(F.conv2d(torch.cat(parts, 1), model.mix.weight, model.mix.bias)), 2)
    return F.linear(F.relu(F.linear(grid.flatten(1), model.hidden.weight, model.hidden.bias)), model.fc.weight, model.fc.bias)


@pytest.mark.parametrize("size", [(128, 192), (255, 129), (141, 263)])
def test_same_as_its_plain_description(size):
    """Logits and gradients are the plain computation's, also where the size is not divisible by 64."""
    torch.manual_seed(0)
    model = mcnn(size, width=0.5)
    images, labels = torch.randn(2, 3, *size), torch.tensor([0, 7])
    gradients = []
    for forward in (model, lambda images: plainly(model, images)):
        logits = forward(images)
        gradients.append((logits, *torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", range(64, 200, 9))
def test_columns_meet_on_one_grid(rows):
    """Whatever the size, all columns end on H // 64 × W // 64."""
    with torch.device("meta"):
        model = mcnn(head="pool")
        assert model.forward_features(torch.empty(1, 3, rows, 263 - rows)).shape == (1, 1024, rows // 64, (263 - rows) // 64)


def test_initialisation():
    """Xavier's uniform bound on every weight, zero on every bias."""
    torch.manual_seed(0)
    model = mcnn((128, 128))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert not parameter.any(), name
        else:
            field = parameter[0, 0].numel() if parameter.ndim == 4 else 1
            bound = (6 / ((parameter.shape[0] + parameter.shape[1]) * field)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name


def test_width_multiplies_every_layer():
    """Half the width: half the columns, half the mix, half the embedding."""
    model = mcnn((128, 128), width=0.5)
    assert [column[0].out_channels for column in model.columns] == [8, 8, 8, 16, 16, 16, 32]
    assert (model.num_features, model.head_hidden_size) == (512, 256)


@pytest.mark.parametrize("head, minimum", [("fc", 128), ("pool", 64)])
def test_smallest_image(head, minimum):
    """The smallest image passes; a column less is an error that names the minimum, when built and when run."""
    model = mcnn((minimum, minimum), head=head, width=0.25)
    assert model.minimum_size == (minimum, minimum)
    assert torch.isfinite(model(torch.randn(1, 3, minimum, minimum))).all()
    with pytest.raises(ConfigError, match=f"at least {minimum} rows and {minimum} columns.*Got {minimum} × {minimum - 1}"):
        mcnn((minimum, minimum - 1), head=head)
    with pytest.raises(DataError, match=f"at least {minimum} rows and {minimum} columns.*Got {minimum - 1} × {minimum}"):
        model(torch.randn(1, 3, minimum - 1, minimum))


def test_fc_head_takes_one_size():
    """It needs a size to be built, and names both sizes when fed another."""
    with pytest.raises(ConfigError, match="needs the size of the images"):
        mcnn()
    model = mcnn((128, 192), width=0.25)
    with pytest.raises(DataError, match="128 × 192, got 192 × 128"):
        model(torch.randn(1, 3, 192, 128))


def test_pool_head_takes_any_size():
    """One network, images of several sizes."""
    model = mcnn(head="pool", width=0.25).eval()
    for size in ((64, 64), (100, 230), (192, 128)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 13)
