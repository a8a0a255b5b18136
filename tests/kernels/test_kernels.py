"""Which kernels are chosen, and that they leave a plain network behind."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch

from hcsdl import kernels
from hcsdl.config import ConfigError, ModelConfig, TrainingConfig
from hcsdl.kernels import Kernels, choose_kernels
from hcsdl.kernels.native.build import NoLibrary
from hcsdl.models import build_model
from hcsdl.training.optimizers import build_optimizer

HAS_IPEX = importlib.util.find_spec("intel_extension_for_pytorch") is not None
BF16 = bool(kernels.bf16_flags())
NAMES = ["reference", "native", "fused", pytest.param("ipex", marks=pytest.mark.skipif(not HAS_IPEX, reason="no IPEX here"))]


def test_auto_takes_our_operators() -> None:
    found = choose_kernels("auto")
    assert found.name == "fused" and found.precision == ("bf16" if BF16 else "fp32")
    assert "our operators compiled for" in found.reason and not (BF16 and found.warning)


def test_auto_without_a_compiler_takes_ipex_where_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compile_operators", no_library)
    found = choose_kernels("auto")
    assert found.name == ("ipex" if HAS_IPEX and BF16 else "native")
    assert "there is no C compiler" in found.warning and "there is no C compiler" in found.reason


def no_library() -> str:
    raise NoLibrary("there is no C compiler")


def test_without_bf16_instructions_fp32_and_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "bf16_flags", lambda: [])
    for name, chosen in (("auto", "fused"), ("fused", "fused"), ("native", "native")):
        found = choose_kernels(name)
        assert (found.name, found.precision) == (chosen, "fp32")
        assert "neither AVX512_BF16 nor AMX" in found.warning
    assert choose_kernels("reference").warning == ""


def test_ranks_agree_on_name_and_precision() -> None:
    assert Kernels("fused", "bf16", "here") == Kernels("fused", "bf16", "there", "a warning") != Kernels("native", "bf16", "here")


def test_reference_is_plain_fp32() -> None:
    found = choose_kernels("reference")
    model = torch.nn.Conv2d(3, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert found.prepare(model, optimizer) == (model, optimizer)
    with found.autocast():
        assert model(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


def test_another_torch_than_ipex_wants_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.13.0+cpu")
    monkeypatch.setattr(kernels, "compile_operators", no_library)
    assert choose_kernels("auto").name == "native"
    with pytest.raises(ConfigError, match="IPEX 1.13.0.* is for torch 1.13, and torch is .* Use kernels=native"):
        choose_kernels("ipex")


def test_a_missing_ipex_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match="IPEX is not installed"):
        choose_kernels("ipex")


def steps(name: str, optimizer: str = "sgd", count: int = 3, resume_after: int | None = None) -> tuple[dict, list[float]]:
    """Return weights and losses of a few steps, through a save and a fresh start after `resume_after` of them."""
    chosen = choose_kernels(name)
    torch.manual_seed(0)
    config = TrainingConfig(optimizer=optimizer, learning_rate=0.02)
    model = build_model(ModelConfig(width=0.25), 3, 4)
    made = build_optimizer(model, config)
    model, made = chosen.prepare(model, made)
    images = torch.randn(4, 3, 64, 80, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=torch.channels_last)
    labels, losses = torch.tensor([0, 1, 2, 3]), []
    for step in range(count):
        if step == resume_after:
            state = {k: v.clone() for k, v in model.state_dict().items()}
            moments = made.state_dict()
            model = build_model(ModelConfig(width=0.25), 3, 4)
            model.load_state_dict(state)
            made = build_optimizer(model, config)
            made.load_state_dict(moments)
            model, made = chosen.prepare(model, made)
        with chosen.autocast():
            logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        made.step()
        made.zero_grad()
        losses.append(loss.item())
    return {k: v.clone() for k, v in model.state_dict().items()}, losses


@pytest.mark.parametrize("name", NAMES)
def test_the_state_dict_stays_plain(name: str) -> None:
    state, _ = steps(name, count=1)
    plain = build_model(ModelConfig(width=0.25), 3, 4).state_dict()
    assert list(state) == list(plain)
    for key, value in state.items():
        assert value.shape == plain[key].shape and value.dtype == plain[key].dtype, key


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("name", NAMES)
def test_resume_in_the_middle_is_bit_exact(name: str, optimizer: str) -> None:
    whole, losses = steps(name, optimizer, count=4)
    again, resumed = steps(name, optimizer, count=4, resume_after=2)
    assert losses == resumed
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize("name", NAMES[1:])
def test_fast_kernels_follow_the_reference(name: str) -> None:
    _, reference = steps("reference")
    _, fast = steps(name)
    print("largest difference of a loss:", max(abs(a - b) for a, b in zip(reference, fast, strict=True)))
    assert fast == pytest.approx(reference, abs=0.05)
    assert fast[-1] < fast[0]


def test_a_wrapped_model_is_refused() -> None:
    class Wrapped(torch.nn.parallel.DistributedDataParallel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    with pytest.raises(TypeError, match="before wrapping"):
        choose_kernels("native").prepare(Wrapped())
