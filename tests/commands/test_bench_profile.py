"""`hcsdl bench profile`: own times and the ceiling by hand, and the whole command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from hcsdl.commands.bench_profile import judged
from hcsdl.commands.bench_profile_measure import KINDS, is_product, own_times
from hcsdl.kernels import ipex_problem
from tests import runs


@dataclass
class Event:
    """What torch's profiler tells of one operator."""

    called: str
    start: int
    duration: int
    sizes: tuple = ()
    kinds: tuple = ()
    thread: int = 1

    def name(self) -> str:
        return self.called

    def start_ns(self) -> int:
        return self.start * 10**9

    def duration_ns(self) -> int:
        return self.duration * 10**9

    def shapes(self) -> tuple:
        return self.sizes

    def dtypes(self) -> tuple:
        return self.kinds

    def start_thread_id(self) -> int:
        return self.thread


def test_own_times_leave_out_what_an_operator_calls() -> None:
    events = [
        Event("inner", 1, 3, ([2, 5], [4], []), ("c10::BFloat16", "float", "Scalar")),
        Event("outer", 0, 10),
        Event("inner", 5, 2, ([2, 5],), ("c10::BFloat16",)),
        Event("innermost", 2, 1),
        Event("outer", 20, 1),
        Event("elsewhere", 0, 8, thread=2),
    ]
    rows = {row["operator"]: row for row in own_times(events)}
    assert {name: row["seconds"] for name, row in rows.items()} == {"outer": 6.0, "elsewhere": 8.0, "inner": 4.0, "innermost": 1.0}
    assert rows["inner"]["calls"] == 2 and rows["inner"]["bytes"] == 20 + 16 + 20
    assert list(rows)[0] == "elsewhere"


def test_what_is_a_product() -> None:
    assert all(
        map(
            is_product,
            ("aten::mkldnn_convolution", "aten::convolution_backward", "aten::addmm", "torch_ipex::convolution_forward", "_ColumnBackward"),
        )
    )
    assert not any(
        map(is_product, ("aten::native_batch_norm", "aten::copy_", "aten::max_pool2d_with_indices", "aten::threshold_backward", "_Column"))
    )


def test_ceiling_by_hand() -> None:
    seconds = {
        "stock": {"forward": 1.0, "input_gradient": 3.0, "weight_gradient": 5.0},
        "hcsdl": {"forward": 2.0, "input_gradient": 2.0, "weight_gradient": 4.0},
        "matmul": {"weight_gradient": 3.0},
    }
    profile = {
        "convolutions": [{"convolution": "one", "count": 2, "flop": 6, "seconds": seconds}],
        "linear_flop": 50,
        "matrix_flop_per_s": 100.0,
        "step_bytes": 30.0,
        "copy_bytes_per_s": 10.0,
        "step_s": 20.0,
        "operators": [{"operator": "a", "product": True, "seconds": 12.0}, {"operator": "b", "product": False, "seconds": 4.0}],
    }
    found = judged(profile, 2)
    # twice 1 + 2 + 3 s of convolutions, 2 × 50 operations at 100 a second, 30 bytes at 10 a second
    assert found["ceiling"] == pytest.approx(
        {"convolutions_s": 12.0, "linear_s": 1.0, "bytes_s": 3.0, "step_s": 16.0, "images_per_s": 0.125, "reached": 0.8}
    )
    (row,) = found["convolutions"]
    assert {kind: one["way"] for kind, one in row["best"].items()} == {
        "forward": "stock",
        "input_gradient": "hcsdl",
        "weight_gradient": "matmul",
    }
    assert row["flop_per_s"]["weight_gradient"] == {"stock": 2.4, "hcsdl": 3.0, "matmul": 4.0}
    assert found["others_to_bytes"] == pytest.approx(4 / 3) and [row["share"] for row in found["operators"]] == [0.75, 0.25]


def test_the_whole_command(tmp_path: Path) -> None:
    words = ["bench.models=[resnet50]", "bench.image_size=[64,96]", "bench.width=0.125", "bench.rounds=1", "machine.threads_per_rank=1"]
    done = runs.run("bench", "profile", *words, f"bench.output={tmp_path}")
    profile = json.loads((tmp_path / "result.json").read_text())["profiles"]["resnet50"]
    assert sum(row["count"] for row in profile["convolutions"]) == 53
    ways = {"stock", "hcsdl", "matmul"} | (set() if ipex_problem() or profile["precision"] != "bf16" else {"ipex"})
    for row in profile["convolutions"]:
        assert set(row["seconds"]) == ways - (set() if row["pointwise"] else {"matmul"})
        first = row["convolution"].startswith("7×7")
        assert set(row["seconds"]["stock"]) == set(KINDS) - ({"input_gradient"} if first else set())
        assert all(seconds > 0 for way in row["seconds"].values() for seconds in way.values())
    products = [row for row in profile["operators"] if row["product"]]
    assert sum(row["calls"] for row in products if "convolutionbackward" in row["operator"].replace("_", "").lower()) >= 53
    assert sum(row["share"] for row in profile["operators"]) == pytest.approx(1) and profile["copy_bytes_per_s"] > 1e8
    assert "7×7 / 2, 3 → 8 at 64 × 96" in done.stdout and "ceiling" in done.stdout and "GFLOP/s" in done.stdout
