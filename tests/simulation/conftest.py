"""Fixtures: one set of tiny plates, drawn once for all tests of this folder that only look at them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcsdl.config import SimulateConfig
from hcsdl.simulation import simulate


@pytest.fixture(scope="session")
def tiny_plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny preset's plates, seed 0."""
    root = tmp_path_factory.mktemp("simulated") / "tiny"
    simulate(SimulateConfig(preset="tiny"), root, 0, progress=False)
    return root
