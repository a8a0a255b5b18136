"""GPUs, as the launcher must know of them: how many torch can use here. No torch.

In: nothing. Out: a number. Another process is asked, so that neither torch nor CUDA's driver is in this one when it starts ranks and pools.
`torch.cuda.is_available()` decides; a torch built for CUDA tells nothing.
"""

from __future__ import annotations

import functools
import socket
import subprocess
import sys

from hcsdl.config import ConfigError, MachineConfig

QUESTION = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


@functools.cache
def usable_gpus() -> int:
    """Return how many GPUs torch can use on this host, with this environment."""
    answer = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True, check=True)
    return int(answer.stdout.split()[-1])


def check_gpus(config: MachineConfig, ranks: int = 1) -> int:
    """Return how many GPUs `ranks` ranks of this host may use, a rank each; 0 with machine.device=cpu.

    Raises ConfigError where there is none, or fewer than ranks.
    """
    if config.device != "cuda":
        return 0
    found, host = usable_gpus(), socket.gethostname()
    if not found:
        raise ConfigError(
            f"machine.device=cuda needs a GPU that torch can use. torch.cuda.is_available() is False on {host}: set machine.device=cpu, or see "
            "what nvidia-smi says and CUDA_VISIBLE_DEVICES hides."
        )
    if ranks > found:
        raise ConfigError(
            f"distributed.ranks must be at most the GPUs of this host, for each rank has one. Got {ranks}, and {host} has {found}."
        )
    return found
