"""Batch norm with what follows it: the numbers, gradients and running statistics of torch's operators, in every shape and instruction set."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hcsdl.kernels import batch_norm
from hcsdl.kernels.batch_norm import batch_norm_relu, batch_norm_relu_twice, plain_batch_norm_relu
from hcsdl.kernels.native.build import InstructionSet
from tests.kernels import instructions

SHAPES = [(2, 16, 5, 7), (1, 64, 9, 8), (3, 13, 1, 11), (2, 33, 3, 3), (1, 1, 4, 4), (1, 40, 1, 6), (2, 70, 20, 21), (1, 17, 300, 1)]
FORMS = ["plain", "relu", "add"]
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}
"""Of the largest difference over the largest value: a few roundings of sums of up to 840 values; bf16 rounds by up to 2^-9, the backward pass twice."""


def norm_of(channels: int, momentum: float | None = 0.1) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=momentum)
    for tensor, low, high in ((norm.weight, -1.5, 1.5), (norm.bias, -0.5, 0.5), (norm.running_mean, -1, 1), (norm.running_var, 0.5, 2)):
        nn.init.uniform_(tensor, low, high)
    return norm


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 3 * (seed == 0)
    return made.to(dtype).contiguous(memory_format=torch.channels_last)


def passes(function, x: Tensor, norm: nn.BatchNorm2d, form: str, residual: Tensor | None, gradient: Tensor) -> dict[str, Tensor]:
    """Return the output, all gradients and the buffers, after one forward and one backward pass."""
    norm.zero_grad()
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_() if form == "add" else None
    out = function(x, norm, residual, relu=form != "plain")
    out.backward(gradient)
    found = {"out": out.detach(), "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    found |= {name: buffer.clone() for name, buffer in norm.named_buffers()}
    return found | ({"dresidual": residual.grad} if form == "add" else {})


def largest(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-6))


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    differences = {name: largest(found[name], value) for name, value in expected.items()}
    print({name: f"{value:.1e}" for name, value in differences.items()})
    assert max(differences.values()) < limit, differences


@pytest.mark.parametrize("each", instructions.EACH)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_numbers_and_gradients_are_those_of_the_twin(
    each: InstructionSet, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    instructions.use(each, batch_norm, monkeypatch)
    for shape in SHAPES:
        torch.manual_seed(1)
        norm = norm_of(shape[1])
        double, same = copy.deepcopy(norm).double(), copy.deepcopy(norm)
        x, residual, gradient = (drawn(shape, dtype, seed) for seed in range(3))
        found = passes(batch_norm_relu, x, norm, form, residual, gradient)
        exact = passes(plain_batch_norm_relu, x.double(), double, form, residual.double(), gradient.double())
        agree(found, exact, LIMITS[dtype])
        assert found["out"].dtype == found["dx"].dtype == dtype and found["dweight"].dtype == torch.float32
        plain = passes(plain_batch_norm_relu, x, same, form, residual, gradient)
        for name, value in exact.items():  # torch rounds in between, which in bf16 turns some ReLUs over
            assert largest(found[name], value) <= 1.2 * largest(plain[name], value) + LIMITS[dtype] / 4, name


def test_the_twin_passes_gradcheck_and_the_operator_follows_finite_differences() -> None:
    """The operator knows no fp64, in which gradcheck works: its twin takes that, and the operator is measured against differences of the twin."""
    torch.manual_seed(2)
    x, residual = torch.randn(2, 5, 3, 2, dtype=torch.float64), torch.randn(2, 5, 3, 2, dtype=torch.float64)
    norm = norm_of(5).double()
    whole = (x.requires_grad_(), residual.requires_grad_(), norm.weight, norm.bias)

    def twin(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.relu(nn.functional.batch_norm(x, None, None, weight, bias, True, 0.1, norm.eps) + residual)

    assert torch.autograd.gradcheck(twin, whole)
    single = copy.deepcopy(norm).float()
    gradient = torch.randn(2, 5, 3, 2)
    found = passes(batch_norm_relu, x.float(), single, "add", residual.float(), gradient)
    step = 1e-6
    for name, position in (("dx", 0), ("dresidual", 1), ("dweight", 2), ("dbias", 3)):
        direction = torch.randn_like(whole[position])
        sides = []
        for sign in (step, -step):
            moved = [value.detach() + sign * direction if n == position else value.detach() for n, value in enumerate(whole)]
            sides.append(float((twin(*moved) * gradient).sum()))
        assert float((found[name] * direction).sum()) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_move_as_torchs(momentum: float | None) -> None:
    torch.manual_seed(3)
    ours = norm_of(24, momentum)
    theirs = copy.deepcopy(ours)
    for seed in range(4):
        x = drawn((2, 24, 6, 5), torch.float32, seed)
        batch_norm_relu(x, ours), plain_batch_norm_relu(x, theirs)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 4
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=1e-6)


def test_a_large_mean_costs_no_digits() -> None:
    norm = nn.BatchNorm2d(8)
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(4)).contiguous(memory_format=torch.channels_last) + 4096
    exact = plain_batch_norm_relu(x.double(), copy.deepcopy(norm).double(), relu=False)
    assert largest(batch_norm_relu(x, norm, relu=False).detach(), exact.detach()) < 1e-4, "the mean itself is rounded by up to 4096 · 2^-24"


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_other_memory_formats_are_copied(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    norm = norm_of(20)
    x, residual, gradient = (drawn((2, 20, 6, 10), dtype, seed) for seed in range(3))
    expected = passes(batch_norm_relu, x, copy.deepcopy(norm), "add", residual, gradient)
    for strange in (
        Tensor.contiguous,
        lambda t: t.repeat_interleave(2, 3)[..., ::2],
        lambda t: t.flip(2).flip(2).transpose(2, 3).contiguous().transpose(2, 3),
    ):
        found = passes(batch_norm_relu, strange(x), copy.deepcopy(norm), "add", strange(residual), strange(gradient))
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_the_operator_would_misread_is_torchs() -> None:
    """Parameters with gaps between them, a residual of one pixel, statistics in fp64: by their addresses alone they are other numbers."""
    torch.manual_seed(5)
    x, residual = drawn((2, 24, 6, 5), torch.float32, 0), drawn((1, 24, 1, 1), torch.float32, 1)
    strange = norm_of(24)
    strange.weight, strange.bias = (nn.Parameter(torch.randn(48)[::2]) for _ in range(2))
    for norm, added in ((strange, None), (norm_of(24), residual)):
        theirs = copy.deepcopy(norm)
        torch.testing.assert_close(batch_norm_relu(x, norm, added), plain_batch_norm_relu(x, theirs, added))
        torch.testing.assert_close(norm.running_var, theirs.running_var)
    double = norm_of(24)
    double.running_mean, double.running_var = double.running_mean.double(), double.running_var.double()
    with pytest.raises(RuntimeError):
        batch_norm_relu(x, double)


def test_an_empty_mini_batch_and_a_single_value_do_what_torch_does() -> None:
    ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.zeros(0, 3, 4, 4)
    with_torch = plain_batch_norm_relu(x, theirs)
    assert batch_norm_relu(x, ours).shape == with_torch.shape == x.shape
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm_relu(torch.zeros(1, 3, 1, 1), ours)


@pytest.mark.parametrize("each", instructions.EACH)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_channel_alone(
    each: InstructionSet, form: str, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    instructions.use(each, batch_norm, monkeypatch)
    torch.manual_seed(6)
    norm = norm_of(19)
    x, residual, gradient = (drawn((2, 19, 5, 4), dtype, seed) for seed in range(3))
    x[1, 17, 3, 2] = value
    found = passes(batch_norm_relu, x, copy.deepcopy(norm), form, residual, gradient)
    expected = passes(plain_batch_norm_relu, x, norm, form, residual, gradient)
    for name in ("out", "dx"):
        assert torch.equal(found[name].isfinite().all(dim=(0, 2, 3)), expected[name].isfinite().all(dim=(0, 2, 3))), name
        assert not found[name][:, 17].isfinite().any()
    assert found["running_var"].isfinite().sum() == 18 and not found["dweight"][17].isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_residual_and_a_gradient_that_are_not_finite_are_carried_through(value: float) -> None:
    norm = nn.BatchNorm2d(5)
    x, residual, gradient = (drawn((2, 5, 4, 4), torch.bfloat16, seed) for seed in range(3))
    residual[0, 2, 1, 1] = value
    found = passes(batch_norm_relu, x, norm, "add", residual, gradient)
    assert (~found["out"].isfinite()).sum() == 1 and not found["out"][0, 2, 1, 1].isfinite()
    assert found["dresidual"][0, 2, 1, 1] == gradient[0, 2, 1, 1]
    gradient[1, 3, 0, 0] = value
    assert not passes(batch_norm_relu, x, norm, "plain", residual, gradient)["dx"][:, 3].isfinite().any()


@pytest.mark.parametrize("form", FORMS)
def test_bits_do_not_depend_on_the_number_of_threads(form: str) -> None:
    torch.manual_seed(7)
    norm = norm_of(48)
    x, residual, gradient = (drawn((3, 48, 23, 29), torch.bfloat16, seed) for seed in range(3))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(passes(batch_norm_relu, x, copy.deepcopy(norm), form, residual, gradient))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other[name], value) for other in found[1:] for name, value in found[0].items())


@pytest.mark.parametrize("each", instructions.EACH)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_two_gradients_are_added_as_autograd_adds_them(each: InstructionSet, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    instructions.use(each, batch_norm, monkeypatch)
    for shape in SHAPES:
        torch.manual_seed(9)
        norm = norm_of(shape[1])
        x, residual, first, second = (drawn(shape, dtype, seed) for seed in range(4))
        second[0, 0, 0, 0] = float("nan")
        for one, other in ((first, second), (first, None), (None, second), (first.contiguous(), second)):
            together = sum(each for each in (one, other) if each is not None)
            expected = passes(batch_norm_relu, x, copy.deepcopy(norm), "add", residual, together)
            weights, taken = copy.deepcopy(norm), [x.detach().requires_grad_(), residual.detach().requires_grad_()]
            twice = batch_norm_relu_twice(taken[0], weights, taken[1])
            assert twice[0].data_ptr() == twice[1].data_ptr() and torch.equal(twice[1], expected["out"])
            given = [(out, gradient) for out, gradient in zip(twice, (one, other), strict=True) if gradient is not None]
            torch.autograd.backward(*zip(*given, strict=True))
            found = {"dx": taken[0].grad, "dresidual": taken[1].grad, "dweight": weights.weight.grad, "dbias": weights.bias.grad}
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_evaluation_gives_torchs_output_twice() -> None:
    norm = norm_of(12).eval()
    x, residual = (drawn((2, 12, 4, 4), torch.float32, seed) for seed in range(2))
    for out in batch_norm_relu_twice(x, norm, residual):
        assert torch.equal(out, plain_batch_norm_relu(x, norm, residual))


def test_outputs_past_the_caches_are_the_same() -> None:
    """Above 16 MiB outputs are streamed: the same numbers as of its halves, whose statistics are equal."""
    norm = nn.BatchNorm2d(64)
    half, residual, gradient = (drawn((1, 64, 256, 272), torch.bfloat16, seed) for seed in range(3))
    whole = passes(
        batch_norm_relu, torch.cat([half, half]), copy.deepcopy(norm), "add", torch.cat([residual] * 2), torch.cat([gradient] * 2)
    )
    part = passes(batch_norm_relu, half, norm, "add", residual, gradient)
    for name in ("out", "dx", "dresidual"):
        torch.testing.assert_close(whole[name], torch.cat([part[name]] * 2), rtol=1e-2, atol=1e-2)
        assert whole[name].isfinite().all() and whole[name].any()


def test_evaluation_and_frozen_statistics_are_torchs() -> None:
    torch.manual_seed(8)
    norm = norm_of(12).eval()
    x = drawn((2, 12, 4, 4), torch.float32)
    assert torch.equal(batch_norm_relu(x, norm), plain_batch_norm_relu(x, norm))
    untracked = nn.BatchNorm2d(12, track_running_stats=False)
    torch.testing.assert_close(batch_norm_relu(x, untracked), plain_batch_norm_relu(x, untracked))
