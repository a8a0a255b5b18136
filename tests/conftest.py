"""What many tests share: plates drawn once."""

from __future__ import annotations

import fcntl
import signal
from pathlib import Path

import pytest

from hcsdl.config import SimulateConfig


def pytest_configure() -> None:
    """Hear Ctrl-C also where a shell has started us in the background, which tells children to ignore it: tests send it to theirs."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plates of the tiny preset, drawn once for all test processes; to be left as they are."""
    from hcsdl.simulation import simulate

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    root = shared / "tiny_plates"
    with open(shared / "tiny_plates.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        simulate(SimulateConfig(preset="tiny", workers=1), root, 0, progress=False)
    return root
