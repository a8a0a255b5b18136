"""What many tests share: plates drawn, a network trained and its table made once for all test processes; all to be left as they are."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hcsdl.config import SimulateConfig
from tests.runs import once


def pytest_configure() -> None:
    """Hear Ctrl-C also where a shell has started us in the background, which tells children to ignore it: tests send it to theirs."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what all test processes share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def tiny_plates(shared: Path) -> Path:
    """Plates of the tiny preset."""
    from hcsdl.simulation import simulate

    return once(shared / "tiny_plates", lambda root: simulate(SimulateConfig(preset="tiny", workers=1), root, 0, progress=False))


@pytest.fixture(scope="session")
def trained(shared: Path, tiny_plates: Path) -> Path:
    """The folder of a run on the tiny plates, one rank, two epochs, with a baseline."""
    from tests import forked

    words = ("distributed.ranks=1", "training.epochs=2", "training.baseline=true", "kernels=native")
    return once(shared / "trained", lambda folder: forked.train(tiny_plates, folder / "run", *words)) / "run"


@pytest.fixture(scope="session")
def table(shared: Path, trained: Path) -> Path:
    """The table of that run's network on its plates, where `hcsdl embed` puts it: in the run's folder."""
    from tests import forked

    words = ("embed", f"checkpoint={trained}", "distributed.ranks=1", "machine.threads_per_rank=1", "kernels=native")
    once(shared / "embedded", lambda _: forked.run(*words))
    [path] = (trained / "embeddings").glob("*.parquet")
    return path
