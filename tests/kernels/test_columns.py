"""M-CNN's columns: gradients only where there are any, and the same as torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hcsdl.config import ModelConfig
from hcsdl.kernels import columns as module
from hcsdl.kernels.columns import SparseColumn, replace_columns
from hcsdl.kernels.native.build import InstructionSet
from hcsdl.models import build_model
from hcsdl.models.mcnn import _column
from tests.kernels import instructions

SHAPES = [(2, 3, 64, 96), (1, 3, 45, 33), (1, 1, 32, 64), (3, 5, 70, 40), (1, 2, 32, 32)]


def columns(in_channels: int, channels: int = 16, window: int = 32) -> tuple[nn.Sequential, SparseColumn]:
    """Return a plain column and the same one replaced."""
    torch.manual_seed(0)
    plain = _column(in_channels, channels, window)
    for layer in plain:
        if isinstance(layer, nn.Conv2d):
            nn.init.uniform_(layer.bias, -0.1, 0.2)
    return plain, SparseColumn(*copy.deepcopy(plain))


def images(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=torch.channels_last)


def passes(column: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    column.zero_grad()
    out = column(x)
    out.backward(images(out.shape, 1).to(out.dtype))
    return {"out": out.detach()} | {name: parameter.grad for name, parameter in column.named_parameters()}


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9))


@pytest.mark.parametrize("each", instructions.EACH)
@pytest.mark.parametrize("channels", [16, 32])
def test_numbers_and_gradients_are_torchs(each: InstructionSet, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    instructions.use(each, module, monkeypatch)
    for shape in SHAPES:
        plain, sparse = columns(shape[1], channels)
        found, exact = passes(sparse, images(shape)), passes(plain.double(), images(shape).double())
        differences = {name: largest(found[name], value) for name, value in exact.items()}
        print(shape, {name: f"{value:.1e}" for name, value in differences.items()})
        assert max(differences.values()) < 1e-5, (shape, differences)


def test_in_bf16_at_least_as_close_to_fp64_as_torchs() -> None:
    plain, sparse = columns(3)
    x = images((2, 3, 96, 128))
    exact = passes(copy.deepcopy(plain).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, theirs = passes(sparse, x), passes(plain, x)
    for name, value in exact.items():
        print(name, f"ours {largest(found[name], value):.4f}, torch's {largest(theirs[name], value):.4f}")
        assert largest(found[name], value) < 1.25 * largest(theirs[name], value) + 1e-3, name
    assert found["0.weight"].dtype == torch.float32


def test_finite_differences() -> None:
    """The operator knows no fp64, in which gradcheck works: its weights' gradients against differences of the fp64 twin, along one direction each."""
    plain, sparse = columns(2)
    plain, x = plain.double(), images((1, 2, 40, 36))
    found = passes(sparse, x)
    gradient = images((1, 16, 1, 1), 1).double()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in plain.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        sides = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                sides.append(float((plain(x.double()) * gradient).sum()))
                parameter.sub_(direction, alpha=step)
        assert float((found[name] * direction).sum()) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(value: float) -> None:
    plain, sparse = columns(3)
    x = images((2, 3, 64, 64))
    x[1, 0, 40, 40] = value
    found, expected = passes(sparse, x), passes(plain, x)
    assert torch.equal(found["out"].isnan(), expected["out"].isnan()) and torch.equal(found["out"].isinf(), expected["out"].isinf())
    assert not found["out"].isfinite().all() and not found["0.weight"].isfinite().all()


def test_same_bits_for_the_same_threads_and_the_same_numbers_for_others() -> None:
    _, sparse = columns(3)
    x, before, found = images((2, 3, 96, 64)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(passes(sparse, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[1][name], value) for name, value in found[2].items())
    assert all(largest(other[name], value) < 1e-5 for other in found[1:] for name, value in found[0].items())


def test_other_memory_formats_empty_mini_batches_and_gradients_of_images() -> None:
    plain, sparse = columns(3)
    x = images((2, 3, 64, 64))
    expected = passes(sparse, x)
    for strange in (x.contiguous(), x.repeat_interleave(2, 3)[..., ::2]):
        assert all(largest(value, expected[name]) < 1e-6 for name, value in passes(sparse, strange).items())
    assert sparse(torch.zeros(0, 3, 64, 64)).shape == (0, 16, 2, 2)
    x.requires_grad_()
    wanted = torch.autograd.grad(plain(x).sum(), x)[0]
    assert largest(torch.autograd.grad(sparse(x).sum(), x)[0], wanted) < 1e-6, "which the operator does not compute: torch's do"


def test_only_columns_with_large_windows_and_whole_vectors_are_replaced() -> None:
    model = build_model(ModelConfig(name="mcnn"), 3, 4, (128, 128))
    before = dict(model.named_parameters())
    assert replace_columns(model) == 2
    assert [type(column) is SparseColumn for column in model.columns] == [True, True, False, False, False, False, False]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert replace_columns(build_model(ModelConfig(name="mcnn", width=0.5), 3, 4, (128, 128))) == 0
    assert replace_columns(nn.Sequential(nn.ReLU())) == 0
