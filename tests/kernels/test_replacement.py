"""Networks with our operators: the same names, objects, numbers and gradients, in training, evaluation, inference and checkpointed activations."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from hcsdl.config import ModelConfig, TrainingConfig
from hcsdl.distributed.group import Group
from hcsdl.kernels import Kernels, batch_norm, convolution
from hcsdl.kernels.inference import for_inference
from hcsdl.kernels.replacement import FusedResNet, replace_operators, replaced
from hcsdl.models import build_model
from hcsdl.models.resnet import ResNet
from hcsdl.training.optimizers import build_optimizer
from tests import runs
from tests.distributed.ranks import on_ranks

PLAIN_NETWORKS = {"resnet18": {"batch norms": 20, "max-pools": 1}, "resnet34": {"batch norms": 36, "max-pools": 1},
            "resnet50": {"batch norms": 53, "max-pools": 1}, "mcnn": {"sparse columns": 2, "max-pools": 8}}  # fmt: skip
CONVOLUTIONS = {
    "resnet18": 10,
    "resnet34": 24,
    "resnet50": 12,
    "mcnn": 10,
}  # of the small networks here: those with enough products a value
NETWORKS = {name: parts | ({"convolutions": CONVOLUTIONS[name]} if convolution.usable() else {}) for name, parts in PLAIN_NETWORKS.items()}
FUSED = {precision: Kernels("fused", precision, "asked for") for precision in ("fp32", "bf16")}


def network(name: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, width=1.0 if name == "mcnn" else 0.25, **settings), 3, 5, (128, 160))
    for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d) and not part.weight.any()):
        nn.init.constant_(norm.weight, 0.25)  # blocks begin at zero, and what they add to their shortcut would not be seen
    return model


def images(count: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 128, 160, generator=generator).contiguous(memory_format=torch.channels_last)


def gradients(model: nn.Module, kernels: Kernels, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with kernels.autocast():
        logits = model(x)
    nn.functional.cross_entropy(logits.float(), torch.arange(len(x)) % 5).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()} | {"logits": logits.detach()}


def far(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the distance of all values together, relative to their length."""
    together = [torch.cat([one[name].double().flatten() for name in expected]) for one in (found, expected)]
    return float((together[0] - together[1]).norm() / together[1].norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_objects_stay_and_what_was_replaced_is_counted(name: str) -> None:
    model = network(name)
    before = dict(model.state_dict(keep_vars=True))
    assert replaced(model) == {}
    found, _ = FUSED["fp32"].prepare(model)
    assert found is model and replaced(model) == NETWORKS[name]
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[key] is before[key] for key in before)
    assert replace_operators(model) == NETWORKS[name], "a second time changes nothing"


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", FUSED)
def test_gradients_are_as_close_to_fp64_as_torchs(name: str, precision: str) -> None:
    plain = network(name)
    fused, _ = FUSED[precision].prepare(copy.deepcopy(plain))
    exact = gradients(copy.deepcopy(plain).double(), FUSED["fp32"], images().double())
    ours, theirs = (gradients(model, FUSED[precision], images()) for model in (fused, plain))
    print(f"{name} {precision}: ours {far(ours, exact):.1e}, torch's {far(theirs, exact):.1e}")
    assert far(ours, exact) < 1.5 * far(theirs, exact) + (1e-4 if precision == "fp32" else 0.02)
    for (key, buffer), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(
            buffer, theirs, rtol=1e-4 if precision == "fp32" else 0.05, atol=1e-5 if precision == "fp32" else 0.02, msg=key
        )


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mcnn"])
@pytest.mark.parametrize("precision", FUSED)
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputed_activations_give_the_same_bits(name: str, precision: str, how: str) -> None:
    kept, _ = FUSED[precision].prepare(network(name))
    recomputed, _ = FUSED[precision].prepare(network(name, checkpoint_activations=how))
    found, expected = (gradients(model, FUSED[precision], images()) for model in (recomputed, kept))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert all(torch.equal(a, b) for a, b in zip(recomputed.buffers(), kept.buffers(), strict=True)), "statistics move once"


@pytest.mark.parametrize("how", ["none", "selective"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_branch_and_shortcut_are_added_in_batch_norm_with_the_same_bits(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = FUSED["bf16"].prepare(network(name, checkpoint_activations=how))
    found, added = {}, {}
    for who in ("us", "autograd"):
        if who == "autograd":
            monkeypatch.setattr(FusedResNet, "blocks", ResNet.blocks)
        model.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
            found[who] = gradients(model, FUSED["bf16"], images())
        rows = [row for row in seen.key_averages(group_by_input_shape=True) if row.key in ("aten::add", "aten::add_")]
        added[who] = sum(row.count for row in rows if len(row.input_shapes[0]) == 4)
    assert all(torch.equal(found["us"][key], value) for key, value in found["autograd"].items())
    blocks = sum(isinstance(part, (BasicBlock, Bottleneck)) for part in model.modules())
    assert added == {"us": 1, "autograd": blocks}, "the stem's output has no batch norm of its own behind it"


def test_a_block_alone_is_torchvisions() -> None:
    plain = network("resnet50").layer2
    ours = copy.deepcopy(plain)
    replace_operators(ours)
    x, y = (torch.randn(2, 64, 16, 20, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    expected, found = plain(x), ours(y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward(), found.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_measures_no_statistics_and_makes_no_block_output_again(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native, calls = batch_norm.operators(), Counter()

    def counting(name: str) -> Callable[..., int]:
        return lambda *arguments: calls.update([name]) or getattr(native, name)(*arguments)

    names = "batch_norm_measure", "batch_norm_apply", "batch_norm_backward"
    monkeypatch.setattr(batch_norm, "operators", lambda: SimpleNamespace(**{name: counting(name) for name in names}))
    model, _ = FUSED["bf16"].prepare(network("resnet18", checkpoint_activations=how))
    gradients(model, FUSED["bf16"], images())
    assert calls == {"batch_norm_measure": 20, "batch_norm_apply": 2 * 20 - 8, "batch_norm_backward": 20}


def test_what_is_kept_goes_with_the_graph() -> None:
    """Without a backward pass, too, and without the garbage collector: what recomputation keeps does not keep itself."""
    model, _ = FUSED["bf16"].prepare(network("resnet18", checkpoint_activations="selective"))
    gc.collect()
    gc.disable()
    try:
        logits = model(images())
        assert any(type(seen).__name__ == "_BatchNormBackward" for seen in gc.get_objects())
        del logits
        assert not any(type(seen).__name__ == "_BatchNormBackward" for seen in gc.get_objects())
    finally:
        gc.enable()


def test_gradients_add_up_over_passes() -> None:
    model, _ = FUSED["bf16"].prepare(network("resnet18"))
    parts = [gradients(copy.deepcopy(model), FUSED["bf16"], images(seed=seed)) for seed in (1, 2)]
    for seed in (1, 2):
        with FUSED["bf16"].autocast():
            logits = model(images(seed=seed))
        nn.functional.cross_entropy(logits.float(), torch.arange(2)).backward()
    assert far({n: p.grad for n, p in model.named_parameters()}, {n: parts[0][n] + parts[1][n] for n, _ in model.named_parameters()}) < 1e-6


def distance_to_one_rank(group: Group) -> dict[str, float]:
    """Return how far the ranks' gradients, averaged, are from those of one rank with the whole mini-batch.

    Batch norm's statistics are each rank's own, so ResNet's ranks see the same images, and different labels: the mean of both losses is one rank's.
    """
    labels, found = torch.tensor([0, 1, 2, 3]), {}
    own = labels[2 * group.rank : 2 * group.rank + 2]
    for name in ("resnet18", "mcnn"):
        fields = images(2).repeat(2, 1, 1, 1) if name == "resnet18" else images(4)
        alone, _ = FUSED["fp32"].prepare(network(name))
        nn.functional.cross_entropy(torch.cat([alone(part) for part in fields.split(2)]), labels).backward()
        bare, _ = FUSED["fp32"].prepare(network(name))
        wrapped = group.wrap(bare)
        nn.functional.cross_entropy(wrapped(fields[2 * group.rank : 2 * group.rank + 2]), own).backward()
        found[name] = far(*({n: p.grad for n, p in model.named_parameters()} for model in (bare, alone)))
    return found


def test_two_ranks_average_to_the_gradients_of_one() -> None:
    for said in on_ranks(distance_to_one_rank, 2):
        print(said)
        assert max(said["value"].values()) < 1e-5


def test_a_training_uses_our_operators_by_default_and_says_so(tiny_plates: Path, tmp_path: Path) -> None:
    done = runs.train(tiny_plates, tmp_path / "run", "distributed.ranks=2", "training.epochs=1", "model.width=0.25")
    assert "kernels fused, " in done.stderr and "; 20 batch norms; " in done.stderr and "; 1 max-pools" in done.stderr
    assert "allocator: freed memory kept, large tensors in huge pages; " in done.stderr
    assert runs.summary(tmp_path / "run")["kernels"] == "fused"
    assert runs.journal(tmp_path / "run")[0]["replaced"] == NETWORKS["resnet18"]
    assert set(load_file(tmp_path / "run" / "model.safetensors")) == set(torchvision.models.resnet18().state_dict())


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_evaluation_and_inference_are_the_plain_networks(name: str) -> None:
    plain = network(name)
    fused, _ = FUSED["fp32"].prepare(copy.deepcopy(plain))
    plain(images()), fused(images())
    expected = plain.eval()(images())
    torch.testing.assert_close(fused.eval()(images()), expected, rtol=1e-4, atol=1e-4)
    for model in (plain, fused):
        torch.testing.assert_close(for_inference(model, FUSED["fp32"])(images())[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_optimizers_move_weights_as_without(optimizer: str) -> None:
    model = network("resnet18")
    made = build_optimizer(model, TrainingConfig(optimizer=optimizer, learning_rate=0.02))
    twin = copy.deepcopy(model)
    theirs = build_optimizer(twin, TrainingConfig(optimizer=optimizer, learning_rate=0.02))
    _, ours = FUSED["fp32"].prepare(model, made)
    assert optimizer == "lars" or all(group["fused"] for group in ours.param_groups)
    for step in range(3):
        if step == 1:  # as after a resume, whose file knows no memory formats
            for state in ours.state.values():
                state |= {key: value.contiguous() for key, value in state.items() if torch.is_tensor(value)}
        for n, (a, b) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            a.grad = b.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(100 * step + n))
        ours.step(), theirs.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert a.stride() == b.to(memory_format=torch.channels_last).stride() if a.ndim == 4 else True
        assert {value.shape for value in ours.state[a].values() if torch.is_tensor(value) and value.ndim} == {a.shape}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fused_optimizers_copy_nothing(optimizer: str) -> None:
    model = network("resnet18")
    model, ours = FUSED["fp32"].prepare(model, build_optimizer(model, TrainingConfig(optimizer=optimizer)))
    gradients(model, FUSED["fp32"], images())
    ours.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        ours.step()
    assert {row.key for row in seen.key_averages()} & {"aten::clone", "aten::contiguous"} == set()


def test_weights_load_in_plain_torchvision() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="resnet18"), 3, 5)
    model, _ = FUSED["bf16"].prepare(model)
    gradients(model, FUSED["bf16"], images())
    plain = torchvision.models.resnet18(num_classes=5)
    assert plain.load_state_dict(model.state_dict()).missing_keys == []
    torch.testing.assert_close(plain.eval()(images()), model.eval()(images()), rtol=1e-4, atol=1e-4)


def test_a_network_without_anything_to_replace_says_so(caplog: pytest.LogCaptureFixture) -> None:
    FUSED["fp32"].prepare(nn.Sequential(nn.Linear(3, 3)))
    assert [record.getMessage() for record in caplog.records] == [
        "warning: kernels=fused: Sequential has nothing to replace: it runs as with kernels=native."
    ]
