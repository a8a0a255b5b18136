"""Benchmarks' pictures are pictures, and show their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hcsdl.report.plots import plot_communication, plot_scaling

pytestmark = pytest.mark.xeon_only


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def communication(seconds: float) -> list[dict]:
    return [
        {
            "operation": "all_reduce", "dtype": dtype, "backend": backend, "num_bytes": size, "median_s": seconds * size, "q1_s": 0.9 * seconds * size,
            "q3_s": 1.2 * seconds * size, "bus_gb_per_s": 1e-9 / seconds,
        }
        for dtype in ("fp32", "bf16") for backend in ("gloo", "ccl") for size in (2**10, 2**20)
    ]  # fmt: skip


def scaling(rate: float) -> list[dict]:
    return [
        {"model": model, "assumption": assumption, "nodes": nodes, "images_per_s": rate * nodes**0.9, "efficiency": nodes**-0.1}
        for model in ("resnet18", "mcnn") for assumption in ("low", "high") for nodes in (1, 2, 8)
    ]  # fmt: skip


def test_communication_shows_its_rows(tmp_path: Path) -> None:
    plot_communication(communication(1e-9), 2, tmp_path / "one.png")
    plot_communication([row | {"bus_gb_per_s": row["num_bytes"] / 2**20} for row in communication(1e-9)], 2, tmp_path / "other.png")
    one, other = pixels(tmp_path / "one.png"), pixels(tmp_path / "other.png")
    assert one.shape[:2] == (528, 1536) and one.std() > 5
    half = one.shape[1] // 2
    assert (one[:, half:] != other[:, half:]).any()


@pytest.mark.parametrize("published", [None, {"nodes": 8, "images_per_s": 60.0}])
def test_scaling_has_a_panel_per_network_and_marks_what_is_published(tmp_path: Path, published: dict | None) -> None:
    plot_scaling(scaling(10.0), published, tmp_path / "plot.png")
    seen = pixels(tmp_path / "plot.png")
    assert seen.shape[:2] == (528, 1536)
    for panel in (seen[60:440, 90:740], seen[60:440, 860:1510]):
        colors = {tuple(color) for color in panel.reshape(-1, 3)}
        assert {(31, 119, 180), (255, 127, 14)} <= colors  # the low and the high line
    plot_scaling(scaling(10.0), None, tmp_path / "without.png")
    assert (seen != pixels(tmp_path / "without.png")).any() == (published is not None)
