"""Initial weights from a file: loaded whole, adapted by rule, or refused."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from hcsdl.config import ConfigError, DataError, ModelConfig
from hcsdl.models import build_model
from hcsdl.models.weights import adapt_stem, load_weights


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the paths of one torchvision ResNet-18 of 10 classes as .pth and .safetensors, and its state dict."""
    torch.manual_seed(3)
    state = torchvision.models.resnet18(num_classes=10).state_dict()
    folder = tmp_path_factory.mktemp("weights")
    torch.save(state, folder / "resnet18.pth")
    save_file(state, folder / "resnet18.safetensors")
    return {"pth": folder / "resnet18.pth", "safetensors": folder / "resnet18.safetensors", "state": state}


def resnet(in_channels=3, num_classes=10, **settings):
    """Return a fresh network."""
    torch.manual_seed(0)
    return build_model(ModelConfig(**settings), in_channels, num_classes)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_whole_file(files, suffix):
    """Every tensor arrives, from both formats."""
    model = resnet()
    said = load_weights(model, files[suffix])
    assert "122 tensors" in said and "fresh" not in said and "adapted" not in said
    for key, value in files["state"].items():
        assert torch.equal(model.state_dict()[key], value), key


def test_other_number_of_classes(files):
    """The classifier stays as it was, the rest is loaded, and the sentence says so."""
    model, fresh = resnet(num_classes=7), resnet(num_classes=7)
    assert "classifier left fresh (7 classes)" in load_weights(model, files["pth"])
    assert torch.equal(model.fc.weight, fresh.fc.weight) and torch.equal(model.fc.bias, fresh.fc.bias)
    assert torch.equal(model.layer4[1].conv2.weight, files["state"]["layer4.1.conv2.weight"])


def test_file_without_classifier_or_counters(files, tmp_path):
    """Files of a bare trunk, and old ones without batch norm's counters, load too."""
    state = {key: value for key, value in files["state"].items() if not key.startswith("fc.") and "tracked" not in key}
    save_file(state, tmp_path / "trunk.safetensors")
    model = resnet()
    assert "classifier left fresh" in load_weights(model, tmp_path / "trunk.safetensors")
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("channels", [1, 6])
def test_stem_answers_grey_images_as_before(files, channels):
    """An image with equal channels gives the same as the same image in three channels."""
    three, other = resnet().eval(), resnet(in_channels=channels).eval()
    load_weights(three, files["pth"])
    said = load_weights(other, files["pth"])
    assert f"conv1.weight adapted from 3 to {channels} channels" in said
    grey = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        expected, found = (model.conv1(grey.expand(-1, model.in_channels, -1, -1)) for model in (three, other))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_stem_rule():
    """One channel: the sum. Others: red, green, blue, red, … times 3 / n."""
    red, green, blue = (torch.full((2, 1, 7, 7), value) for value in (1.0, 2.0, 4.0))
    stem = torch.cat([red, green, blue], dim=1)
    assert torch.equal(adapt_stem(stem, 1), red + green + blue)
    torch.testing.assert_close(adapt_stem(stem, 2), torch.cat([red, green], dim=1) * 1.5)
    torch.testing.assert_close(adapt_stem(stem, 5), torch.cat([red, green, blue, red, green], dim=1) * 0.6)


def test_mcnn_file_with_other_channels(tmp_path):
    """All seven stems of M-CNN are adapted."""
    config = ModelConfig(name="mcnn", head="pool", width=0.25)
    save_file(build_model(config, 3, 5).state_dict(), tmp_path / "mcnn.safetensors")
    model = build_model(config, 4, 5)
    assert load_weights(model, tmp_path / "mcnn.safetensors").count("adapted from 3 to 4") == 7


@pytest.mark.parametrize(
    "settings, text", [({"name": "resnet50"}, "is missing"), ({"width": 0.5}, r"conv1.weight has shape \(64, 3, 7, 7\), not \(32")]
)
def test_file_of_another_network(files, settings, text):
    """The first few differing names are told, and the network is left as it was."""
    model, fresh = resnet(**settings), resnet(**settings)
    with pytest.raises(DataError, match=text):
        load_weights(model, files["pth"])
    for key, value in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_unreadable_files(files, tmp_path):
    """Missing, misnamed, truncated and dangerous files are told apart."""
    with pytest.raises(ConfigError, match="must name a file. Found none at"):
        load_weights(resnet(), tmp_path / "none.pth")
    (tmp_path / "weights.bin").write_bytes(b"0")
    with pytest.raises(ConfigError, match="must end in .pth"):
        load_weights(resnet(), tmp_path / "weights.bin")
    for suffix in ("pth", "safetensors"):
        for size in (0, 1000, 1_000_000):
            path = tmp_path / f"cut{size}.{suffix}"
            path.write_bytes(files[suffix].read_bytes()[:size])
            with pytest.raises(DataError, match="cannot be read"):
                load_weights(resnet(), path)
    torch.save(resnet(), tmp_path / "pickled.pth")
    with pytest.raises(DataError, match="cannot be read"):
        load_weights(resnet(), tmp_path / "pickled.pth")
    torch.save({"epoch": 3}, tmp_path / "checkpoint.pth")
    with pytest.raises(DataError, match="must be one dictionary of tensors"):
        load_weights(resnet(), tmp_path / "checkpoint.pth")
