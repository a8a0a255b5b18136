"""The device a rank computes on: the processor, or one of its host's GPUs.

In: machine.device and the rank's number on its host. Out: a `torch.device`, and of it what differs between the two: its name, its memory, its
random state, and waiting for it, since a GPU works on while Python goes ahead. On the processor all of these are as if there were no GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hcsdl.config import ConfigError
from hcsdl.machine.cores import processor

CPU = torch.device("cpu")


def own_device(name: str, local_rank: int) -> torch.device:
    """Return the device of the `local_rank`-th rank of this host and make it this process's own. To be called once, before anything is computed.

    Ranks are dealt to the GPUs that they see in turn; under launchers that show each rank only its own, that is the one. On GPUs cuDNN is
    kept to algorithms that give the same bits every time, which exact resume needs, and fp32 to fp32, which by default it rounds to TF32.
    Raises ConfigError where torch finds no GPU.
    """
    if name == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise ConfigError("machine.device=cuda needs a GPU that torch can use. torch.cuda.is_available() is False: set machine.device=cpu.")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    return device


def device_name(device: torch.device) -> str:
    """Return what a device is called: the processor's name with its bf16 instructions, or the GPU's."""
    return processor() if device.type == "cpu" else torch.cuda.get_device_name(device)


def gpu_id(device: torch.device) -> str:
    """Return what tells a GPU from all others of its host, however they are numbered; empty for the processor."""
    return "" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


def wait_for(device: torch.device) -> None:
    """Return once a GPU has done all it was told; for clocks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_device_gib(device: torch.device) -> float:
    """Return the most GPU memory that tensors of this process ever took, in GiB; 0 on the processor."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def device_limit_gib(device: torch.device) -> float:
    """Return how much GPU memory tensors of this process may take: what it holds, and what nobody does; in GiB."""
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / 2**30


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's random numbers, the GPU's included."""
    state = {"torch_rng": torch.get_rng_state()}
    return state | {"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Put random numbers where `random_state` found them; a GPU's stay as they are where the state is of the processor's alone."""
    torch.set_rng_state(state["torch_rng"])
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], device)
