"""The device of a rank: its name, memory and random state; and that on the processor nothing is different."""

from __future__ import annotations

import pytest
import torch

from hcsdl.config import ConfigError, MachineConfig
from hcsdl.kernels import choose_kernels
from hcsdl.kernels.device import (
    CPU,
    device_limit_gib,
    device_name,
    gpu_id,
    own_device,
    peak_device_gib,
    random_state,
    set_random_state,
    wait_for,
)
from hcsdl.machine.cores import processor
from hcsdl.machine.gpus import check_gpus, usable_gpus
from tests.gpu import DEVICES, needs_gpu, needs_no_gpu


def test_the_processor_is_no_gpu() -> None:
    assert own_device("cpu", 3) == CPU
    assert (device_name(CPU), gpu_id(CPU), peak_device_gib(CPU)) == (processor(), "", 0.0)
    wait_for(CPU)
    assert check_gpus(MachineConfig()) == 0


def test_gpus_are_those_that_torch_can_use() -> None:
    assert usable_gpus() == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@needs_no_gpu
def test_no_gpu_is_explained_though_torch_is_built_for_them() -> None:
    with pytest.raises(ConfigError, match=r"torch\.cuda\.is_available\(\) is False"):
        own_device("cuda", 0)
    with pytest.raises(ConfigError, match=r"torch\.cuda\.is_available\(\) is False on .*: set machine\.device=cpu"):
        check_gpus(MachineConfig(device="cuda"))


@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_go_on_where_they_were(device: torch.device) -> None:
    state = random_state(device)
    before = [torch.rand(3), torch.rand(3, device=device)]
    set_random_state(device, state)
    assert all(torch.equal(one, other) for one, other in zip(before, [torch.rand(3), torch.rand(3, device=device)], strict=True))
    set_random_state(device, {"torch_rng": state["torch_rng"]})  # of a run on a processor


@needs_gpu
def test_a_gpu_is_named_measured_and_not_shared() -> None:
    device = own_device("cuda", 0)
    assert device_name(device) == torch.cuda.get_device_name(0) and gpu_id(device)
    held = torch.empty(2**28, device=device)
    wait_for(device)
    assert peak_device_gib(device) >= 1.0 and device_limit_gib(device) >= 1.0
    del held
    with pytest.raises(ConfigError, match="distributed.ranks must be at most the GPUs"):
        check_gpus(MachineConfig(device="cuda"), usable_gpus() + 1)
    kernels = choose_kernels("auto", device)
    assert (kernels.name, choose_kernels("reference", device).precision) == ("native", "fp32")
    with kernels.autocast():
        assert torch.is_autocast_enabled("cuda") == (kernels.precision == "bf16")
