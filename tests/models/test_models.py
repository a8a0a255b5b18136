"""Both networks keep timm's manners, train, and refuse what cannot be."""

import copy

import pytest
import torch
import torchvision
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import CheckpointPolicy

import hcsdl.kernels.winograd  # noqa: F401  defines an operator
from hcsdl.config import ConfigError, DataError, ModelConfig
from hcsdl.models import build_model
from hcsdl.models.layers import _worth_keeping, recomputed, remembered, scaled_channels
from hcsdl.models.resnet import LAYOUTS

SMALL = {"resnet18": (64, 96), "resnet34": (64, 96), "resnet50": (64, 96), "mcnn": (128, 128)}
"""Rows and columns of a small image for each network."""


def small_model(name, seed=0, in_channels=3, num_classes=5, **settings):
    """Return a network with fixed weights for images of its small size."""
    torch.manual_seed(seed)
    return build_model(ModelConfig(name=name, **{"width": 0.25, **settings}), in_channels, num_classes, SMALL[name])


def small_images(name, count=4, channels=3):
    """Return fixed images of the network's small size, and labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, *SMALL[name], generator=generator), torch.arange(count) % 5


@pytest.mark.parametrize("name, head", [("resnet18", "fc"), ("resnet50", "fc"), ("mcnn", "fc"), ("mcnn", "pool")])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_timm_manners(name, head, channels):
    """Feature map, embedding and logits have the promised shapes, and the logits are the classifier's of the embedding."""
    model = small_model(name, in_channels=channels, head=head).eval()
    images, _ = small_images(name, count=2, channels=channels)
    with torch.no_grad():
        features = model.forward_features(images)
        embedding = model.forward_head(features, pre_logits=True)
        logits = model(images)
    stride = 64 if name == "mcnn" else 32
    assert features.shape == (2, model.num_features, SMALL[name][0] // stride, SMALL[name][1] // stride)
    assert embedding.shape == (2, model.head_hidden_size)
    assert logits.shape == (2, model.num_classes) == (2, 5)
    assert model.in_channels == channels
    assert torch.equal(model.fc(embedding), logits)
    assert torch.equal(model.forward_head(features), logits)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_width_one_is_torchvision(name):
    """With width 1 names, initial weights and logits are torchvision's, bit for bit."""
    torch.manual_seed(0)
    ours = build_model(ModelConfig(name=name, zero_init_residual=True), 3, 10)
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10, zero_init_residual=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_zero_init_residual():
    """With it every block starts as its shortcut, without it none does."""
    for wanted in (True, False):
        model = small_model("resnet50", zero_init_residual=wanted)
        gammas = [block.bn3.weight for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
        assert all((gamma == 0).all() == wanted for gamma in gammas)


@pytest.mark.parametrize(
    "channels, width, expected", [(64, 1.0, 64), (64, 0.5, 32), (16, 0.75, 16), (16, 0.7, 8), (16, 0.01, 8), (1024, 1.5, 1536)]
)
def test_scaled_channels(channels, width, expected):
    """Channels are rounded to the nearest multiple of 8, never to 0."""
    assert scaled_channels(channels, width) == expected


@pytest.mark.parametrize("name, head", [("resnet18", "fc"), ("resnet34", "fc"), ("resnet50", "fc"), ("mcnn", "fc"), ("mcnn", "pool")])
def test_every_parameter_gets_a_gradient(name, head):
    """No parameter is dead in a training step (residual branches that start at zero do get theirs through the scale)."""
    model = small_model(name, head=head, zero_init_residual=False)
    images, labels = small_images(name)
    F.cross_entropy(model(images), labels).backward()
    dead = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not dead


@pytest.mark.parametrize(
    "name, head, rate", [("resnet18", "fc", 0.05), ("resnet50", "fc", 0.05), ("mcnn", "fc", 0.02), ("mcnn", "pool", 0.05)]
)
def test_overfits_one_mini_batch(name, head, rate):
    """Four noise images are learned by heart in a few steps."""
    model = small_model(name, head=head)
    images, labels = small_images(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        if loss.item() < 0.1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


GOLDEN = {
    ("resnet18", "fc"): (1.680569, 1.562877, 1.471444),
    ("resnet34", "fc"): (1.745867, 1.596465, 1.477741),
    ("resnet50", "fc"): (1.682633, 1.427844, 1.237556),
    ("mcnn", "fc"): (1.731376, 1.595834, 1.529120),
    ("mcnn", "pool"): (1.575881, 1.534413, 1.502375),
}
"""Loss before and after one and two steps of SGD at 0.01 (the second is the first to reach the residual branches, which start at zero),
recorded in fp32 on a CPU; torch 2.8 and 2.13, AVX2 and AVX-512 agree to 1e-6."""


@pytest.mark.parametrize("name, head", list(GOLDEN))
def test_golden_loss(name, head):
    """A network, its initialisation and its gradients give the recorded losses."""
    model = small_model(name, head=head)
    images, labels = small_images(name)
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        loss = F.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(GOLDEN[name, head], abs=2e-5)


@pytest.mark.parametrize("name, head", [("resnet18", "fc"), ("resnet50", "fc"), ("mcnn", "fc"), ("mcnn", "pool")])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputed_activations_change_nothing(name, head, bf16, how):
    """Loss, gradients and batch norm's buffers after two steps are the same, bit for bit, with and without recomputation."""
    images, labels = small_images(name)
    results = []
    for recompute in ("none", how):
        model = small_model(name, head=head, checkpoint_activations=recompute)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                logits = model(images)
            optimizer.zero_grad()
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        results.append({"loss": loss.detach(), **gradients, **dict(model.named_buffers())})
    plain, again = results
    assert plain.keys() == again.keys()
    assert [key for key in plain if not torch.equal(plain[key], again[key])] == []
    if name != "mcnn":
        assert again["bn1.num_batches_tracked"] == again["layer1.0.bn1.num_batches_tracked"] == 2


def test_recomputing_keeps_fewer_tensors():
    """The switch does what it is for: less is kept between the passes, and as much of it as is said."""
    kept = {how: kept_bytes("resnet50", how) for how in ("none", "selective", "full")}
    assert kept["full"] < kept["selective"] < 0.42 * kept["none"]


@pytest.mark.parametrize(
    ("taken", "made", "side", "kept"),
    [(64, 256, 1, False), (128, 512, 1, False), (256, 1024, 1, True), (256, 64, 1, True), (64, 64, 1, False), (64, 64, 3, True)],
)
def test_selective_keeps_what_costs_much(taken, made, side, kept):
    """Of ResNet-50 at width 1: the expanding convolutions of its first two stages are computed again, those of the third and all 3×3 ones kept."""
    weight = torch.empty(made, taken, side, side)
    for operator in (torch.ops.aten.convolution.default, torch.ops.hcsdl.convolution.default):
        policy = _worth_keeping(None, operator, torch.empty(1, taken, 8, 8), weight)
        assert (policy == CheckpointPolicy.MUST_SAVE) == kept


@pytest.mark.parametrize("selective", [False, True])
def test_what_is_remembered_is_not_computed_again(selective):
    """The second pass takes what the first one had, in the same order, and computes the rest; the same gradients come of it."""
    calls, norm = [], torch.nn.BatchNorm1d(3)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def function(x, y):
        means = [remembered(lambda place=place: calls.append(place) or x.detach().mean(place)) for place in (0, 1)]
        return norm((x - means[0]).exp() * y) * means[1][:, None]

    expected = torch.autograd.grad(function(x, 2 * x).sum(), x)[0]
    found = torch.autograd.grad(recomputed(function, x, 2 * x, buffers_of=norm, selective=selective).sum(), x)[0]
    assert torch.equal(found, expected) and expected.any()
    assert calls == [0, 1, 0, 1] and norm.num_batches_tracked == 2


def kept_bytes(name, how):
    """Return what a network holds after its forward pass beyond what it held before."""
    model, images = small_model(name, checkpoint_activations=how), small_images(name)[0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        logits = model(images)
    assert logits.requires_grad
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


@pytest.mark.parametrize("name", ["resnet18", "mcnn"])
def test_copies_are_alike_and_apart(name):
    """A deep copy, which kernels make, computes the same and shares nothing."""
    model = small_model(name).eval()
    other = copy.deepcopy(model)
    images, _ = small_images(name, count=1)
    assert torch.equal(model(images), other(images))
    with torch.no_grad():
        other.fc.weight.zero_()
    assert model.fc.weight.any()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_smallest_image(name):
    """The smallest image trains in a mini-batch of one; a row less is an error that names the minimum."""
    model = build_model(ModelConfig(name=name, width=0.25), 3, 5)
    rows, columns = model.minimum_size
    assert torch.isfinite(model(torch.randn(1, 3, rows, columns))).all()
    with pytest.raises(DataError, match=f"at least {rows} rows and {columns} columns.*Got {rows - 1} × {columns}"):
        model(torch.randn(1, 3, rows - 1, columns))
    with pytest.raises(ConfigError, match=f"at least {rows} rows and {columns} columns"):
        build_model(ModelConfig(name=name), 3, 5, (rows, columns - 1))


@pytest.mark.parametrize("channels, classes, text", [(0, 5, "at least 1 channel"), (3, 1, "at least 2 classes")])
def test_impossible_networks(channels, classes, text):
    """No channels, or one class, is an error and not a network."""
    with pytest.raises(ConfigError, match=text):
        build_model(ModelConfig(), channels, classes)


def test_wrong_channels():
    """Images with other channels than the network's are an error that names both."""
    with pytest.raises(DataError, match=r"\(N, 3, rows, columns\). Got \(2, 4, 64, 96\)"):
        small_model("resnet18")(torch.randn(2, 4, 64, 96))
